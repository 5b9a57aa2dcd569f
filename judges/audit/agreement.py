"""How far two judges agree on the same completions, and on which they do not.

Groups go in as a stream, a record of every two completions comes out, and `measure_agreement` turns the records into
figures. Of two completions a judge prefers the one with the higher score; equal scores are a tie.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from iterdpo.data.chats import content_of, with_companions
from iterdpo.data.rows import column_value, first_row, json_columns, located_rows, whole
from iterdpo.errors import DataError, UserError
from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.run.artifacts import completion_shards, read_completion_shard, read_groups
from iterdpo.run.rundir import RunDir, digest
from iterdpo.stats import Estimate, clustered_bootstrap, clustered_mean
from iterdpo.types import CompletionGroup, Judgment, Prompt, content_to_json
from judges.audit.check import EXAMPLES, Turn, in_blocks
from judges.audit.labelled import NOT_COLUMNS, LabelledGroup, read_labelled, tokenized
from judges.audit.published import published_format
from judges.audit.stats import kappa, kendall, spearman

Winner = Literal["first", "second", "tie"] | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A group that both judges are given, and which of its completions are labelled better: `Sample(group, right={1})`."""

    group: CompletionGroup
    right: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Rated:
    """What both judges say of completions i < j: `Rated("p-1f0c…", 0, 2, a="first", b="tie", label=None)`."""

    prompt_id: str
    i: int
    j: int
    a: Winner
    b: Winner
    label: Winner = None


class Difference(NamedTuple):
    sample: Sample
    rated: Rated
    a: Judgment
    b: Judgment


@dataclass
class Agreement:
    """What two judges said of the same groups. `scores` are those of groups, for the completions that both scored."""

    names: tuple[str, str]
    versions: tuple[str, str]
    turns: tuple[Turn, Turn]
    groups: int = 0
    rated: list[Rated] = field(default_factory=list)
    scores: list[tuple[str, list[float], list[float]]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def stopped(self) -> BaseException | None:
        return self.turns[0].stopped or self.turns[1].stopped


def read_samples(
    path: str,
    *,
    round: int | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
) -> Iterator[Sample]:
    """What two judges are compared on: labelled pairs, prompts with `completions`, or the completions of a run.

    `path` is preference data or a published benchmark, each row's completions in random order; rows with `prompt` and `completions`, a list of texts, and
    columns for the judge; a shard of a run's completions; or a run directory, of which the round `round` is read
    (by default the last that has completions).

    Raises:
        UserError: a file that cannot be read, rows without completions, or a run without the round.
    """
    if (Path(path) / "run.json").is_file():
        return map(Sample, islice(_run_groups(path, round), limit))
    if Path(path).match("shard-*.parquet"):
        return map(Sample, islice(read_completion_shard(Path(path)), limit))
    if round is not None:
        raise UserError(f"{path}: --round is for a run directory, but this has no run.json")
    first = first_row(path, split)
    if "completions" in first:
        rows = located_rows(path, split, limit=limit)
        return (Sample(_group(whole(row), where, tokenizer)) for where, row in rows)
    if not {"chosen", "rejected"} & first.keys() and published_format(first) is None:
        forms = (
            "labelled pairs (chosen, rejected), rows with prompt and completions (a list of texts), or a run directory"
        )
        raise DataError(f"{path}: prompts alone cannot be judged; give {forms}")
    labelled, _ = read_labelled(path, split=split, limit=limit, tokenizer=tokenizer)
    return (_sample(row, seed) for row in labelled)


def compare_judges(
    make_a: Callable[[], JudgeBase],
    make_b: Callable[[], JudgeBase],
    samples: Callable[[], Iterable[Sample]],
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Agreement:
    """Have both judge the same groups, first all by A, then all by B: they may want the same device.

    `samples` is called twice, and gives the same each time. Ctrl-C, and whatever the data or a judge raise, end that
    judge's turn early; B is only asked what A has judged. Before a first block is finished, errors are raised.
    """
    judged_by_a: list[Judgment] = []
    a = make_a()
    turn_a = in_blocks(a, samples(), lambda block: judged_by_a.extend(_judged(a, block)), advance)
    a.close()
    b = make_b()
    result = Agreement((a.name, b.name), (a.version, b.version), (turn_a, Turn()))

    def work(block: Sequence[Sample]) -> None:
        ours = judged_by_a[result.groups : result.groups + len(block)]
        for sample, x, y in zip(block, ours, _judged(b, block), strict=True):
            _record(result, sample, x, y)

    if not isinstance(turn_a.stopped, KeyboardInterrupt):
        result.turns = turn_a, in_blocks(b, islice(samples(), len(judged_by_a)), work, advance)
    b.close()
    return result


def measure_agreement(
    agreement: Agreement, *, seed: int = 0, confidence: float = 0.95, samples: int = 1_000
) -> dict[str, Any]:
    """The figures of a comparison, over every two completions of a prompt that both judges judged.

    agreement          the share on which both say the same: first, second, or tie
    kappa              Cohen's, of the same (see `kappa`)
    kendall, spearman  mean over prompts of the correlation of the scores within the prompt
    opposite           the share on which one says first and the other second
    accuracy_a, _b     of the labelled pairs, the share judged right; a tie is half right
    accuracy_gain      accuracy_b - accuracy_a, of the same pairs

    `confusion[x][y]` counts the pairs of which A says x and B says y.
    """
    rated = agreement.rated
    judged = [r for r in rated if r.a is not None and r.b is not None]
    both, prompts = [(r.a, r.b) for r in judged], [r.prompt_id for r in judged]

    drawn: dict[str, Any] = {"confidence": confidence, "samples": samples, "seed": seed}

    def share(values: Sequence[float], names: Sequence[str], bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
        return clustered_mean(values, names, bounds=bounds, confidence=confidence)

    def correlation(of: Callable[[Sequence[float], Sequence[float]], float | None]) -> Estimate:
        found = [(value, prompt) for prompt, x, y in agreement.scores if (value := of(x, y)) is not None]
        return share([v for v, _ in found], [p for _, p in found], (-1.0, 1.0))

    kinds: tuple[Winner, ...] = ("first", "second", "tie")
    codes = [[kinds.index(pair[side]) for pair in both] for side in (0, 1)]
    labelled = [r for r in judged if r.label is not None]
    sides = [(r.a, r.label) for r in labelled], [(r.b, r.label) for r in labelled]
    credit = [[0.5 if winner == "tie" else float(winner == label) for winner, label in side] for side in sides]
    names = [r.prompt_id for r in labelled]
    counts = Counter(both)
    return {
        "counts": {
            "groups": agreement.groups,
            "pairs": len(rated),
            "judged_by_both": len(both),
            "unjudged_a": sum(r.a is None for r in rated),
            "unjudged_b": sum(r.b is None for r in rated),
        },
        "figures": {
            "agreement": share([float(x == y) for x, y in both], prompts),
            "kappa": clustered_bootstrap(kappa(*codes, categories=3), prompts, **drawn),
            "opposite": share([float({x, y} == {"first", "second"}) for x, y in both], prompts),
            "kendall": correlation(kendall),
            "spearman": correlation(spearman),
            "accuracy_a": share(credit[0], names),
            "accuracy_b": share(credit[1], names),
            "accuracy_gain": share([theirs - ours for ours, theirs in zip(*credit, strict=True)], names, (-1.0, 1.0)),
        },
        "confusion": {x: {y: counts[x, y] for y in kinds} for x in kinds},
    }


def _judged(judge: JudgeBase, samples: Sequence[Sample]) -> list[Judgment]:
    return checked_judgments(judge, [sample.group for sample in samples])


def _record(result: Agreement, sample: Sample, a: Judgment, b: Judgment) -> None:
    result.groups += 1
    id = sample.group.prompt.id
    scored = [(x, y) for x, y in zip(a.scores, b.scores, strict=True) if x is not None and y is not None]
    if len(scored) > 1:
        result.scores.append((id, [x for x, _ in scored], [y for _, y in scored]))
    for i, j in itertools.combinations(range(len(a.scores)), 2):
        label: Winner = None
        if (i in sample.right) != (j in sample.right):
            label = "first" if i in sample.right else "second"
        rated = Rated(id, i, j, _winner(a, i, j), _winner(b, i, j), label)
        result.rated.append(rated)
        if rated.a != rated.b and None not in (rated.a, rated.b):
            result.differences.append(Difference(sample, rated, a, b))
    # Opposite verdicts first; Python's sort keeps the order of the data among equals.
    result.differences = sorted(result.differences, key=lambda d: "tie" in (d.rated.a, d.rated.b))[:EXAMPLES]


def _winner(judgment: Judgment, i: int, j: int) -> Winner:
    x, y = judgment.scores[i], judgment.scores[j]
    if x is None or y is None:
        return None
    return "tie" if x == y else "first" if x > y else "second"


def _sample(row: LabelledGroup, seed: int) -> Sample:
    order = row.order(seed)
    return Sample(row.group(order), frozenset() if row.tie else frozenset(map(order.index, range(row.right))))


def _run_groups(path: str, round: int | None) -> Iterator[CompletionGroup]:
    run = RunDir(path)
    there = [r for r in run.rounds() if completion_shards(run.round_dir(r) / "completions")]
    if round not in there and (round is not None or not there):
        what, have = "any round" if round is None else f"round {round}", ", ".join(map(str, there)) or "none"
        raise UserError(f"{path}: no completions of {what}; rounds with completions: {have}")
    return read_groups(run.round_dir(there[-1] if round is None else round) / "completions")


def _group(row: dict[str, Any], where: str, tokenizer: Any) -> CompletionGroup:
    given = column_value(row, "prompt", where, "rows have prompt and completions")
    content = with_companions(content_of(given, f"{where}, column 'prompt'"), row, where)
    texts = row.get("completions")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(f"{where}, column 'completions' must be a list of texts")
    columns = json_columns({k: v for k, v in row.items() if k not in NOT_COLUMNS})
    prompt = Prompt(f"p-{digest(content_to_json(content))}", content, columns)
    return tokenized(prompt, texts, tokenizer, where)

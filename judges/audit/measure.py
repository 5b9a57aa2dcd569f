"""How good a judge is: what it says of pairs that people have labelled.

Pairs go in as a stream, a record of each comes out, and `measure` turns the records into figures.

A pair's verdict is the completion with the higher score. Equal scores are a tie. Where either completion has no score,
the judge abstained. The order in which it is given the two is random, so that a liking for the first one shows.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from iterdpo.data.preferences import Account, Content, Format, PreferenceData, RawPair, parse_rows
from iterdpo.data.prompts import column_value, json_value, load_rows
from iterdpo.data.rendering import completion_token_ids, prompt_token_ids
from iterdpo.errors import DataError
from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.seeds import derive_seed
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt
from judges.adapter import CustomJudge
from judges.audit import stats as estimates
from judges.audit.stats import NOTHING, Estimate

Verdict = Literal["chosen", "rejected", "tie"] | None
Winner = Literal["first", "second", "tie"] | None

BLOCK = 64  # groups that a judge is given at a time
EXAMPLES = 12  # mistakes, or differences of two judges, that are kept with their texts
NOT_COLUMNS = {"prompt", "chosen", "rejected", "conversations", "system", "tie", "completions"}
FACTS = ("row", "prompt_id", "subset", "tie", "chosen_first", "lengths")
CREDIT = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}

PROBABILITIES = "the probabilities that the judge gave with its verdicts, mean over both orders"
VERDICTS = "its verdicts, taken as certain; one in each order counts half"
SIGMOID = "sigmoid of the difference of the scores, the reading of Bradley and Terry"


# Labelled pairs


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two completions of a prompt, and which is the better one by the label; neither, where it is a `tie`.

    `LabelledPair(prompt, prompt_ids=[40, 8], chosen=y_1, rejected=y_2, tie=False, subset="math", row=12)`
    """

    prompt: Prompt
    prompt_ids: list[int]
    chosen: Completion
    rejected: Completion
    tie: bool
    subset: str | None
    row: int

    def group(self, *, chosen_first: bool) -> CompletionGroup:
        both = [self.chosen, self.rejected] if chosen_first else [self.rejected, self.chosen]
        return CompletionGroup(self.prompt, self.prompt_ids, both)


def read_labelled(
    path: str,
    *,
    split: str = "train",
    format: Format = "auto",
    limit: int | None = None,
    subset_column: str | None = None,
    tokenizer: Any = None,
) -> tuple[Iterator[LabelledPair], Account]:
    """The pairs of preference data (see iterdpo/data/preferences.py), and the account of what was left out as it is read.

    A column `tie` that is true marks a pair whose completions are equally good. The row's other columns reach the
    judge. Without a tokenizer, a token is a byte of UTF-8.

    Raises:
        DataError: a file that cannot be read, or (while iterating) a row of the wrong shape.
    """
    settled = PreferenceData(path, split, format, limit=1).format
    if settled == "unpaired":
        raise DataError(f"{path}: has one completion a row; labelled pairs have the columns chosen and rejected")
    account = Account(path)

    def pairs() -> Iterator[LabelledPair]:
        numbered = enumerate(load_rows(path, split, limit=limit), 1)
        while batch := list(islice(numbered, BLOCK)):
            rows = dict(batch)
            for raw in parse_rows(batch, settled, account):
                yield _labelled(raw, rows[raw.row], f"{path}: row {raw.row}", subset_column, tokenizer)
        if not account.kept:
            raise DataError(f"{path}: no pair can be used: {account.summary()}")

    return pairs(), account


def _labelled(raw: RawPair, row: dict[str, Any], where: str, subset_column: str | None, tokenizer: Any) -> LabelledPair:
    columns = {k: json_value(v) for k, v in row.items() if k not in NOT_COLUMNS}
    subset = None
    if subset_column is not None:
        subset = str(column_value(row, subset_column, where, "set --subset-column"))
    tie = {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}.get(
        str(row.get("tie")).lower()
    )
    if tie is None:
        raise DataError(f"{where}, column 'tie' is {row['tie']!r}; it must be true (equally good) or false")
    assert raw.chosen is not None
    assert raw.rejected is not None
    content = raw.prompt.content
    chosen, rejected = (completion_of(content, c, tokenizer, where) for c in (raw.chosen, raw.rejected))
    prompt = replace(raw.prompt, columns=columns)
    return LabelledPair(prompt, prompt_ids_of(prompt, tokenizer, where), chosen, rejected, tie, subset, raw.row)


def prompt_ids_of(prompt: Prompt, tokenizer: Any, where: str) -> list[int]:
    try:
        return list(prompt.text.encode()) if tokenizer is None else prompt_token_ids(tokenizer, prompt.content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def completion_of(prompt: Content, content: Content, tokenizer: Any, where: str) -> Completion:
    text = content if isinstance(content, str) else "\n\n".join(m["content"] for m in content)
    try:
        ids = list(text.encode()) if tokenizer is None else completion_token_ids(tokenizer, prompt, content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return Completion(text, ids, [], "stop")


# Checking a judge


@dataclass(frozen=True, slots=True)
class Shown:
    """A single comparison of a pair: `Shown(chosen_first=False, verdict="chosen")`; None where the judge abstained."""

    chosen_first: bool
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Look:
    """What a judgment says of a labelled pair.

    `Look("chosen", scores=(0.9, 0.2), reasons=(), shown=(), probability=0.67, source=SIGMOID)`

    `scores` are those of chosen and rejected, `probability` is the judge's that the chosen is the better one.
    """

    verdict: Verdict
    scores: tuple[float | None, float | None]
    reasons: tuple[str, ...]
    shown: tuple[Shown, ...]
    probability: float | None
    source: str


@dataclass(slots=True)
class JudgedPair:
    """A labelled pair as it was judged, without its texts.

    `swapped` is a second look with the completions in the other order, `repeats` are further verdicts in the same.
    `lengths` are those of chosen and rejected.
    """

    row: int
    prompt_id: str
    subset: str | None
    tie: bool
    chosen_first: bool
    lengths: tuple[int, int]
    look: Look
    swapped: Look | None = None
    repeats: list[Verdict] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        look = {k: v for k, v in asdict(self.look).items() if k != "source"}
        swapped = None if self.swapped is None else self.swapped.verdict
        return {**{k: getattr(self, k) for k in FACTS}, **look, "swapped": swapped, "repeats": self.repeats}


class Mistake(NamedTuple):
    pair: LabelledPair
    judged: JudgedPair


@dataclass
class Check:
    """A judge's verdicts on labelled pairs, and what they took. `stopped` says why it ended before the data did."""

    name: str
    version: str
    pairs: list[JudgedPair] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    stopped: BaseException | None = None


def check_judge_on(
    judge: JudgeBase,
    pairs: Iterable[LabelledPair],
    *,
    seed: int = 0,
    repeats: int = 1,
    unit: Literal["characters", "tokens"] = "characters",
    advance: Callable[[int], None] = lambda count: None,
) -> Check:
    """Judge the pairs in blocks. A judge that reads a prompt's completions together is shown each pair in both orders.

    With `repeats` above 1 each pair is judged that many times. The `repeat` of the judge, and of each within it, is the
    number of the draw, so that no cache and no fixed seed answers in its place.

    Ctrl-C, and whatever the data or the judge raise, end it early with the pairs of the finished blocks; `stopped` has
    the reason. Before a first block is finished, errors are raised.
    """
    check = Check(judge.name, judge.version)
    before = judge.usage()
    swap: bool | None = None  # not known before the first judgments
    stream = iter(pairs)
    try:
        while block := list(islice(stream, BLOCK)):
            started = time.perf_counter()
            judged = [_unjudged(pair, seed, unit) for pair in block]
            for pair, j, judgment in zip(block, judged, _judge(judge, block, judged), strict=True):
                j.look = look_at(pair, judgment, chosen_first=j.chosen_first)
            if swap is None:
                swap = _compares(judge) and not any(orders(j) for j in judged)
            if swap:
                for j in judged:
                    j.chosen_first = not j.chosen_first
                for pair, j, judgment in zip(block, judged, _judge(judge, block, judged), strict=True):
                    j.swapped = look_at(pair, judgment, chosen_first=j.chosen_first)
                    j.chosen_first = not j.chosen_first
            for number in range(1, repeats):
                draw_again(judge, number)
                for pair, j, judgment in zip(block, judged, _judge(judge, block, judged), strict=True):
                    j.repeats.append(look_at(pair, judgment, chosen_first=j.chosen_first).verdict)
            draw_again(judge, 0)
            check.seconds += time.perf_counter() - started
            check.pairs += judged
            wrong = [Mistake(p, j) for p, j in zip(block, judged, strict=True) if _is_mistake(j)]
            check.mistakes = heapq.nsmallest(EXAMPLES, check.mistakes + wrong, key=_how_right)
            advance(len(block))
    except (Exception, KeyboardInterrupt) as error:  # for the caller to raise, once what is judged is reported
        if not check.pairs and isinstance(error, Exception):
            raise
        check.stopped = error
    check.usage = used_since(before, judge)
    return check


def look_at(pair: LabelledPair, judgment: Judgment, *, chosen_first: bool) -> Look:
    """What the judgment of `pair.group(chosen_first=…)` says of chosen and rejected."""
    chosen, rejected = judgment.scores if chosen_first else judgment.scores[::-1]
    reasons = dict.fromkeys(
        r for r in (*judgment.abstentions, *(c.reason for c in judgment.comparisons if c.winner is None)) if r
    )
    at = 0 if chosen_first else 1
    shown = []
    for c in judgment.comparisons:
        won = {"first": c.first == at, "second": c.second == at}
        verdict: Verdict = c.winner if c.winner in ("tie", None) else "chosen" if won[c.winner] else "rejected"
        shown.append(Shown(c.first == at, verdict))
    if chosen is None or rejected is None:
        return Look(None, (chosen, rejected), tuple(reasons), tuple(shown), None, "")
    given = [
        c.probability if c.first == at else 1 - c.probability for c in judgment.comparisons if c.probability is not None
    ]
    if given and len(given) == len(judgment.comparisons):
        probability, source = sum(given) / len(given), PROBABILITIES
    elif shown and 0 <= chosen <= 1 and math.isclose(chosen + rejected, 1):
        probability, source = chosen, VERDICTS
    else:
        probability, source = float(estimates.sigmoid(chosen - rejected)), SIGMOID
    verdict = "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"
    return Look(verdict, (chosen, rejected), tuple(reasons), tuple(shown), probability, source)


def orders(judged: JudgedPair) -> tuple[Verdict, Verdict] | None:
    """The verdicts with the chosen shown first and with it shown second. None where either was not asked or given."""
    by_order = {s.chosen_first: s.verdict for s in judged.look.shown}
    if judged.swapped is not None and len(by_order) < 2:
        by_order = {judged.chosen_first: judged.look.verdict, not judged.chosen_first: judged.swapped.verdict}
    both = by_order.get(True), by_order.get(False)
    return None if None in both else both


def draw_again(judge: JudgeBase, number: int) -> None:
    """Have the judge, and those within it, answer the same question as draw `number`."""
    for part in judge.parts():
        part.repeat = number


def used_since(before: dict[str, float], judge: JudgeBase) -> dict[str, float]:
    return {name: amount - before.get(name, 0) for name, amount in judge.usage().items()}


def _unjudged(pair: LabelledPair, seed: int, unit: str) -> JudgedPair:
    chosen_first = derive_seed(seed, "judge check", pair.row) % 2 == 0
    sizes = [len(c.text) if unit == "characters" else len(c.token_ids) for c in (pair.chosen, pair.rejected)]
    nothing = Look(None, (None, None), (), (), None, "")
    return JudgedPair(pair.row, pair.prompt.id, pair.subset, pair.tie, chosen_first, (sizes[0], sizes[1]), nothing)


def _judge(judge: JudgeBase, block: Sequence[LabelledPair], judged: Sequence[JudgedPair]) -> list[Judgment]:
    groups = [p.group(chosen_first=j.chosen_first) for p, j in zip(block, judged, strict=True)]
    return checked_judgments(judge, groups)


def _compares(judge: JudgeBase) -> bool:
    """Whether a completion's score may depend on the others of its group, and so on their order."""
    return judge.comparative or (isinstance(judge, CustomJudge) and judge.kind == "groups")


def _is_mistake(judged: JudgedPair) -> bool:
    return not judged.tie and judged.look.verdict == "rejected"


def _how_right(mistake: Mistake) -> tuple[float, float, int]:
    look = mistake.judged.look
    assert look.probability is not None
    return look.probability, look.scores[0] - look.scores[1], mistake.judged.row  # type: ignore[operator]


# The figures of a check


def measure(
    pairs: Sequence[JudgedPair], *, seed: int = 0, confidence: float = 0.95, samples: int = 1_000
) -> dict[str, Any]:
    """The figures of a check, as `{"counts": …, "figures": {name: Estimate}, "subsets": …, "reliability": …, …}`.

    Intervals are over prompts (see judges/audit/stats.py); a figure that nothing is there to tell by is None.

    Of the pairs that are labelled with a winner:

    accuracy                 the share judged right, of those judged; a tie is half right
    accuracy_decided         of those judged with a winner
    accuracy_agreeing        of those with the same winner in both orders
    tie_rate                 ties, of those judged
    longer_wins              of those decided with different lengths: the longer one won
    longer_is_better         of the same pairs: the label says that the longer one is better
    length_bias              the difference of these two: what the judge likes in length beyond what the label does
    accuracy_chosen_longer   accuracy_decided where the chosen is the longer one
    accuracy_chosen_shorter  and where it is the shorter one
    ece, brier               calibration error (see `estimates.calibration_error`), mean squared error, of the
                             probability that the chosen is better
    ece_tempered             on one half of the prompts, of sigmoid(d / T) with the T that fits the other half best

    Of all pairs:

    coverage                 judged, not abstained
    tie_agreement            of those labelled a tie and judged: judged a tie
    flip_rate                of those judged in both orders: another verdict in the other order, to or from a tie too
    first_position           of the single comparisons with a winner: the one shown first won; 0.5 is fair
    position_bias            first_position - 0.5
    first_index              of the groups with a winner: the completion that came first in the group won
    length_correlation       Spearman's, of score difference and length difference
    self_consistency         over repeats: the share of a pair's verdicts that are its commonest
    """
    reasons = Counter(reason for p in pairs if p.look.verdict is None for reason in p.look.reasons)
    by_subset: dict[str, list[JudgedPair]] = {}
    for pair in pairs:
        if pair.subset is not None:
            by_subset.setdefault(pair.subset, []).append(pair)
    probable = [p for p in pairs if not p.tie and p.look.probability is not None]
    probabilities = [p.look.probability for p in probable if p.look.probability is not None]
    return {
        "counts": {
            "pairs": len(pairs),
            "prompts": len({p.prompt_id for p in pairs}),
            "labelled_ties": sum(p.tie for p in pairs),
            "judged": sum(p.look.verdict is not None for p in pairs),
            "ties": sum(p.look.verdict == "tie" for p in pairs),
        },
        "figures": {
            **_shares(pairs, confidence),
            **_lengths(pairs, seed, confidence, samples),
            **_calibration(probable, seed, confidence, samples),
        },
        "subsets": {
            name: {"pairs": len(some), **{k: _shares(some, confidence)[k] for k in SUBSET_FIGURES}}
            for name, some in sorted(by_subset.items())
        },
        "calibration": {
            "probability": Counter(p.look.source for p in probable).most_common(1)[0][0] if probable else None,
            "temperature": _temperature(probable, seed),
            "ece_if_calibrated": estimates.calibrated_error(probabilities, seed=seed),
        },
        "reliability": estimates.reliability(probabilities, [p.prompt_id for p in probable]),
        "abstentions": dict(reasons.most_common()),
    }


SUBSET_FIGURES = ("accuracy", "accuracy_decided", "tie_rate", "coverage", "flip_rate")


def _shares(pairs: Sequence[JudgedPair], confidence: float) -> dict[str, Estimate]:
    def share(rows: Iterable[tuple[float, JudgedPair]]) -> Estimate:
        found = list(rows)
        return estimates.mean([v for v, _ in found], [p.prompt_id for _, p in found], confidence=confidence)

    judged = [(p.look.verdict, p) for p in pairs if p.look.verdict is not None]
    labelled = [(verdict, p) for verdict, p in judged if not p.tie]
    decided = [(verdict, p) for verdict, p in labelled if verdict != "tie"]
    both = [(found, p) for p in pairs if (found := orders(p)) is not None]
    looks = [(look, order, p) for p in pairs for look, order in _looks(p)]
    single = [(s, p) for look, _, p in looks for s in look.shown if s.verdict in ("chosen", "rejected")]
    first = share((float((s.verdict == "chosen") == s.chosen_first), p) for s, p in single)
    repeated = [([p.look.verdict, *p.repeats], p) for p in pairs if p.repeats]
    return {
        "accuracy": share((CREDIT[verdict], p) for verdict, p in labelled),
        "accuracy_decided": share((CREDIT[verdict], p) for verdict, p in decided),
        "accuracy_agreeing": share(
            (CREDIT[a], p) for (a, b), p in both if not p.tie and a is not None and a == b != "tie"
        ),
        "coverage": share((float(p.look.verdict is not None), p) for p in pairs),
        "tie_rate": share((float(verdict == "tie"), p) for verdict, p in labelled),
        "tie_agreement": share((float(verdict == "tie"), p) for verdict, p in judged if p.tie),
        "flip_rate": share((float(a != b), p) for (a, b), p in both),
        "first_position": first,
        "position_bias": _less_half(first),
        "first_index": share(
            (float((look.verdict == "chosen") == order), p)
            for look, order, p in looks
            if look.verdict in ("chosen", "rejected")
        ),
        "self_consistency": share((max(Counter(v).values()) / len(v), p) for v, p in repeated),
    }


def _less_half(share: Estimate) -> Estimate:
    value, low, high = (None if v is None else v - 0.5 for v in share[:3])
    return Estimate(value, low, high, share.n)


def _looks(pair: JudgedPair) -> list[tuple[Look, bool]]:
    """The looks at a pair, each with whether the chosen came first in it."""
    swapped = [] if pair.swapped is None else [(pair.swapped, not pair.chosen_first)]
    return [(pair.look, pair.chosen_first), *swapped]


def _lengths(pairs: Sequence[JudgedPair], seed: int, confidence: float, samples: int) -> dict[str, Estimate]:
    uneven = [
        (p.look.verdict == "chosen", p.lengths[0] > p.lengths[1], p.prompt_id)
        for p in pairs
        if not p.tie and p.look.verdict in ("chosen", "rejected") and p.lengths[0] != p.lengths[1]
    ]

    def share(rows: Iterable[tuple[float, str]], *, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
        found = list(rows)
        return estimates.mean([v for v, _ in found], [p for _, p in found], bounds=bounds, confidence=confidence)

    judged = [p for p in pairs if p.look.verdict is not None]
    correlation = NOTHING
    if judged:
        scores = [p.look.scores[0] - p.look.scores[1] for p in judged]  # type: ignore[operator]
        lengths = [p.lengths[0] - p.lengths[1] for p in judged]
        correlation = estimates.bootstrap(
            estimates.symmetric_rank_correlation(scores, lengths),
            [p.prompt_id for p in judged],
            confidence=confidence,
            samples=samples,
            seed=seed,
        )
    return {
        "longer_wins": share((float(right == longer), prompt) for right, longer, prompt in uneven),
        "longer_is_better": share((float(longer), prompt) for _, longer, prompt in uneven),
        "length_bias": share(
            ((float(right == longer) - float(longer), prompt) for right, longer, prompt in uneven), bounds=(-1.0, 1.0)
        ),
        "accuracy_chosen_longer": share((float(right), prompt) for right, longer, prompt in uneven if longer),
        "accuracy_chosen_shorter": share((float(right), prompt) for right, longer, prompt in uneven if not longer),
        "length_correlation": correlation,
    }


def _calibration(pairs: Sequence[JudgedPair], seed: int, confidence: float, samples: int) -> dict[str, Estimate]:
    def error(some: Sequence[JudgedPair], p: Any) -> Estimate:
        prompts = [pair.prompt_id for pair in some]
        return estimates.calibration_error(p, prompts, confidence=confidence, samples=samples, seed=seed)

    p = np.array([pair.look.probability for pair in pairs], dtype=float)
    other = [pair for pair in pairs if not _fits(pair, seed)]
    temperature = _temperature(pairs, seed)
    tempered = NOTHING
    if temperature is not None and other:
        tempered = error(other, estimates.sigmoid(_differences(other) / temperature))
    return {
        "ece": error(pairs, p),
        "ece_tempered": tempered,
        "brier": estimates.mean((1 - p) ** 2, [pair.prompt_id for pair in pairs], confidence=confidence),
    }


def _temperature(pairs: Sequence[JudgedPair], seed: int) -> float | None:
    """The best one of half of the prompts. None where there is none, or where the verdicts carry no degree."""
    if any(pair.look.source == VERDICTS for pair in pairs):
        return None
    return estimates.best_temperature(_differences([pair for pair in pairs if _fits(pair, seed)]))


def _fits(pair: JudgedPair, seed: int) -> bool:
    """Whether the pair's prompt is of the half that the temperature is fitted to."""
    return derive_seed(seed, "temperature", pair.prompt_id) % 2 == 0


def _differences(pairs: Sequence[JudgedPair]) -> Any:
    """Score of the chosen minus that of the rejected; of probabilities, the log-odds. [pairs]"""
    found = []
    for pair in pairs:
        chosen, rejected = pair.look.scores
        if pair.look.source == SIGMOID:
            found.append(chosen - rejected)  # type: ignore[operator]
        else:
            assert pair.look.probability is not None
            p = min(max(pair.look.probability, 1e-6), 1 - 1e-6)
            found.append(math.log(p / (1 - p)))
    return np.array(found)

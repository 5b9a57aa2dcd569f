"""(x, y_w, y_l): preference pairs from a round's completions and their judgments."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterdpo.config import MixedDataConfig
from iterdpo.data.mixing import drawn, further_pairs
from iterdpo.data.pairing import PairCounts, build_pairs
from iterdpo.data.pairs import ROW_GROUP, TRAIN, drawn_rows, pairs_table, write_pairs
from iterdpo.data.preferences import Account, RawPair, preferences_of, tokenize_pairs
from iterdpo.errors import DataError
from iterdpo.run.artifacts import Completions, Judgments, Pairs, read_groups
from iterdpo.run.rundir import Manifest, check_step, read_manifest
from iterdpo.seeds import derive_seed
from iterdpo.stages.others import against, judged_against, other_completions, sampled_others
from iterdpo.stages.runs import IterativeRun, OfflineRun, batches
from iterdpo.types import PreferencePair

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 256
"""Groups in memory."""

OPTIONS = {"strategy", "min_margin", "max_pairs_per_prompt", "drop_truncated"}
"""Settings of `pairing` that `build_pairs` takes."""


@dataclass
class Tally:
    """What is counted while a round's pairs are written."""

    fresh: PairCounts = field(default_factory=PairCounts)
    margins: float = 0.0
    """The sum of the differences of scores, over the `scored` pairs: those of which both sides have one."""
    scored: int = 0
    added: Counter[str] = field(default_factory=Counter)
    """Pairs that are not fresh: `replayed` and `offline`."""

    def add(self, pairs: Iterable[PreferencePair], counts: PairCounts) -> None:
        self.fresh += counts
        for pair in pairs:
            if pair.chosen_score is not None and pair.rejected_score is not None:
                self.margins += pair.chosen_score - pair.rejected_score
                self.scored += 1

    def summary(self) -> str:
        return self.fresh.summary() + "".join(f", {count:,} {name} added" for name, count in self.added.items())


def pair(run: IterativeRun, round: int, completions: Completions, judgments: Judgments) -> Pairs:
    """Preference pairs, as `pairing` says; a DataError if there is not one of the round's own."""
    section = run.config.pairing
    sampled = sampled_others(run, round)
    met = judged_against(run, round, completions, sampled) if section.against is not None else None
    others_digest = met.digest if met else sampled.digest if sampled else None
    step = run.dir.step(round, "pairs", inputs(run, round, judgments, others_digest))
    if (manifest := step.manifest()) is None:
        directory, tally = step.begin(), Tally()
        with run.progress.stage("pair", 0, "pairs") as stage:
            if met is None:
                batched = _of_one_policy(run, round, completions, judgments, sampled)
            else:
                batched = _against(run, round, completions, met, sampled)

            def fresh() -> Iterator[PreferencePair]:
                for pairs, counts in batched:
                    tally.add(pairs, counts)
                    yield from pairs
                    stage.to(tally.fresh.kept)

            write_pairs(
                directory,
                fresh(),
                further=_further(run, round, tally),
                summary=tally.summary,
                answers_alone=run.config.dpo.train_on == "answer",
            )
            stage.remark = tally.summary()
            if not tally.fresh.kept:
                raise DataError(_nothing(round, tally.fresh, met or judgments))
        manifest = step.finish(counts=_counts(run, round, tally))
    return Pairs.of(step.path, manifest)


def _of_one_policy(
    run: IterativeRun, round: int, completions: Completions, judgments: Judgments, sampled: Completions | None
) -> Iterator[tuple[list[PreferencePair], PairCounts]]:
    """Pairs of the policy's completions, or of one with another source's, some groups at a time."""
    section = run.config.pairing
    groups, others = (read_groups(completions.path, arrays=True) for _ in range(2))
    beside = None if section.other_side is None else other_completions(run, others, sampled)
    options = _options(run, round) | {"others_are": "chosen" if section.chosen_from else "rejected"}
    for some in batches(zip(groups, judgments, strict=True), AT_ONCE):
        of_batch = None if beside is None else list(itertools.islice(beside, len(some)))
        yield build_pairs(*zip(*some, strict=True), **options, others=of_batch)


def _against(
    run: IterativeRun, round: int, completions: Completions, met: Judgments, sampled: Completions | None
) -> Iterator[tuple[list[PreferencePair], PairCounts]]:
    """Pairs of a completion of the policy's and one of another source's, as the judge ranked them."""
    options = _options(run, round) | {"strategy": "best_worst"}
    groups = 0
    for some in batches(zip(against(run, completions, sampled), met, strict=True), AT_ONCE):
        groups += len(some)
        yield build_pairs(*zip(*some, strict=True), **options, second_is_other=True)
    without = completions.prompts - groups  # the others have no completion of the other source
    yield [], PairCounts(groups=without, unmatched=without)


def _options(run: IterativeRun, round: int) -> dict[str, Any]:
    """What `build_pairs` is told in every batch."""
    return {
        **run.config.pairing.model_dump(include=OPTIONS),
        "answers_alone": run.config.dpo.train_on == "answer",
        "by_reasoning": run.config.judge.sees == "completion",
        "seed": derive_seed(run.config.seed, round, "pair"),
    }


def _further(run: IterativeRun, round: int, tally: Tally) -> Iterator[pa.Table]:
    """Replayed and offline pairs, as many as the fresh ones call for: to be read once those are written."""
    section = run.config.pairing
    share = section.offline.share if section.offline else 0.0
    earlier = sum(_fresh(manifest) for _, manifest in _earlier_pairs(run, round))
    replayed, offline = further_pairs(tally.fresh.kept, replay=section.replay, offline=share, earlier=earlier)
    for name, tables in (
        ("replayed", _replayed(run, round, replayed)),
        ("offline", _offline(run, round, offline)),
    ):
        for table in tables:
            tally.added[name] += len(table)
            yield table


def _counts(run: IterativeRun, round: int, tally: Tally) -> dict[str, Any]:
    """The manifest's counts."""
    counts = asdict(tally.fresh)
    if tally.scored:
        counts["score_gap"] = tally.margins / tally.scored
        if (alarm := _gap_alarm(run, round, counts["score_gap"])) is not None:
            counts["alarms"] = [alarm]
    if run.config.pairing.replay or run.config.pairing.offline:
        counts |= {name: tally.added[name] for name in ("replayed", "offline")} | {"fresh": tally.fresh.kept}
        counts["kept"] += tally.added.total()
    return counts


def inputs(run: IterativeRun, round: int, judgments: Judgments, others: str | None = None) -> dict[str, Any]:
    """`others`: the digest of the other policy's completions, or of the judgments of both."""
    section = run.config.pairing.model_dump()
    if (source := run.config.pairing.other_side) is not None and source.model is not None:
        del section[run.config.pairing.other_key]["model"]  # a path; `others` says what is there
    if run.config.pairing.offline is not None:
        section["offline"] = {**section["offline"], "content": run.offline_content}
        del section["offline"]["path"], section["offline"]["split"]
    earlier = _earlier_pairs(run, round) if run.config.pairing.replay else []
    return {
        "pairing": section,
        "judgments": judgments.digest,
        "completions": judgments.completions,
        "seed": run.config.seed,
        **train_on_key(run),
        **({"sees": run.config.judge.sees} if run.config.judge.sees != "answer" else {}),
        **({"others": others} if others is not None else {}),
        **({"replayed": [manifest.digest for _, manifest in earlier]} if earlier else {}),
    }


def _earlier_pairs(run: IterativeRun, round: int) -> list[tuple[Path, Manifest]]:
    """The steps `pairs` of the rounds before."""
    paths = [run.dir.round_dir(t) / "pairs" for t in range(1, round)]
    return [(path, manifest) for path in paths if (manifest := read_manifest(path)) is not None]


def _fresh(pairs: Manifest) -> int:
    """How many of a round's pairs are its own."""
    return int(pairs.counts.get("fresh", pairs.counts["kept"]))


def _replayed(run: IterativeRun, round: int, number: int) -> Iterator[pa.Table]:
    """Pairs that were fresh in an earlier round. They come first in its file."""
    earlier = _earlier_pairs(run, round) if number else []
    for path, manifest in earlier:
        check_step(path, manifest)
    counts = [_fresh(manifest) for _, manifest in earlier]
    seed = derive_seed(run.config.seed, round, "replay")
    return drawn_rows([path / TRAIN for path, _ in earlier], counts, number, seed=seed)


def _offline(run: IterativeRun, round: int, number: int) -> Iterator[pa.Table]:
    """Pairs of the file `pairing.offline`."""
    data = run.config.pairing.offline
    if data is None or not number:
        return
    numbers = (position for position, _ in enumerate(_parsed(data)))
    positions = set(drawn(numbers, number, seed=derive_seed(run.config.seed, round, "offline")))
    raw = (pair for position, pair in enumerate(_parsed(data)) if position in positions)
    alone = run.config.dpo.train_on == "answer"
    account = Account(data.path)
    for some in batches(raw, ROW_GROUP):
        tokenized = tokenize_pairs(
            some,
            run.tokenizer,
            account,
            max_prompt_tokens=data.max_prompt_tokens,
            max_completion_tokens=data.max_completion_tokens,
            thinking=run.thinking,
            answers_alone=alone,
        )
        if tokenized:
            yield pairs_table(tokenized, answers_alone=alone, others=run.config.pairing.other_side is not None)
    if data.bad_rows == "error":
        account.check_rows("pairing.offline.bad_rows")


def _parsed(data: MixedDataConfig) -> Iterator[RawPair]:
    """All pairs of the file, in its order."""
    return itertools.chain.from_iterable(preferences_of(data).parsed())


def _gap_alarm(run: IterativeRun, round: int, gap: float) -> str | None:
    """What the sentinel `score_gap` says of the mean difference of scores in a round's pairs; None if it is content.

    Raises:
        DataError: it says something, and is to stop.
    """
    watch = run.config.dpo.sentinels
    first = read_manifest(run.dir.round_dir(1) / "pairs") if round > 1 else None
    before = first.counts.get("score_gap") if first is not None else None
    if watch.score_gap_action == "off" or before is None or gap >= watch.score_gap * before:
        return None
    said = (
        f"chosen and rejected differ by {gap:.3g} in their scores, in round 1 by {before:.3g}: they become alike "
        f"(dpo.sentinels.score_gap = {watch.score_gap:g})"
    )
    if watch.score_gap_action == "stop":
        raise DataError(
            f"round {round}: {said}. Take the rejected completion from an earlier policy (pairing.rejected_from), sample more "
            "completions a prompt, or set dpo.sentinels.score_gap_action to warn"
        )
    run.progress.say(f"  {'alarm':<9} {said}")
    return f"score_gap: {said}"


def train_on_key(run: OfflineRun) -> dict[str, Any]:
    """The part of completions that counts, if it is not all of them."""
    part = run.settings.dpo.train_on
    return {"train_on": part} if part != "completion" else {}


def _nothing(round: int, counts: PairCounts, judgments: Judgments) -> str:
    if counts.unmatched == counts.groups:
        return (
            f"round {round}: {counts.summary()}: nothing to train on. No prompt of the round has a completion in the column "
            "that section pairing names; fill it in"
        )
    flips = judgments.flip_rate
    order = f", whose verdict changed with the order in {flips:.0%} of the comparisons," if flips else ""
    return (
        f"round {round}: {counts.summary()}: nothing to train on. If completions tie, check the judge{order} or "
        "pairing.min_margin, or sample more completions per prompt (sampling.n, with --redo); if none was judged, see "
        f"the abstentions in {judgments.path}"
    )

"""(x, y_w, y_l): preference pairs from a round's completions and their judgments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from iterdpo.data.pairing import PairCounts, build_pairs
from iterdpo.data.pairs import write_pairs
from iterdpo.errors import DataError
from iterdpo.run.artifacts import Completions, Judgments, Pairs, read_groups
from iterdpo.seeds import derive_seed
from iterdpo.stages.runs import IterativeRun, OfflineRun, batches
from iterdpo.types import PreferencePair

AT_ONCE = 256
"""Groups in memory."""


def pair(run: IterativeRun, round: int, completions: Completions, judgments: Judgments) -> Pairs:
    """Preference pairs, as `pairing` says; a DataError if there is not one."""
    step = run.dir.step(round, "pairs", inputs(run, judgments))
    if (manifest := step.manifest()) is None:
        directory = step.begin()
        with run.progress.stage("pair", 0, "pairs") as stage:
            options = {
                **run.config.pairing.model_dump(),
                "answers_alone": run.config.dpo.train_on == "answer",
                "by_reasoning": run.config.judge.sees == "completion",
                "seed": derive_seed(run.config.seed, round, "pair"),
            }
            counts = PairCounts()

            def pairs() -> Iterator[PreferencePair]:
                nonlocal counts
                for some in batches(zip(read_groups(completions.path, arrays=True), judgments, strict=True), AT_ONCE):
                    found, more = build_pairs(*zip(*some, strict=True), **options)
                    counts += more
                    yield from found
                    stage.to(counts.kept)

            write_pairs(
                directory,
                pairs(),
                summary=lambda: counts.summary(),
                answers_alone=run.config.dpo.train_on == "answer",
            )
            stage.remark = counts.summary()
            if not counts.kept:
                raise DataError(_nothing(round, counts.summary(), judgments))
        manifest = step.finish(counts=asdict(counts))
    return Pairs.of(step.path, manifest)


def inputs(run: IterativeRun, judgments: Judgments) -> dict[str, Any]:
    return {
        "pairing": run.config.pairing.model_dump(),
        "judgments": judgments.digest,
        "completions": judgments.completions,
        "seed": run.config.seed,
        **train_on_key(run),
        **({"sees": run.config.judge.sees} if run.config.judge.sees != "answer" else {}),
    }


def train_on_key(run: OfflineRun) -> dict[str, Any]:
    """The part of completions that counts, if it is not all of them."""
    part = run.settings.dpo.train_on
    return {"train_on": part} if part != "completion" else {}


def _nothing(round: int, summary: str, judgments: Judgments) -> str:
    flips = judgments.flip_rate
    order = f", whose verdict changed with the order in {flips:.0%} of the comparisons," if flips else ""
    return (
        f"round {round}: {summary}: nothing to train on. If completions tie, check the judge{order} or "
        "pairing.min_margin, or sample more completions per prompt (sampling.n, with --redo); if none was judged, see "
        f"the abstentions in {judgments.path}"
    )

"""Pairs of a round: what decides them, and what is said if there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from iterdpo.data.pairs import TRAIN
from iterdpo.errors import DataError, StaleStepError
from iterdpo.run.artifacts import Completions, Judgments, Pairs, write_completion_shard, write_judgment_shard
from iterdpo.run.rundir import read_manifest
from iterdpo.stages.judge import judge
from iterdpo.stages.pair import inputs as pair_inputs
from iterdpo.stages.pair import pair
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import sample
from iterdpo.testing import make_group
from iterdpo.types import Comparison, CompletionGroup, Judgment
from tests.unit.stages.harness import PER_ROUND, Lengths, Room


def paired(run: IterativeRun) -> Pairs:
    completions = sample(run, 1, run.initial, run.prompts.of(1))
    return pair(run, 1, completions, judge(run, 1, completions, run.train_judge))


def key(run: IterativeRun) -> dict[str, Any]:
    return pair_inputs(run, 1, Judgments(run.dir.root, "b07a", "5c1e"))


def test_the_key_has_the_section_what_is_paired_and_the_seed(room: Room) -> None:
    assert key(room.open()) == {
        "pairing": {
            "strategy": "best_worst",
            "min_margin": 0.0,
            "max_pairs_per_prompt": None,
            "drop_truncated": False,
        },
        "judgments": "b07a",
        "completions": "5c1e",
        "seed": 0,
    }


def test_the_longer_is_chosen_by_a_judge_of_lengths(room: Room) -> None:
    pairs = paired(room.open())
    assert pairs.kept == PER_ROUND
    table = pq.read_table(pairs.path / TRAIN).to_pylist()
    assert [(row["chosen"], row["rejected"]) for row in table] == [("abab", "ab")] * PER_ROUND
    manifest = read_manifest(pairs.path)
    assert manifest is not None
    assert (manifest.counts["groups"], manifest.counts["kept"], manifest.counts["tied"]) == (PER_ROUND, PER_ROUND, 0)


def test_what_is_paired_is_not_paired_again(room: Room) -> None:
    first = paired(room.open())
    made = (first.path / TRAIN).stat().st_mtime_ns
    assert paired(room.open()) == first
    assert (first.path / TRAIN).stat().st_mtime_ns == made


def test_other_settings_are_refused_and_with_redo_the_old_goes_to_the_attic(room: Room) -> None:
    first = paired(room.open())
    with pytest.raises(StaleStepError, match=r"round-001/pairs was made with pairing\.min_margin = 0\.0"):
        paired(room.open(pairing={"min_margin": 1.0}))
    run = room.open(pairing={"min_margin": 1.0}, redo=True)
    assert paired(run).kept == PER_ROUND
    kept = read_manifest(run.dir.attic / "round-001" / "pairs")
    assert kept is not None
    assert kept.digest == first.digest


def test_nothing_to_train_on_is_an_error_that_says_what_to_check(room: Room) -> None:
    room.judge = Lengths(score=1.0)
    with pytest.raises(DataError, match=r"^round 1: kept 0 pairs of 6 groups \(6 tied\): nothing to train on"):
        paired(room.open())


def test_an_order_that_decides_is_named_if_there_is_nothing_to_train_on(room: Room) -> None:
    class Undecided(Lengths):
        """Prefers what it is shown first."""

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            met = [Comparison(0, 1, "first"), Comparison(1, 0, "first")]
            return [Judgment(g.prompt.id, [0.5, 0.5], [None, None], met) for g in groups]

    room.judge = Undecided()
    with pytest.raises(DataError, match="whose verdict changed with the order in 100% of the comparisons"):
        paired(room.open())


def test_a_stage_needs_two_records_and_a_folder_alone(room: Room, tmp_path: Path) -> None:
    groups = [make_group(f"Tale {i}", ["first", "second"]) for i in range(3)]
    sampled, scored = tmp_path / "sampled elsewhere", tmp_path / "scored elsewhere"
    sampled.mkdir()
    scored.mkdir()
    write_completion_shard(sampled / "shard-000000.parquet", groups)
    write_judgment_shard(
        scored / "shard-000000.jsonl", [Judgment(g.prompt.id, [2.0, 1.0], [None, None]) for g in groups]
    )
    completions = Completions(sampled, "5c1e", prompts=3, completions=6)
    pairs = pair(room.open(), 7, completions, Judgments(scored, "b07a", completions.digest))
    assert [(row["chosen"], row["rejected"]) for row in pq.read_table(pairs.path / TRAIN).to_pylist()] == [
        ("first", "second")
    ] * 3

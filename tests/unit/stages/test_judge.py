"""Judging a round: what decides its judgments, what is taken over from beside sampling, what is counted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgingStopped, StaleStepError
from iterdpo.judging.judge import RunJudge
from iterdpo.run.artifacts import Completions, Judgments, write_completion_shard
from iterdpo.run.rundir import read_manifest
from iterdpo.stages.judge import inputs, judge, retry_judgments
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import sample
from iterdpo.testing import make_group
from iterdpo.types import CompletionGroup, Judgment
from tests.unit.stages.harness import PER_ROUND, SHARD_SIZE, K, Lengths, Room


def sampled(run: IterativeRun) -> Completions:
    return sample(run, 1, run.initial, run.prompts.of(1))


def judged(run: IterativeRun) -> Judgments:
    return judge(run, 1, sampled(run), run.train_judge)


def counts_of(judgments: Judgments) -> dict[str, Any]:
    manifest = read_manifest(judgments.path)
    assert manifest is not None
    return manifest.counts


def test_the_key_has_the_judge_and_the_completions(room: Room) -> None:
    run = room.open()
    assert inputs("5c1e", run.train_judge) == {"judge": {"use": "lengths", "version": "1"}, "completions": "5c1e"}


def test_every_completion_is_scored_shard_by_shard(room: Room) -> None:
    run = room.open()
    completions, judgments = sampled(run), judged(run)
    assert judgments.completions == completions.digest
    assert [(j.prompt_id, j.scores) for j in judgments] == [(g.prompt.id, [2.0, 4.0]) for g in completions]
    assert [len(groups) for groups in room.judge.asked] == [SHARD_SIZE, PER_ROUND - SHARD_SIZE]


def test_counts_are_of_all_that_was_judged(room: Room) -> None:
    counts = counts_of(judged(room.open()))
    assert (counts["completions"], counts["unjudged"], counts["abstentions"]) == (K * PER_ROUND, 0, {})
    assert counts["metrics"]["longer_wins"] == 1.0


def test_what_is_judged_is_not_judged_again(room: Room) -> None:
    first = judged(room.open())
    room.judge.asked.clear()
    assert judged(room.open()) == first
    assert room.judge.asked == []


def test_another_judge_is_refused_and_with_redo_the_old_goes_to_the_attic(room: Room) -> None:
    first = judged(room.open())
    with pytest.raises(StaleStepError, match=r"round-001/judgments was made with judge\.version = \"1\""):
        judged(room.open(version="2"))
    room.judge = Lengths(score=1.0)
    room.sampler.asked.clear()
    run = room.open(version="2", redo=True)
    assert [j.scores for j in judged(run)] == [[1.0, 1.0]] * PER_ROUND
    assert room.sampler.asked == []  # completions stay
    kept = read_manifest(run.dir.attic / "round-001" / "judgments")
    assert kept is not None
    assert kept.digest == first.digest


def test_what_was_judged_beside_sampling_is_taken_over(room: Room) -> None:
    room.judge = Lengths(needs_device=False)
    run = room.open()
    streaming = run.streaming_judge(1)
    completions = sample(run, 1, run.initial, run.prompts.of(1), streaming)
    judgments = judge(run, 1, completions, run.train_judge, streaming)
    assert [len(groups) for groups in room.judge.asked] == [SHARD_SIZE, PER_ROUND - SHARD_SIZE]
    assert [j.prompt_id for j in judgments] == [g.prompt.id for g in completions]
    assert sorted(p.name for p in judgments.path.glob("shard-*")) == ["shard-000000.jsonl", "shard-000001.jsonl"]
    assert not (run.dir.round_dir(1) / "judgments.streaming").exists()
    manifest = read_manifest(judgments.path)
    assert manifest is not None
    assert manifest.seconds["streamed"] >= 0


def test_judgments_are_the_same_whether_or_not_they_were_made_beside_sampling(room: Room) -> None:
    run = room.open()
    plain = judged(run)
    shutil.rmtree(run.dir.root)
    room.judge = Lengths(needs_device=False)
    run = room.open()
    streaming = run.streaming_judge(1)
    completions = sample(run, 1, run.initial, run.prompts.of(1), streaming)
    assert judge(run, 1, completions, run.train_judge, streaming) == plain


def test_what_an_earlier_start_judged_beside_sampling_is_taken_over(room: Room) -> None:
    room.judge = Lengths(needs_device=False)
    run = room.open()
    streaming = run.streaming_judge(1)
    sample(run, 1, run.initial, run.prompts.of(1), streaming)
    streaming.join()
    room.judge.asked.clear()
    run = room.open()  # the process ended before the stage was done
    judge(run, 1, sampled(run), run.train_judge, run.streaming_judge(1))
    assert room.judge.asked == []


class Broken(Lengths):
    """Abstains on the longer completion."""

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [Judgment(j.prompt_id, [2.0, None], [None, "down"]) for j in super().judge(groups)]


def test_a_stage_that_the_budget_stopped_goes_on_with_what_abstained(room: Room) -> None:
    healthy, room.judge = room.judge, Broken()
    run = room.open()
    limited = RunJudge(replace(run.train_judge.named, max_abstained=0.1), run.dir.root, run.waiting)
    with pytest.raises(JudgingStopped, match=r"4 of 8 completions(?s:.*)down"):
        judge(run, 1, sampled(run), limited)
    assert len(room.judge.asked) == 1
    room.judge = healthy
    assert [j.scores for j in judged(room.open())] == [[2.0, 4.0]] * PER_ROUND


def test_a_retry_judges_again_what_abstained_and_keeps_the_old(room: Room) -> None:
    healthy, room.judge = room.judge, Broken()
    before = judged(room.open())
    assert counts_of(before)["abstentions"] == {"down": PER_ROUND}
    room.judge = healthy
    run = room.open()
    was, now = retry_judgments(run, 1)
    assert (was.counts["unjudged"], now.counts["unjudged"]) == (PER_ROUND, 0)
    assert [j.scores for j in judged(room.open())] == [[2.0, 4.0]] * PER_ROUND
    kept = read_manifest(run.dir.attic / "round-001" / "judgments")
    assert kept is not None
    assert kept.digest == before.digest


def test_what_a_judge_used_is_in_the_counts_of_its_stage_alone(room: Room) -> None:
    class Metered(Lengths):
        def usage(self) -> dict[str, float]:
            return {"calls": 24.0 + sum(len(groups) for groups in self.asked)}

    room.judge = Metered()
    room.judge.asked.append([])
    assert counts_of(judged(room.open()))["usage"] == {"calls": PER_ROUND}


def test_a_stage_needs_a_record_and_a_folder_alone(room: Room, tmp_path: Path) -> None:
    elsewhere = tmp_path / "sampled elsewhere"
    elsewhere.mkdir()
    write_completion_shard(elsewhere / "shard-000000.parquet", [make_group("Tale 1", ["a", "bb"])])
    run = room.open()
    judgments = judge(run, 7, Completions(elsewhere, "5c1e", prompts=1, completions=2), run.train_judge)
    assert judgments.completions == "5c1e"
    assert [j.scores for j in judgments] == [[1.0, 2.0]]
    assert room.sampler.asked == []


def test_judgments_of_a_run_open_with_load_dataset(room: Room, tmp_path: Path) -> None:
    import datasets

    path = judged(room.open()).path
    rows = datasets.load_dataset(str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["scores"][:] == [[2.0, 4.0]] * PER_ROUND

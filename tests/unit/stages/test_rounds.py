"""Rounds between the extremes: the dial, evaluations every few rounds, the learning rate over rounds, the gap of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from flows.loop import run_round
from flows.serving import overridden
from flows.verify import verify
from iterdpo.config import Config
from iterdpo.errors import DataError
from iterdpo.run.rundir import read_manifest
from iterdpo.stages.plan import first_pending
from iterdpo.stages.runs import IterativeRun
from iterdpo.types import CompletionGroup, Judgment
from tests.unit.stages.harness import PER_ROUND, STAGES, Lengths, Room, finish


def evaluated(run: IterativeRun) -> list[int]:
    return [t for t in run.dir.rounds() if (run.dir.round_dir(t) / "evaluation").exists()]


def test_rounds_without_an_evaluation_are_promoted_without_a_gate_and_say_so(room: Room) -> None:
    run = room.open(rounds=5, evaluation={"every": 2})
    records = finish(run)
    assert evaluated(run) == [0, 2, 4, 5]  # and the last
    assert [record.decision for record in records] == ["promote"] * 6
    assert records[1].reason == "not evaluated, so without a gate (evaluation.every = 2)"
    assert records[1].policy_round == 1
    assert "win_rate/vs_initial" not in records[1].metrics
    step = read_manifest(run.dir.round_dir(4) / "evaluation")
    two = read_manifest(run.dir.round_dir(2) / "evaluation")
    assert step is not None
    assert two is not None
    assert step.inputs["baselines"]["previous"] == two.digest
    assert first_pending(run) is None
    assert not verify(run.dir.root).problems


def test_rounds_added_later_leave_the_evaluation_of_the_former_last_round(room: Room) -> None:
    finish(room.open(rounds=3, evaluation={"every": 2}))
    run = room.open(rounds=5, evaluation={"every": 2})
    assert first_pending(run) == "round-004/completions"
    finish(run)
    assert evaluated(run) == [0, 2, 3, 4, 5]


def test_an_evaluation_under_way_is_finished_if_rounds_are_added(room: Room) -> None:
    run = room.open(rounds=3, evaluation={"every": 2})
    finish(run)
    step = run.dir.round_dir(3) / "evaluation"
    step.rename(step.with_name("evaluation.partial"))  # as --redo leaves it if it is killed
    assert room.open(rounds=5, evaluation={"every": 2}).evaluates(3)


def test_evaluating_every_round_afterwards_evaluates_and_decides_those_that_were_not(room: Room) -> None:
    finish(room.open(rounds=2, evaluation={"every": 2}))
    run = room.open(rounds=2)
    assert first_pending(run) == "round-001/evaluation"
    record = run_round(run, 1, STAGES)
    assert (record.decision, record.gate) == ("promote", run.config.gate.model_dump())


def test_a_refused_candidate_gives_way_to_the_policy_that_was_evaluated_last(room: Room) -> None:
    run = room.open(rounds=5, evaluation={"every": 3}, gate={"metric": "win_rate/vs_initial", "minimum": 0.9})
    records = finish(run)
    assert [(r.decision, r.policy_round) for r in records] == [
        ("promote", 0),
        ("promote", 1),
        ("promote", 2),
        ("keep", 0),
        ("promote", 4),
        ("keep", 0),
    ]


def test_a_trigger_adds_rounds_of_the_same_number_of_steps(room: Room) -> None:
    sections = {**room.sections, "prompts": {"path": "prompts.jsonl"}, "run_dir": str(room.root / "run")}
    config = Config.model_validate({**sections, "steps_per_round": 3, "total_steps": 12})
    more = overridden(config, 7, {})
    assert (more.rounds, more.total_steps, more.prompts.per_round) == (7, 21, 24)


def test_the_learning_rate_of_a_round_is_in_its_key_and_in_no_others(room: Room) -> None:
    over_rounds = {"schedule": "linear", "rounds": 3, "final": 0.5}
    run = room.open(rounds=2, dpo={"learning_rate": 4e-5, "learning_rate_over_rounds": over_rounds})
    finish(run)
    keys = [read_manifest(run.dir.round_dir(t) / "policy") for t in (1, 2)]
    assert [key.inputs["dpo"]["learning_rate"] for key in keys if key] == [4e-5, pytest.approx(3e-5)]
    assert all("learning_rate_over_rounds" not in key.inputs["dpo"] for key in keys if key)
    assert first_pending(room.open(rounds=1, dpo={"learning_rate": 4e-5})) is None  # round 1 has the whole rate


class Converging(Lengths):
    """Two completions differ by 1 in the first round, then by a fifth of it."""

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        found, pairs = [], sum(len(g.completions) == 2 for asked in self.asked for g in asked)
        for j in super().judge(groups):
            gap = 1.0 if pairs < PER_ROUND else 0.2
            found.append(replace(j, scores=[0.0, gap]) if len(j.scores) == 2 else j)
            pairs += len(j.scores) == 2
        return found


def test_pairs_whose_scores_become_alike_raise_an_alarm_that_is_counted(room: Room) -> None:
    room.judge = Converging()
    records = finish(room.open(rounds=3))
    assert [r.metrics.get("pairs/score_gap") for r in records[1:]] == pytest.approx([1.0, 0.2, 0.2])
    assert [r.metrics["alarms"] for r in records[1:]] == [0, 1, 1]
    manifest = read_manifest(room.open(rounds=3).dir.round_dir(2) / "pairs")
    assert manifest is not None
    assert manifest.counts["alarms"] == [
        "score_gap: chosen and rejected differ by 0.2 in their scores, in round 1 by 1: they become alike "
        "(dpo.sentinels.score_gap = 0.25)"
    ]


@pytest.mark.parametrize(("action", "gap"), [("off", 0.25), ("warn", 0.1)])
def test_a_gap_that_is_wide_enough_or_not_watched_is_no_alarm(room: Room, action: str, gap: float) -> None:
    room.judge = Converging()
    watch = {"score_gap": gap, "score_gap_action": action}
    assert [r.metrics["alarms"] for r in finish(room.open(dpo={"sentinels": watch}))[1:]] == [0, 0]


def test_a_gap_may_stop_the_run_before_training(room: Room) -> None:
    room.judge = Converging()
    run = room.open(dpo={"sentinels": {"score_gap_action": "stop"}})
    with pytest.raises(DataError, match=r"round 2: chosen and rejected differ by 0\.2 .*pairing\.rejected_from"):
        finish(run)
    assert not (run.dir.round_dir(2) / "policy").exists()
    assert len(finish(room.open())) == 3  # the settings of sentinels are no inputs

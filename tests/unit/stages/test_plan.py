"""What of a run is not done yet: the plan follows the loop step by step, and changes nothing on disk."""

from __future__ import annotations

from typing import Any

import pytest

from flows.loop import run_loop, run_round
from iterdpo.errors import StaleStepError
from iterdpo.stages.evaluate import evaluate
from iterdpo.stages.gate import gate
from iterdpo.stages.judge import judge
from iterdpo.stages.pair import pair
from iterdpo.stages.plan import first_pending
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import sample
from iterdpo.stages.train import reference_policy
from iterdpo.types import RoundRecord
from tests.unit.stages.harness import STAGES, Lengths, Room, tree, without_training


def pending(run: IterativeRun) -> str | None:
    """`first_pending`, which changes nothing."""
    before = tree(run.dir.root)
    found = first_pending(run)
    assert tree(run.dir.root) == before
    return found


def finish(run: IterativeRun) -> list[RoundRecord]:
    with run.dir.lock():
        return list(run_loop(run, lambda t: run_round(run, t, STAGES)))


@pytest.fixture
def finished(room: Room) -> Room:
    """A run of one round, complete."""
    finish(room.open(rounds=1))
    return room


def test_of_a_run_that_has_not_begun_everything_is_pending_and_nothing_is_made(room: Room) -> None:
    run = room.open()
    assert first_pending(run) == "round-000/evaluation"
    assert not run.dir.root.exists()


def test_a_run_is_followed_step_by_step(room: Room) -> None:
    run, seen = room.open(dpo={"reference": "ema"}), []

    def note() -> None:
        seen.append(pending(run))

    initial = evaluate(run, 0, run.initial, {})
    note()
    gate(run, 0, initial, run.initial, None)
    policy = run.initial
    for t in (1, 2):
        note()
        completions = sample(run, t, policy, run.prompts.of(t))
        note()
        judgments = judge(run, t, completions, run.train_judge)
        note()
        pairs = pair(run, t, completions, judgments)
        note()
        reference = reference_policy(run, t, policy)
        if t > 1:
            note()
        candidate = without_training(run, t, pairs, policy, reference)
        note()
        evaluation = evaluate(run, t, candidate, run.baselines(t, policy))
        note()
        gate(run, t, evaluation, candidate, policy)
        policy = candidate
    note()
    assert seen == [
        "round-000/round.json",
        "round-001/completions",
        "round-001/judgments",
        "round-001/pairs",
        "round-001/policy",
        "round-001/evaluation",
        "round-001/round.json",
        "round-002/completions",
        "round-002/judgments",
        "round-002/pairs",
        "round-002/ema",
        "round-002/policy",
        "round-002/evaluation",
        "round-002/round.json",
        None,
    ]


def test_of_a_run_that_is_complete_nothing_is_pending_and_nothing_is_loaded(finished: Room) -> None:
    def fails(*_: Any) -> Any:
        raise AssertionError("loaded")

    finished.sampler.load = fails  # type: ignore[method-assign]
    finished.judge.judge = fails  # type: ignore[method-assign]
    assert pending(finished.open(rounds=1)) is None
    assert pending(finished.open(rounds=2)) == "round-002/completions"


def test_a_step_that_is_under_way_is_pending(room: Room) -> None:
    class Interrupted(Lengths):
        def judge(self, groups: Any) -> Any:
            raise KeyboardInterrupt

    room.judge = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        finish(room.open())
    assert pending(room.open()) == "round-000/evaluation"


def test_after_a_round_that_stopped_the_run_nothing_is_pending(room: Room) -> None:
    changes: dict[str, Any] = {"gate": {"minimum": 1.0, "otherwise": "stop"}}
    assert [record.decision for record in finish(room.open(**changes))] == ["promote", "stop"]
    assert pending(room.open(**changes)) is None


CHANGES = [
    ({"sampling": {"max_tokens": 8}}, "round-000/evaluation"),
    ({"version": "2"}, "round-000/evaluation"),
    ({"pairing": {"min_margin": 1.0}}, "round-001/pairs"),
    ({"dpo": {"beta": 0.5}}, "round-001/policy"),
    ({"gate": {"minimum": 1.0}}, "round-000/round.json"),
]


@pytest.mark.parametrize(("changes", "step"), CHANGES)
def test_what_was_made_with_other_settings_is_refused(finished: Room, changes: dict[str, Any], step: str) -> None:
    run = finished.open(rounds=1, **changes)
    before = tree(run.dir.root)
    with pytest.raises(StaleStepError, match=rf"^({step}|round 0) was made with"):
        first_pending(run)
    assert tree(run.dir.root) == before


@pytest.mark.parametrize(("changes", "step"), CHANGES)
def test_with_redo_the_first_step_that_changed_is_pending_and_stays_in_its_place(
    finished: Room, changes: dict[str, Any], step: str
) -> None:
    run = finished.open(rounds=1, redo=True, **changes)
    assert pending(run) == step
    finish(run)
    assert pending(finished.open(rounds=1, **changes)) is None
    assert pending(finished.open(rounds=1, redo=True, **changes)) is None

"""The gate seals a round: what decides, what is refused, what is decided again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import StaleStepError
from iterdpo.run.artifacts import Evaluation, PolicyCheckpoint
from iterdpo.run.rundir import read_json, read_jsonl, write_json
from iterdpo.stages.evaluate import inputs as evaluate_inputs
from iterdpo.stages.gate import decision_record, gate
from iterdpo.stages.runs import IterativeRun
from iterdpo.types import RoundRecord
from tests.unit.stages.harness import Room, tree

GATE = {"metric": "win_rate/vs_previous", "minimum": 0.5}


def evaluated(run: IterativeRun, round: int, **metrics: float) -> Evaluation:
    """An evaluation that ended with these metrics."""
    step = run.dir.step(round, "evaluation", evaluate_inputs(run, run.initial, {}))
    if step.manifest() is None:
        write_json(step.begin() / "metrics.json", {f"win_rate/{name}": value for name, value in metrics.items()})
        step.finish()
    manifest = step.manifest()
    assert manifest is not None
    return Evaluation(step.path, manifest.digest, round)


def candidate_of(run: IterativeRun) -> PolicyCheckpoint:
    return PolicyCheckpoint(run.dir.round_dir(1) / "policy", "81f0", 1)


def sealed(run: IterativeRun, win_rate: float = 0.6) -> RoundRecord:
    gate(run, 0, evaluated(run, 0), run.initial, None)
    return gate(run, 1, evaluated(run, 1, vs_previous=win_rate), candidate_of(run), run.initial)


def test_round_0_promotes_the_initial_policy(room: Room) -> None:
    run = room.open(gate=GATE)
    record = gate(run, 0, evaluated(run, 0), run.initial, None)
    assert (record.decision, record.reason) == ("promote", "the initial policy")
    assert (record.policy, record.policy_round, record.policy_digest) == (
        str(run.model_path),
        0,
        run.initial.digest,
    )
    assert run.dir.record(0) == record


@pytest.mark.parametrize(
    ("win_rate", "otherwise", "decision", "policy_round"),
    [(0.6, "keep", "promote", 1), (0.4, "keep", "keep", 0), (0.4, "stop", "stop", 0)],
)
def test_the_record_has_the_policy_that_the_next_round_starts_from(
    room: Room, win_rate: float, otherwise: str, decision: str, policy_round: int
) -> None:
    run = room.open(gate={**GATE, "otherwise": otherwise})
    record = sealed(run, win_rate)
    assert (record.decision, record.policy_round) == (decision, policy_round)
    assert record.policy == ("round-001/policy" if policy_round else str(run.model_path))
    assert (record.metrics["gate/decision"], record.metrics["gate/reason"]) == (decision, record.reason)
    assert record.gate == run.config.gate.model_dump()


def test_a_sealed_round_is_on_disk_with_what_follows_from_it(room: Room) -> None:
    run = room.open(gate=GATE)
    record = sealed(run)
    assert RoundRecord(**read_json(run.dir.round_dir(1) / "round.json")) == record
    assert [row["round"] for row in read_jsonl(run.dir.root / "metrics.jsonl")] == [0, 1]
    assert os.readlink(run.dir.root / "policy") == "round-001/policy"


def test_deciding_is_pure(room: Room) -> None:
    run = room.open(gate=GATE)
    gate(run, 0, evaluated(run, 0), run.initial, None)
    evaluated(run, 1, vs_previous=0.6)
    before = tree(run.dir.root)
    records = [decision_record(run, 1, candidate_of(run), run.initial) for _ in range(2)]
    assert records[0] == records[1]
    assert records[0].decision == "promote"
    assert tree(run.dir.root) == before
    assert run.dir.record(1) is None


def test_a_round_that_is_sealed_is_not_sealed_again(room: Room) -> None:
    first = sealed(room.open(gate=GATE))
    run = room.open(gate=GATE)
    initial, _, _ = run.initial, run.added_stops, run.tags  # each is noted once
    before = tree(run.dir.root)
    assert sealed(run) == first
    assert tree(run.dir.root) == before
    assert run.initial == initial


def test_other_settings_are_refused_and_with_redo_the_gate_decides_again(room: Room) -> None:
    assert sealed(room.open(gate=GATE)).decision == "promote"
    stricter: dict[str, Any] = {**GATE, "minimum": 0.9}
    with pytest.raises(StaleStepError, match=r"round 1 was made with gate\.minimum = 0\.5"):
        decision_record(room.open(gate=stricter), 1, candidate_of(room.open()), room.open().initial)
    run = room.open(gate=stricter, redo=True)
    assert sealed(run).decision == "keep"
    assert Path(os.readlink(run.dir.root / "policy")) == run.model_path
    assert not (run.dir.root / "attic").exists()  # the evaluations stay

"""The gate seals a round: what decides, what is refused, what is decided again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.loop import run_loop, run_round
from iterdpo.errors import StaleStepError
from iterdpo.report.headline import headline
from iterdpo.run.artifacts import Evaluation, Pairs, PolicyCheckpoint
from iterdpo.run.read import read_run
from iterdpo.run.rundir import read_json, read_jsonl, write_json
from iterdpo.stages.evaluate import inputs as evaluate_inputs
from iterdpo.stages.gate import decision_record, gate
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.train import inputs as train_inputs
from iterdpo.types import CompletionGroup, Judgment, RoundRecord
from tests.unit.stages.harness import STAGES, Lengths, Room, tree

PAIRS = Pairs(Path("pairs"), "9d20", kept=24)
GATE: dict[str, Any] = {"metric": "win_rate/vs_previous", "minimum": 0.5}


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


def rounds_of(run: IterativeRun, **metrics: list[float]) -> list[RoundRecord]:
    """Rounds 1, 2, … whose evaluations ended with these metrics; a policy is a directory of that name."""
    records = [gate(run, 0, evaluated(run, 0), run.initial, None)]
    for t, values in enumerate(zip(*metrics.values(), strict=True), 1):
        before = records[-1]
        previous = PolicyCheckpoint(run.dir.root / before.policy, before.policy_digest, before.policy_round)
        candidate = PolicyCheckpoint(run.dir.round_dir(t) / "policy", f"81f{t}", t)
        evaluation = evaluated(run, t, **dict(zip(metrics, values, strict=True)))
        records.append(gate(run, t, evaluation, candidate, previous))
    return records


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


def test_a_record_has_how_each_rule_turned_out_and_one_of_a_gate_without_rules_has_none(room: Room) -> None:
    assert sealed(room.open(gate=GATE)).checks == []
    gated = {**GATE, "rules": [{"metric": "win_rate/vs_initial", "minimum": 0.7, "otherwise": "stop"}]}
    run = room.open(gate=gated, redo=True)
    record = sealed(run)
    assert (record.decision, record.reason) == ("stop", "win_rate/vs_initial was not measured; the run ends")
    assert [(check["metric"], check["holds"]) for check in record.checks] == [
        ("win_rate/vs_previous", True),
        ("win_rate/vs_initial", False),
    ]
    assert run.dir.record(1) == record == decision_record(run, 1, candidate_of(run), run.initial)


def test_a_lowered_learning_rate_is_that_of_the_next_policies_and_comes_from_the_records(room: Room) -> None:
    gated = {**GATE, "otherwise": "lower_learning_rate", "learning_rate_factor": 0.25}
    run = room.open(gate=gated, dpo={"learning_rate": 1e-3})
    records = rounds_of(run, vs_previous=[0.4, 0.6, 0.4])
    assert [record.decision for record in records[1:]] == ["lower_learning_rate", "promote", "lower_learning_rate"]
    assert [run.learning_rate(t) for t in range(1, 5)] == [1e-3, 2.5e-4, 2.5e-4, 6.25e-5]
    keys = [train_inputs(run, t, PAIRS, run.initial, run.initial)["dpo"]["learning_rate"] for t in (1, 2, 4)]
    assert keys == [1e-3, 2.5e-4, 6.25e-5]
    assert room.open(gate=gated, dpo={"learning_rate": 1e-3}).learning_rate(4) == 6.25e-5


def test_patience_counts_the_rounds_on_disk(room: Room) -> None:
    records = rounds_of(room.open(gate={**GATE, "patience": 2}), vs_previous=[0.6, 0.4, 0.3])
    assert [record.decision for record in records[1:]] == ["promote", "keep", "stop"]
    assert records[-1].reason.endswith("the run ends after 2 rounds without a promotion")
    assert records[-1].policy_round == 1


class Counting(Lengths):
    """Scores are how often the text has `mark`, minus the exclamation marks beyond four with `fussy`."""

    def __init__(self, mark: str, *, fussy: bool = False) -> None:
        super().__init__()
        self.mark, self.fussy = mark, fussy

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        def score(text: str) -> float:
            return text.count(self.mark) - max(0.0, text.count("!") - 4) * self.fussy

        return [Judgment(g.prompt.id, [score(c.text) for c in g.completions], [None, None]) for g in groups]


def test_a_judge_that_likes_exclamation_marks_is_found_out_and_the_best_round_is_kept(room: Room) -> None:
    """The policy of round t writes 2t exclamation marks, and a good word more in rounds 1 and 2."""

    def reply(ids: list[int], k: int) -> str:
        round = len(dict.fromkeys(room.sampler.loaded)) - 1
        return "ok " * min(round + 1, 3) + "!" * (2 * round + k)

    room.judge, room.sampler.reply = Counting("!"), reply
    rules = [{"metric": "judges/gap", "maximum": 0.3, "otherwise": "stop"}]
    run = room.open(
        rounds=6,
        heldout_judge=Counting("ok", fussy=True),
        sampling={"max_tokens": 40},
        evaluation={"n": 2},
        gate={**GATE, "otherwise": "keep", "rules": rules},
    )
    with run.dir.lock():
        run.dir.write_config(run.config.model_dump() | {"evaluation": {"judge": {"use": "other"}}})
        records = list(run_loop(run, lambda t: run_round(run, t, STAGES)))
    assert [record.decision for record in records] == ["promote", "promote", "promote", "stop"]
    assert os.readlink(run.dir.root / "policy") == "round-002/policy"
    scores = [[r.metrics[f"score/{judge}_judge"] for r in records] for judge in ("train", "heldout")]
    assert scores[0] == [0.5, 2.5, 4.5, 6.5]
    assert scores[1] == [1.0, 2.0, 2.5, 0.5]
    said = headline(read_run(run.dir.root))
    assert said.startswith("The gate stopped the run in round 3 of 6: judges/gap 0.750 is above 0.3.")
    assert "the candidate exploits the training judge's errors." in said


def test_the_link_is_to_the_best_promoted_round_and_the_next_round_is_compared_with_it(room: Room) -> None:
    run = room.open(gate={"metric": "win_rate/vs_initial", "minimum": 0.5})
    records = rounds_of(run, vs_initial=[0.6, 0.8, 0.7])
    assert [record.policy_round for record in records] == [0, 1, 2, 3]
    assert os.readlink(run.dir.root / "policy") == "round-002/policy"
    last = PolicyCheckpoint(run.dir.root / "round-003" / "policy", "81f3", 3)
    assert {name: e.round for name, e in run.baselines(4, last).items()} == {"initial": 0, "previous": 3, "best": 2}
    second = PolicyCheckpoint(run.dir.root / "round-002" / "policy", "81f2", 2)
    assert {name: e.round for name, e in run.baselines(3, second).items()} == {"initial": 0, "previous": 2}

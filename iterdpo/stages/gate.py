"""Promote, keep or stop: a round is sealed with its metrics and the policy that the next round starts from."""

from __future__ import annotations

from typing import Any

from iterdpo.errors import StaleStepError
from iterdpo.gate import Decision, decide
from iterdpo.report.metrics import round_metrics
from iterdpo.run.artifacts import Evaluation, PolicyCheckpoint
from iterdpo.run.rundir import differing_keys
from iterdpo.stages.runs import IterativeRun, OfflineRun
from iterdpo.types import RoundRecord


def gate(
    run: IterativeRun,
    round: int,
    evaluation: Evaluation | None,
    candidate: PolicyCheckpoint,
    previous: PolicyCheckpoint | None,
) -> RoundRecord:
    """Seal the round. `previous` is the policy that was evaluated last; round 0 has none, and promotes the initial one.

    A round without an evaluation is promoted.
    """
    assert evaluation is None or evaluation.round == round
    record = decision_record(run, round, candidate, previous)
    if run.dir.record(round) != record:
        run.dir.write_record(record)
    run.trackers.round(record)
    return record


def decision_record(
    run: IterativeRun, round: int, candidate: PolicyCheckpoint, previous: PolicyCheckpoint | None
) -> RoundRecord:
    """The record that the round's finished steps and the gate's settings give.

    A StaleStepError if the round was sealed with other settings of the gate.
    """
    evaluated = round == 0 or run.evaluates(round)
    settings = gate_settings(run)
    known = run.dir.record(round)
    if known is not None and not run.dir.redo:
        differing = differing_keys({"gate": known.gate}, {"gate": settings})
        if differing:
            raise StaleStepError(f"round {round}", differing)
    metrics = round_metrics(run.dir, round)
    if previous is None:
        decision = Decision("promote", "the initial policy")
    elif evaluated:
        decision = decide(metrics, **settings, earlier=run.records_before(round))
    else:
        every = run.config.evaluation.every
        decision = Decision("promote", f"not evaluated, so without a gate (evaluation.every = {every})")
        metrics["gate/evaluated"] = False
    kept = candidate if previous is None or decision.action == "promote" else previous
    return round_record(run, round, decision, kept, settings, metrics)


def gate_settings(run: IterativeRun) -> dict[str, Any]:
    """The section `gate`, with the budget of the benchmarks as its last rule."""
    settings, benchmarks = run.config.gate.model_dump(), run.config.evaluation.benchmarks
    if benchmarks is None or benchmarks.max_loss is None:
        return settings
    budget = {"metric": "benchmark/max_loss", "maximum": benchmarks.max_loss, "otherwise": settings["otherwise"]}
    return {**settings, "rules": [*settings.get("rules", []), budget]}


def round_record(
    run: OfflineRun,
    round: int,
    decision: Decision,
    kept: PolicyCheckpoint,
    settings: dict[str, Any],
    metrics: dict[str, Any],
) -> RoundRecord:
    """The record of a round that ended with `decision` and left the policy `kept`."""
    path = kept.path
    if path.is_relative_to(run.dir.root):
        path = path.relative_to(run.dir.root)
    metrics = metrics | {"gate/decision": decision.action, "gate/reason": decision.reason}
    checks = [check._asdict() for check in decision.checks] if settings.get("rules") else []
    return RoundRecord(
        round, decision.action, decision.reason, str(path), kept.round, kept.digest, settings, metrics, checks
    )

"""The policy that a round's loss is regularised towards, as `dpo.reference` says."""

from __future__ import annotations

from collections.abc import Iterator

from iterdpo.run.artifacts import PolicyCheckpoint
from iterdpo.run.rundir import Step
from iterdpo.stages.runs import IterativeRun


def reference_policy(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> PolicyCheckpoint:
    """The reference of `round`, which starts from `policy`. With `ema` the average of the checkpoints is made here."""
    dpo = run.config.dpo
    match dpo.reference:
        case "initial":
            return run.initial
        case "periodic":
            renewed = round - (round - 1) % dpo.reference_every
            return run.policy_after(renewed - 1)
        case "ema":
            return _average(run, round, policy)
    return policy


def reference_steps(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> Iterator[Step]:
    """The steps that `reference_policy` takes: with `ema`, the average of the round, if it is new; those of earlier rounds are done."""
    if run.config.dpo.reference == "ema" and round > 1:
        before = run.policy_after(round - 2)
        step = _step(run, round, policy, _average(run, round - 1, before))
        if step is not None:
            yield step


def _average(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> PolicyCheckpoint:
    """EMA_1 = pi_1, EMA_t = decay EMA_{t-1} + (1 - decay) pi_t, over the weights of the policies rounds started from."""
    if round == 1:
        return policy
    before = _average(run, round - 1, run.policy_after(round - 2))
    step = _step(run, round, policy, before)
    if step is None:
        return policy
    if (manifest := step.manifest()) is None:
        from iterdpo.training.models import average_checkpoints

        with run.progress.stage("average", 1, "checkpoint") as stage:
            decay = run.config.dpo.reference_decay
            run.check(before, policy)
            average_checkpoints(before.path, policy.path, decay=decay, output=step.begin())
            stage.to(1)
        manifest = step.finish()
    return PolicyCheckpoint(step.path, manifest.digest, round)


def _step(run: IterativeRun, round: int, policy: PolicyCheckpoint, before: PolicyCheckpoint) -> Step | None:
    """The step that averages; None if the two are one policy."""
    if before.digest == policy.digest:
        return None
    inputs = {"before": before.digest, "policy": policy.digest, "decay": run.config.dpo.reference_decay}
    return run.dir.step(round, "ema", inputs)

"""What of a run is not done yet, from the keys of its steps alone. Does nothing, and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator

from iterdpo.run.artifacts import Completions, Judgments, Pairs, PolicyCheckpoint
from iterdpo.run.rundir import Manifest, Step
from iterdpo.stages.evaluate import evaluate_step
from iterdpo.stages.gate import decision_record
from iterdpo.stages.judge import judge_step
from iterdpo.stages.pair import pair_step
from iterdpo.stages.reference import reference_policy, reference_steps
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import sample_step
from iterdpo.stages.train import train_step


def first_pending(run: IterativeRun) -> str | None:
    """The first step of the run that is not done, such as `round-002/pairs`; None if the run is complete.

    Raises:
        StaleStepError: a step on disk was made with other settings.
    """
    for round in range(run.config.rounds + 1):
        if (pending := first_pending_of(run, round)) is not None:
            return pending
        record = run.dir.record(round)
        if record is not None and record.decision == "stop":
            break
    return None


def first_pending_of(run: IterativeRun, round: int) -> str | None:
    """The first step of `round` that is not done; the rounds before it are.

    Raises:
        StaleStepError: see `first_pending`.
    """
    candidate = run.initial
    for step in steps_of_round(run, round):
        if (manifest := step.manifest()) is None:
            return step.name
        if step.path.name == "policy":
            candidate = PolicyCheckpoint(step.path, manifest.digest, round)
    previous = run.policy_after(round - 1) if round else None
    if run.dir.record(round) != decision_record(run, round, candidate, previous):
        return f"{run.dir.round_dir(round).name}/round.json"
    return None


def steps_of_round(run: IterativeRun, round: int) -> Iterator[Step]:
    """The steps of a round in the order of the loop (`flows/loop.py`). Each has to be done before the next is taken."""
    if round == 0:
        yield evaluate_step(run, 0, run.initial, {})
        return
    policy = run.policy_after(round - 1)
    yield (step := sample_step(run, round, policy, run.prompts.of(round)))
    completions = Completions.of(step.path, _done(step))
    yield (step := judge_step(run, round, completions, run.train_judge))
    judgments = Judgments.of(step.path, _done(step))
    yield (step := pair_step(run, round, judgments))
    pairs = Pairs.of(step.path, _done(step))
    yield from reference_steps(run, round, policy)
    yield (step := train_step(run, round, pairs, policy, reference_policy(run, round, policy)))
    candidate = PolicyCheckpoint(step.path, _done(step).digest, round)
    yield evaluate_step(run, round, candidate, run.evaluations(initial=0, previous=policy.round))


def _done(step: Step) -> Manifest:
    manifest = step.manifest()
    assert manifest is not None, f"{step.name} comes first"
    return manifest

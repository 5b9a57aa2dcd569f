"""What of a run is not done yet, from the keys of its steps alone. Does nothing, and loads nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from iterdpo.errors import DamagedError
from iterdpo.run.artifacts import Evaluation, Judgments, Pairs, PolicyCheckpoint
from iterdpo.run.rundir import Manifest, Step
from iterdpo.stages import evaluate, judge, pair, sample, train
from iterdpo.stages.benchmarks import benchmark_steps
from iterdpo.stages.gate import decision_record
from iterdpo.stages.others import against_steps, other_steps
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.train import reference_policy, reference_steps


def describe_pending(run: IterativeRun) -> str | None:
    """`first_pending` for a reader: a step that is damaged is named with its problem.

    Raises:
        StaleStepError: a step on disk was made with other settings.
    """
    try:
        return first_pending(run)
    except DamagedError as error:
        return str(error)


def first_pending(run: IterativeRun) -> str | None:
    """The first step of the run that is not done, such as `round-002/pairs`; None if the run is complete.

    A StaleStepError if a step on disk was made with other settings, a DamagedError if one is damaged.
    """
    for round in range(run.config.rounds + 1):
        if (pending := first_pending_of(run, round)) is not None:
            return pending
        record = run.dir.record(round)
        if record is not None and record.decision == "stop":
            break
    return None


def first_pending_of(run: IterativeRun, round: int) -> str | None:
    """The first step of `round` that is not done; the rounds before it are. Raises what `first_pending` does."""
    candidate = run.initial
    for step in steps_of_round(run, round):
        if (manifest := step.manifest()) is None:
            return step.name
        if step.path.name == "policy":
            candidate = PolicyCheckpoint(step.path, manifest.digest, round)
    previous = run.standing(round) if round else None
    if run.dir.record(round) != decision_record(run, round, candidate, previous):
        return f"{run.dir.round_dir(round).name}/round.json"
    return None


def steps_of_round(run: IterativeRun, round: int) -> Iterator[Step]:
    """The steps of a round in the order of the loop (`flows/loop.py`). Each has to be done before the next is taken."""
    step = functools.partial(run.dir.step, round)
    yield from evaluate.reference_steps(run).values()
    if round == 0:
        against = evaluate.references(run)
        yield (evaluated := step("evaluation", evaluate.inputs(run, run.initial, against)))
        yield from benchmark_steps(run, round, run.initial)
        initial = Evaluation(evaluated.path, _done(evaluated).digest, round)
        yield from evaluate.temperature_steps(run, round, run.initial, {"initial": initial, **against})
        return
    policy = run.policy_after(round - 1)
    yield (sampled := step("completions", sample.inputs(run, policy, run.prompts.of(round))))
    yield (judged := step("judgments", judge.inputs(_done(sampled).digest, run.train_judge)))
    sampled_others = None
    for other in other_steps(run, round):
        yield other
        sampled_others = _done(other).digest
    for met in against_steps(run, round, _done(sampled).digest, sampled_others):
        yield met
        sampled_others = _done(met).digest
    judgments = Judgments.of(judged.path, _done(judged))
    yield (paired := step("pairs", pair.inputs(run, round, judgments, sampled_others)))
    yield from reference_steps(run, round, policy)
    pairs, reference = Pairs.of(paired.path, _done(paired)), reference_policy(run, round, policy)
    yield (trained := step("policy", train.inputs(run, round, pairs, policy, reference)))
    candidate = PolicyCheckpoint(trained.path, _done(trained).digest, round)
    if run.evaluates(round):
        against = run.baselines(round, run.standing(round)) | evaluate.references(run)
        yield step("evaluation", evaluate.inputs(run, candidate, against))
        yield from benchmark_steps(run, round, candidate)
        yield from evaluate.temperature_steps(run, round, candidate, against)


def _done(step: Step) -> Manifest:
    manifest = step.manifest()
    assert manifest is not None, f"{step.name} comes first"
    return manifest

"""Iterative DPO, one line a stage. The same loop runs under Prefect and without it: `do` says how stages are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from iterdpo import stages
from iterdpo.experiment import Experiment, Pending, Policy
from iterdpo.run.rundir import Manifest
from iterdpo.types import RoundRecord


class Stages(NamedTuple):
    """The stages of a round; Prefect puts tasks in their place."""

    sample: Callable[[Experiment, int, Policy], Manifest] = stages.sample
    judge: Callable[[Experiment, int], Manifest] = stages.judge
    pair: Callable[[Experiment, int], Manifest] = stages.pair
    train: Callable[[Experiment, int, Policy], Manifest] = stages.train
    evaluate: Callable[[Experiment, int, Policy, int | None], Manifest] = stages.evaluate
    gate: Callable[[Experiment, int, Policy, Policy | None], RoundRecord] = stages.gate


def initial_round(exp: Experiment, do: Stages = Stages()) -> RoundRecord:  # noqa: B008  # immutable
    """Round 0: how the initial policy does, which every later round is compared with."""
    do.evaluate(exp, 0, exp.initial, None)
    return do.gate(exp, 0, exp.initial, None)


def dpo_round(exp: Experiment, t: int, do: Stages = Stages()) -> RoundRecord:  # noqa: B008
    """Round t, from the policy that the round before left."""
    policy = exp.policy_after(t - 1)  # pi_t
    do.sample(exp, t, policy)  # y_1..y_K ~ pi_t(.|x)
    do.judge(exp, t)  # a score per y, or an abstention
    do.pair(exp, t)  # (x, y_w, y_l)
    trained = do.train(exp, t, policy)  # pi_{t+1} <- DPO(pi_t)
    candidate = Policy(exp.run.round_dir(t) / "policy", trained.digest, t)
    do.evaluate(exp, t, candidate, policy.round)  # win rate, scores, KL, on held-out x
    return do.gate(exp, t, candidate, policy)  # promote, keep or stop


def run_loop(exp: Experiment, one_round: Callable[[int], RoundRecord]) -> Iterable[RoundRecord]:
    """Rounds 0 to `config.rounds`, or until the gate stops the run."""
    for t in range(exp.config.rounds + 1):
        record = one_round(t)
        yield record
        if record.decision == "stop":
            return


def plain_round(exp: Experiment) -> Callable[[int], RoundRecord]:
    return lambda t: dpo_round(exp, t) if t else initial_round(exp)


def first_pending(exp: Experiment) -> str | None:
    """The first step that is not done, or None where the run is complete. Loads nothing.

    Raises:
        StaleStepError: a step on disk was made with other settings.
    """
    return pending_in(exp, lambda: list(run_loop(exp, plain_round(exp))))


def pending_in(exp: Experiment, walk: Callable[[], object]) -> str | None:
    """The first step of `walk` that is not done, or None. The stages that it calls look, and do nothing."""
    exp.looking = True
    try:
        walk()
    except Pending as step:
        return str(step)
    finally:
        exp.looking = False
    return None

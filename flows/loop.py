"""Iterative DPO, one line a stage. The same loop runs under Prefect and without it: `do` says how stages are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from iterdpo.data.prompts import PromptFile
from iterdpo.judging.judge import RunJudge
from iterdpo.judging.shards import StreamingJudge
from iterdpo.run.artifacts import Completions, Evaluation, Judgments, Pairs, PolicyCheckpoint
from iterdpo.stages.evaluate import evaluate
from iterdpo.stages.gate import gate
from iterdpo.stages.judge import judge
from iterdpo.stages.keep import remove_unneeded
from iterdpo.stages.pair import pair
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import sample
from iterdpo.stages.train import reference_policy, train
from iterdpo.types import RoundRecord

Run = IterativeRun


class Stages(NamedTuple):
    """The stages of a round; Prefect puts tasks in their place."""

    sample: Callable[[Run, int, PolicyCheckpoint, PromptFile, StreamingJudge], Completions] = sample
    judge: Callable[[Run, int, Completions, RunJudge, StreamingJudge], Judgments] = judge
    pair: Callable[[Run, int, Completions, Judgments], Pairs] = pair
    train: Callable[[Run, int, Pairs, PolicyCheckpoint, PolicyCheckpoint], PolicyCheckpoint] = train
    evaluate: Callable[[Run, int, PolicyCheckpoint, Mapping[str, Evaluation]], Evaluation] = evaluate
    gate: Callable[[Run, int, Evaluation | None, PolicyCheckpoint, PolicyCheckpoint | None], RoundRecord] = gate


PLAIN = Stages()


def initial_round(run: Run, do: Stages = PLAIN) -> RoundRecord:
    """Round 0: how the initial policy does, which every later round is compared with."""
    evaluation = do.evaluate(run, 0, run.initial, {})
    return do.gate(run, 0, evaluation, run.initial, None)


def dpo_round(run: Run, t: int, policy: PolicyCheckpoint, do: Stages = PLAIN) -> RoundRecord:
    """Round t, from `policy`, which the round before left."""
    streaming = run.streaming_judge(t)  # judges a shard while the next is sampled, if it needs no device
    completions = do.sample(run, t, policy, run.prompts.of(t), streaming)  # y_1..y_K ~ pi_t(.|x)
    judgments = do.judge(run, t, completions, run.train_judge, streaming)  # a score per y, or an abstention
    pairs = do.pair(run, t, completions, judgments)  # (x, y_w, y_l)
    reference = reference_policy(run, t, policy)  # pi_ref
    candidate = do.train(run, t, pairs, policy, reference)  # pi_{t+1} <- DPO(pi_t)
    standing, evaluation = run.standing(t), None  # the policy that was evaluated last
    if run.evaluates(t):
        against = run.baselines(t, standing)
        evaluation = do.evaluate(run, t, candidate, against)  # win rate, scores, KL, on held-out x
    return do.gate(run, t, evaluation, candidate, standing)  # promote, keep, lower the learning rate or stop


def run_round(run: Run, t: int, do: Stages = PLAIN) -> RoundRecord:
    return dpo_round(run, t, run.policy_after(t - 1), do) if t else initial_round(run, do)


def run_loop(run: Run, one_round: Callable[[int], RoundRecord]) -> Iterator[RoundRecord]:
    """Rounds 0 to `config.rounds`, or until the gate stops the run."""
    for t in range(run.config.rounds + 1):
        record = one_round(t)
        remove_unneeded(run, t)  # weights that `keep` does not ask for
        yield record
        if record.decision == "stop":
            return

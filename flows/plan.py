"""The steps that a run would do, and those that it has done, as text."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

from flows.api import describe
from iterdpo.config import Config, OfflineConfig
from iterdpo.data.mixing import further_pairs
from iterdpo.data.preferences import preferences_of, tokenize_pairs
from iterdpo.data.prompts import PromptFile
from iterdpo.data.thinking import Thinking
from iterdpo.errors import DamagedError
from iterdpo.escape import printable
from iterdpo.run.checkpoints import training_bytes
from iterdpo.run.disk import size
from iterdpo.run.rundir import RunDir, read_manifest
from iterdpo.stages.offline import check_account, check_kind
from iterdpo.stages.plan import describe_pending
from iterdpo.stages.runs import IterativeRun, OfflineRun
from iterdpo.types import Completion, CompletionGroup
from judges.audit.lineage import shared_lineage
from judges.estimate import Workload, estimate
from judges.load import compares

LONGEST_REASON = 500
SAMPLED = 32
"""Prompts from which the work of the judges is estimated."""
STEPS = ("completions", "judgments", "others", "against", "pairs", "reference", "policy", "evaluation", "benchmarks")


def describe_plan(run: IterativeRun) -> str:
    """The plan of `iterdpo run --dry-run`: what each round and the whole run cost. Loads a tokenizer, nothing more."""
    config = run.config
    per_round, heldout = config.prompts.per_round, len(run.prompts.heldout)
    completions = per_round * config.sampling.n
    evaluated = heldout * config.evaluation.n
    source = config.pairing.other_side
    others = per_round if source is not None and source.column is None else 0  # one a prompt
    each = 1
    if config.pairing.strategy == "all_pairs":
        combinations = math.comb(config.sampling.n, 2)
        each = min(combinations, config.pairing.max_pairs_per_prompt or combinations)
    if source is not None:
        each = config.sampling.n if config.pairing.strategy == "all_pairs" and not config.pairing.against else 1
    pairs, rounds = per_round * each, config.rounds
    share = config.pairing.offline.share if config.pairing.offline else 0.0
    pairs += sum(further_pairs(pairs, replay=config.pairing.replay, offline=share))
    policy, checkpoint = training_bytes(run.model_path, config.dpo)
    in_all = rounds * (completions + others) + (_evaluations(config) + 1) * evaluated
    return _table(
        model=run.model_path,
        **_thinking(
            run.thinking,
            f"judged on: {' and '.join(dict.fromkeys(judge.named.sees for judge in run.judges))}; "
            f"trained on: {config.dpo.train_on}",
        ),
        judge=f"{run.judges[0].named.use}; evaluated by {run.judges[-1].named.use}",
        prompts=f"{len(run.prompts.train):,} to train on, {heldout:,} held out; {per_round:,} a round; "
        + run.prompts.summary(),
        context=f"{run.estimated_max_model_len():,} tokens",
        rounds=f"{rounds}; next: {describe_pending(run) or 'nothing, all are done'}",
        completions=f"{completions + others:,} a round and {evaluated:,} an evaluation; {in_all:,} in all",
        **_judge_calls(run),
        pairs=f"at most {pairs:,} a round",
        steps=f"at most {config.dpo.steps(pairs):,} optimizer steps a round of {config.dpo.pairs_per_step} pairs",
        **_benchmarks(config),
        disk=f"about {size(rounds * policy)} of policies in {run.dir.root}, and {size(checkpoint)} more for a checkpoint",
    )


def _judge_calls(run: IterativeRun) -> dict[str, str]:
    """Rows of the plan: how often the judges of the configuration are called, and what language models read and write.

    Prompts are the first of the first round, completions as long as `sampling.max_tokens` allows.
    """
    config = run.config
    section, sampling = config.evaluation, config.sampling
    rounds, each = config.rounds, 1 if section.temperature == 0 else section.n
    heldout, references = len(run.prompts.heldout), section.reference_column is not None
    trained = _groups(run.prompts.of(1), sampling.n, sampling.max_tokens)
    scored, compared = (_groups(run.prompts.heldout, k, sampling.max_tokens) for k in (each, 2))
    lines, total = [], Workload()
    for role, judge in (("training", config.judge), ("held-out", section.judge)):
        if judge is None:
            continue
        if compares(judge.use, judge.args):
            # With the initial policy, and from the second round on with the previous one too.
            evaluation = estimate(judge.use, judge.args, compared) * (heldout * each / len(compared))
            evaluated = evaluation * (2 * _evaluations(config) - 1 + references * (_evaluations(config) + 1))
        else:
            evaluation = estimate(judge.use, judge.args, scored) * (heldout / len(scored))
            evaluated = evaluation * (_evaluations(config) + 1 + references / each)
        work, said = evaluated, f"{round(evaluation.calls):,} an evaluation"
        if role == "training":
            one = estimate(judge.use, judge.args, trained) * (config.prompts.per_round / len(trained))
            if config.pairing.against is not None:
                met = _groups(run.prompts.of(1), 2, sampling.max_tokens)
                one += estimate(judge.use, judge.args, met) * (config.prompts.per_round / len(met))
            work, said = work + one * rounds, f"{round(one.calls):,} a round and {said}"
        lines.append(f"{role} judge: {said}")
        total += work
    rows = {"judge_calls": f"{'; '.join(lines)}; {round(total.calls):,} in all"}
    if total.tokens_in:
        rows["judge_tokens"] = total.tokens()
    if (shared := shared_lineage(config.judge.args, config.model.path)) is not None:
        rows["warning"] = shared
    return rows


def _benchmarks(config: Config) -> dict[str, str]:
    """A row of the plan, if there are any."""
    section = config.evaluation.benchmarks
    if section is None:
        return {}
    limit = f", {section.limit:,} examples of each" if section.limit else ""
    return {"benchmarks": f"{', '.join(section.tasks)}{limit}; {_evaluations(config) + 1} times"}


def _evaluations(config: Config) -> int:
    """Rounds that are evaluated, without round 0."""
    return math.ceil(config.rounds / config.evaluation.every)


def _groups(prompts: PromptFile, completions: int, max_tokens: int) -> list[CompletionGroup]:
    """Groups of some prompts with different completions of the greatest length, four bytes a token."""
    texts = [f"{k:<4}" + "word" * (max_tokens - 1) for k in range(completions)]
    drawn = [Completion(text, [], [], "length") for text in texts]
    return [CompletionGroup(prompt, [], drawn) for prompt in islice(prompts, SAMPLED)]


def describe_offline_plan(config: OfflineConfig) -> str:
    """The plan of `iterdpo train --dry-run`. Reads the data, tokenizes the first rows and checks the checkpoint."""
    with OfflineRun(config) as run:
        run.check_model()
        path, tokenizer, thinking = run.model_path, run.tokenizer, run.thinking
        run.check_space()
    section = config.data
    data = preferences_of(section)
    limits = section.model_dump(include={"max_prompt_tokens", "max_completion_tokens"})
    for number, batch in enumerate(data.parsed()):
        if number == 0:  # what the chat template refuses, it mostly refuses soon
            alone = config.dpo.train_on == "answer"
            tokenize_pairs(batch, tokenizer, data.account, **limits, thinking=thinking, answers_alone=alone)
    check_kind(config, data.account.kind)
    check_account(config, data.account)
    pairs = data.account.kept - config.data.heldout
    policy, checkpoint = training_bytes(path, config.dpo)
    return _table(
        model=path,
        **_thinking(thinking, f"trained on: {config.dpo.train_on}"),
        data=data.account.summary(),
        pairs=f"{pairs:,} to train on, {config.data.heldout:,} held out",
        steps=f"{config.dpo.steps(pairs):,} optimizer steps of {config.dpo.pairs_per_step} pairs",
        disk=f"about {size(policy)} for the policy in {config.run_dir}, and {size(checkpoint)} more for a checkpoint",
    )


def describe_status(run_dir: str | Path) -> str:
    """What each round of a run has done, from the run directory alone.

    Raises:
        UserError: there is no run.
    """
    run = RunDir(run_dir)
    if (failure := run.last_failure()) is None:
        run.read_config()
    lines = [str(run.root)]
    for number in run.rounds():
        directory = run.round_dir(number)
        done, damaged = [], []
        for name in STEPS:
            try:
                done += [name] if read_manifest(directory / name) else []
            except DamagedError as error:
                damaged.append(f"  {error}")
        try:
            record = run.record(number)
        except DamagedError as error:
            record = None
            damaged.append(f"  {error}")
        lines += damaged
        if record is not None:
            lines.append(f"  {describe(record.metrics)}")
            continue
        under_way = [name for name in STEPS if name not in done and (directory / f"{name}.partial").exists()]
        more = f"; under way: {', '.join(under_way)}" if under_way else ""
        lines.append(f"  round {number}: done: {', '.join(done) or 'nothing'}{more}")
    if failure is not None:
        since = f" (round {failure['round']} has been finished since)" if run.next_round() > failure["round"] else ""
        why = printable(" ".join(str(failure["reason"]).split())[:LONGEST_REASON])
        lines.append(f"  last failure: {failure['time']}, round {failure['round']}: {why}{since}")
    return "\n".join(lines)


def _thinking(thinking: Thinking | None, use: str) -> dict[str, str]:
    """The row about a thinking model's reasoning."""
    return {} if thinking is None else {"thinking": f"{thinking.tags.start} … {thinking.tags.end}; {use}"}


def _table(**rows: object) -> str:
    return "\n".join(f"{name.replace('_', ' '):<12} {text}" for name, text in rows.items())

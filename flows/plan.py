"""The steps that a run would do, and those that it has done, as text."""

from __future__ import annotations

import math
import os
from itertools import islice
from pathlib import Path

from flows.api import describe
from iterdpo.config import Config, DPOConfig, OfflineConfig
from iterdpo.data.mixing import further_pairs
from iterdpo.data.preferences import preferences_of, tokenize_pairs
from iterdpo.data.prompts import PromptFile
from iterdpo.data.thinking import Thinking
from iterdpo.errors import DamagedError
from iterdpo.escape import printable
from iterdpo.run.checkpoints import training_bytes
from iterdpo.run.cost import (
    Card,
    Load,
    Rates,
    Shape,
    engine_bytes,
    scorer_bytes,
    seconds_of_rounds,
    trainer_bytes,
    what_would_fit,
)
from iterdpo.run.devices import visible_gpus
from iterdpo.run.disk import size
from iterdpo.run.rundir import RunDir, read_manifest, removed
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
MEASURED = 256
"""Prompts whose lengths in tokens are averaged."""
STEPS = (
    "completions",
    "judgments",
    "others",
    "against",
    "pairs",
    "ema",
    "reference",
    "policy",
    "references",
    "other_model",
    "evaluation",
    "benchmarks",
    "temperatures",
)
"""Directories of a round, in the order of the loop."""


def describe_plan(run: IterativeRun) -> str:
    """The plan of `iterdpo run --dry-run`: what each round and the whole run cost. Loads a tokenizer, nothing more."""
    config = run.config
    per_round, heldout = config.prompts.per_round, len(run.prompts.heldout)
    completions = per_round * config.sampling.n
    evaluated = heldout * _evaluated(config)
    others, once = _others(config), _compared(run)
    pairs, rounds = pairs_of_a_round(config), config.rounds
    policy, checkpoint = training_bytes(run.model_path, config.dpo)
    in_all = rounds * (completions + others) + (_evaluations(config) + 1) * evaluated + once
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
        disk=f"about {size(run.policies_at_once * policy)} of policies in {run.dir.root}, and {size(checkpoint)} more for a checkpoint",
    )


def load_of(run: IterativeRun) -> Load:
    """The counts of a run for its cost. Completions are as long as `sampling.max_tokens` allows."""
    config = run.config
    sampled = list(islice(run.prompts.of(1), MEASURED))
    lengths = [len(ids) for ids in run.prompt_ids(sampled)]
    return Load(
        rounds=config.rounds,
        completions=config.prompts.per_round * config.sampling.n,
        evaluated=len(run.prompts.heldout) * _evaluated(config),
        judges=len(run.judges),
        pairs=config.dpo.pairs_seen(pairs_of_a_round(config)),
        prompt_tokens=sum(lengths) / max(1, len(lengths)),
        completion_tokens=config.sampling.max_tokens,
        others=_others(config),
        compared=_compared(run),
        unevaluated=[t for t in range(1, config.rounds) if not run.evaluates(t)],
    )


def _others(config: Config) -> int:
    """Completions of another policy in a round, one a prompt."""
    source = config.pairing.other_side
    return config.prompts.per_round if source is not None and source.column is None else 0


def _compared(run: IterativeRun) -> int:
    """Completions of the model in `evaluation.against`."""
    section = run.config.evaluation
    return len(run.prompts.heldout) * section.completions if section.against is not None else 0


def describe_cost(run: IterativeRun, rates: Rates | None, card: Card | None) -> str:
    """Time and memory of a run, as further rows of its plan. Without rates, how to get some.

    `card`: the one to plan for, by default this machine's memory.
    """
    load = load_of(run)
    shape = Shape.of(run.model_path, run.model_config)
    rows: dict[str, str] = {}
    evaluations = load.rounds - len(load.unevaluated)
    sampled = load.rounds * (load.completions + load.others) + (evaluations + 1) * load.evaluated + load.compared
    scored = 2 * evaluations * load.evaluated
    trained = load.rounds * load.pairs * (load.prompt_tokens + 2 * load.completion_tokens)
    rows["tokens"] = (
        f"at most {_count(sampled * load.completion_tokens)} sampled, {_count(trained)} trained on, and "
        f"{_count(scored * (load.prompt_tokens + load.completion_tokens))} scored for the KL"
    )
    if rates is None:
        rows["time"] = "unknown: pass --calibrate (a small round, for real), --card NAME, or --rates FILE"
    else:
        rounds = seconds_of_rounds(load, rates)
        last = {name: second for name, second in rounds[-1].items() if second >= 0.5}
        parts = ", ".join(f"{name} {duration(second)}" for name, second in last.items())
        rows["a_round"] = f"about {duration(sum(rounds[-1].values()))}: {parts}"
        rows["time"] = f"about {duration(sum(sum(r.values()) for r in rounds))} in all, by {rates.source}"
    measured = rates.memory if rates is not None else {}
    rows |= _memory(run, shape, load, measured, card)
    return _table(**rows)


def _memory(
    run: IterativeRun, shape: Shape, load: Load, measured: dict[str, float], card: Card | None
) -> dict[str, str]:
    config, dpo = run.config, run.config.dpo
    sharded = is_sharded(dpo)
    step_tokens = dpo.pairs_per_step / dpo.processes * (load.prompt_tokens + 2 * load.completion_tokens)
    trainer = measured.get("trainer") or trainer_bytes(
        shape, run.model_path, dpo, sharded=sharded, step_tokens=step_tokens
    )
    engine = measured.get("engine") or engine_bytes(shape, config, run.estimated_max_model_len())
    if card is None and not visible_gpus() and not measured:
        engine += config.sampling.engine.kv_cache_gib * 2**30
    memory = card.memory if card is not None else device_memory()
    how = "measured" if measured else "estimated"
    rows = {"memory": f"{how}: engine {size(engine)}, trainer {size(trainer)} for each process; {size(memory)} there"}
    share = config.sampling.engine.gpu_memory_utilization if card is not None or visible_gpus() else 1.0
    if trainer > memory:
        change = what_would_fit(shape, run.model_path, dpo, memory, sharded=sharded)
        rows["does_not_fit"] = (
            f"the trainer; change one of these: {'; '.join(change) or 'the model, for a smaller one'}"
        )
    if card is not None or visible_gpus():
        rows["scorer"] = f"{size(scorer_bytes(shape))} on one GPU, for the KL in each evaluation"
        if scorer_bytes(shape) > memory:
            rows["scorer_does_not_fit"] = "no key changes this; take a smaller model, or a larger card"
    if engine > share * memory:
        wider = next((n for n in (2, 4, 8, 16) if engine / n <= share * memory), None)
        keys = [f"sampling.engine.tensor_parallel_size={wider}"] if wider else []
        if engine <= memory:
            keys.append(f"sampling.engine.gpu_memory_utilization={math.ceil(100 * engine / memory) / 100:g}")
        rows["engine_does_not_fit"] = f"change one of these: {'; '.join(keys) or 'the model, for a smaller one'}"
    return rows


def pairs_of_a_round(config: Config) -> int:
    """The most pairs that a round trains on."""
    each, source = 1, config.pairing.other_side
    if config.pairing.strategy == "all_pairs":
        combinations = math.comb(config.sampling.n, 2)
        each = min(combinations, config.pairing.max_pairs_per_prompt or combinations)
    if source is not None:
        each = config.sampling.n if config.pairing.strategy == "all_pairs" and not config.pairing.against else 1
    pairs = config.prompts.per_round * each
    share = config.pairing.offline.share if config.pairing.offline else 0.0
    return pairs + sum(further_pairs(pairs, replay=config.pairing.replay, offline=share))


def is_sharded(dpo: DPOConfig) -> bool:
    """Whether weights, gradients and moments are divided among the training processes."""
    if dpo.accelerate_config is None or dpo.processes == 1:
        return False
    return "distributed_type: FSDP" in Path(dpo.accelerate_config).read_text(encoding="utf-8")


def device_memory() -> float:
    """Bytes of a GPU of this machine, or without one of its memory."""
    if visible_gpus():
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(number: float) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{round(number):,}"


def _judge_calls(run: IterativeRun) -> dict[str, str]:
    """Rows of the plan: how often the judges of the configuration are called, and what language models read and write.

    Prompts are the first of the first round, completions as long as `sampling.max_tokens` allows.
    """
    config = run.config
    section, sampling = config.evaluation, config.sampling
    rounds, each = config.rounds, section.completions
    heldout, references = len(run.prompts.heldout), section.reference_column is not None
    other, further = section.against is not None, _evaluated(config) / each - 1
    trained = _groups(run.prompts.of(1), sampling.n, sampling.max_tokens)
    scored, compared = (_groups(run.prompts.heldout, k, sampling.max_tokens) for k in (each, 2))
    lines, total = [], Workload()
    for role, judge in (("training", config.judge), ("held-out", section.judge)):
        if judge is None:
            continue
        if compares(judge.use, judge.args):
            # With the initial policy, and from the second round on with the previous one too.
            evaluation = estimate(judge.use, judge.args, compared) * (heldout * each / len(compared))
            # At further temperatures, with the initial policy in round 0 too.
            always = (references + other) * (1 + further) + further
            evaluated = evaluation * (2 * _evaluations(config) - 1 + always * (_evaluations(config) + 1))
        else:
            evaluation = estimate(judge.use, judge.args, scored) * (heldout / len(scored))
            evaluated = evaluation * ((_evaluations(config) + 1) * (1 + further) + references / each + other)
            evaluation *= 1 + further
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


def _evaluated(config: Config) -> int:
    """Completions of a held-out prompt in an evaluation, at all of its temperatures."""
    section = config.evaluation
    return section.completions + sum(map(section.completions_at, config.further_temperatures))


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
            away = " (weights removed)" if removed(directory / "policy") else ""
            lines.append(f"  {describe(record.metrics)}{away}")
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

"""The steps that a run would do, and those that it has done, as text."""

from __future__ import annotations

import math
import re
from pathlib import Path

from flows.api import describe
from iterdpo.config import DPOConfig, OfflineConfig
from iterdpo.data.preferences import Account, PreferenceData, tokenize_pairs
from iterdpo.data.rendering import load_tokenizer
from iterdpo.errors import DamagedError
from iterdpo.run.checkpoints import EMBEDDINGS, check_checkpoint, check_whole_modules, resolve_checkpoint
from iterdpo.run.rundir import RunDir, read_manifest
from iterdpo.stages.plan import describe_pending
from iterdpo.stages.runs import IterativeRun

STEPS = ("completions", "judgments", "pairs", "reference", "policy", "evaluation")

# Matrices that are no linear layer's, beside token embeddings; the output head is left out by PEFT itself.
NOT_LINEAR = ("wpe.weight", "embed_positions.weight", "lm_head.weight", "embed_out.weight")


def describe_plan(run: IterativeRun) -> str:
    """The plan of `iterdpo run --dry-run`: what each round and the whole run cost. Loads a tokenizer, nothing more."""
    config = run.config
    per_round, heldout = config.prompts.per_round, len(run.prompts.heldout)
    completions = per_round * config.sampling.n
    evaluated = heldout * config.evaluation.n
    each = 1
    if config.pairing.strategy == "all_pairs":
        combinations = math.comb(config.sampling.n, 2)
        each = min(combinations, config.pairing.max_pairs_per_prompt or combinations)
    pairs, rounds = per_round * each, config.rounds
    policy, checkpoint = _sizes(run.model_path, config.dpo)
    in_all = rounds * completions + (rounds + 1) * evaluated
    scored = rounds * completions + (rounds + 1) * evaluated * len(run.judges)
    return _table(
        model=run.model_path,
        judge=f"{run.judges[0].named.use}; evaluated by {run.judges[-1].named.use}",
        prompts=f"{len(run.prompts.train):,} to train on, {heldout:,} held out; {per_round:,} a round; "
        + run.prompts.summary(),
        context=f"{run.estimated_max_model_len():,} tokens",
        rounds=f"{rounds}; next: {describe_pending(run) or 'nothing, all are done'}",
        completions=f"{completions:,} a round and {evaluated:,} an evaluation; {in_all:,} in all",
        judge_calls=f"{scored:,} completions to score",
        pairs=f"at most {pairs:,} a round",
        steps=f"at most {config.dpo.steps(pairs):,} optimizer steps a round of {config.dpo.pairs_per_step} pairs",
        disk=f"about {_size(rounds * policy)} of policies in {run.dir.root}, and {_size(checkpoint)} more for a checkpoint",
    )


def describe_offline_plan(config: OfflineConfig) -> str:
    """The plan of `iterdpo train --dry-run`. Reads the data, tokenizes the first rows and checks the checkpoint."""
    path = resolve_checkpoint(config.model.path, revision=config.model.revision)
    check_checkpoint(path, trust_remote_code=config.model.trust_remote_code)
    check_whole_modules(path, config.dpo.adapter)
    data = PreferenceData(config.data.path, config.data.split, config.data.format, config.data.limit)
    model, limits = config.model, config.data.model_dump(include={"max_prompt_tokens", "max_completion_tokens"})
    tokenizer = load_tokenizer(
        path, trust_remote_code=model.trust_remote_code, chat_template_kwargs=model.chat_template_kwargs
    )
    for number, batch in enumerate(data.parsed()):
        if number == 0:  # what the chat template refuses, it mostly refuses soon
            tokenize_pairs(batch, tokenizer, Account(config.data.path), **limits)
    pairs = data.account.kept - config.data.heldout
    policy, checkpoint = _sizes(path, config.dpo)
    return _table(
        model=path,
        data=data.account.summary(),
        pairs=f"{pairs:,} to train on, {config.data.heldout:,} held out",
        steps=f"{config.dpo.steps(pairs):,} optimizer steps of {config.dpo.pairs_per_step} pairs",
        disk=f"about {_size(policy)} for the policy in {config.run_dir}, and {_size(checkpoint)} more for a checkpoint",
    )


def describe_status(run_dir: str | Path) -> str:
    """What each round of a run has done, from the run directory alone.

    Raises:
        UserError: there is no run.
    """
    run = RunDir(run_dir)
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
    return "\n".join(lines)


def _table(**rows: object) -> str:
    return "\n".join(f"{name.replace('_', ' '):<12} {text}" for name, text in rows.items())


def _sizes(model: Path, dpo: DPOConfig) -> tuple[int, int]:
    """Bytes of a round's policy as it is saved, and of the trainer's checkpoint besides, from `model`'s headers."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    saved, frozen = sum(map(math.prod, shapes.values())), 0
    if dpo.adapter is not None:
        frozen, targets = saved, dpo.adapter.target_modules  # the trainer's checkpoint has the frozen weights too
        whole = _whole(shapes, dpo.adapter.modules_to_save or [])
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name not in whole}
        adapted = (sum(shape) for name, shape in matrices.items() if _adapted(name, targets))
        saved = dpo.adapter.r * sum(adapted) + sum(whole.values())
    policy = saved * (2 if dpo.save_dtype == "bfloat16" else 4)
    return policy, 2 * policy + frozen * (2 if dpo.precision == "bf16" else 4)


def _whole(shapes: dict[str, list[int]], modules: list[str]) -> dict[str, int]:
    """Numbers of weights that are trained whole beside an adapter. A head that is tied to the embeddings is saved too."""
    found = {name: math.prod(shape) for name, shape in shapes.items() if modules and _adapted(name, modules)}
    embeddings = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith(EMBEDDINGS)}
    untied = any(name.endswith("lm_head.weight") for name in shapes)
    if not untied and ("lm_head" in modules or embeddings.keys() & found.keys()):
        found |= embeddings | {"lm_head.weight": sum(embeddings.values())}
    return found


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _adapted(name: str, target_modules: str | list[str]) -> bool:
    """Whether the matrix of this name gets an adapter, as PEFT decides it from the names of modules."""
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return False
    if target_modules == "all-linear":
        return not name.endswith(EMBEDDINGS + NOT_LINEAR)
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in target_modules)

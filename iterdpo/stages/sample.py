"""y_1..y_K ~ pi_t(.|x): K completions of each of a round's prompts, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from itertools import tee
from pathlib import Path
from typing import Any

from iterdpo.data.prompts import PromptFile
from iterdpo.data.rendering import turn_ends
from iterdpo.judging.shards import StreamingJudge
from iterdpo.run.artifacts import (
    Completions,
    PolicyCheckpoint,
    read_completion_shard,
    shard_name,
    write_card,
    write_completion_shard,
)
from iterdpo.run.devices import visible_gpus
from iterdpo.sampling import SamplingParameters
from iterdpo.seeds import derive_seed
from iterdpo.stages.runs import IterativeRun, OfflineRun, batches
from iterdpo.types import CompletionGroup


def sample(
    run: IterativeRun,
    round: int,
    policy: PolicyCheckpoint,
    prompts: PromptFile,
    streaming: StreamingJudge | None = None,
) -> Completions:
    """K completions of each prompt, by `policy`. A `streaming` judge is given each shard as soon as it is durable."""
    step = run.dir.step(round, "completions", inputs(run, policy, prompts))
    if (manifest := step.manifest()) is None:
        directory = step.begin()
        run.prompts.pin(round)
        sampling = run.config.sampling
        if visible_gpus():  # else the engine needs all cores
            run.warm_up_trainer(round)
        if streaming is not None:
            streaming.start()
        counts = sample_shards(
            run,
            directory,
            "sample",
            policy,
            run.prompts.of(round),  # as it was written down
            run.pinned_ids(round),
            parameters_of(run, sampling.n, temperature_of(run)),
            lambda prompt_id: derive_seed(run.config.seed, round, "sample", prompt_id),
            on_shard=streaming.put if streaming is not None else None,
        )
        write_card(directory, "shard-*.parquet")
        if run.config.prompts.choose == "untied":
            counts["retired"] = run.prompts.retired(round)
        manifest = step.finish(counts={**counts, "left_out": run.prompts.left_out()})
    return Completions.of(step.path, manifest)


def inputs(run: IterativeRun, policy: PolicyCheckpoint, prompts: PromptFile) -> dict[str, Any]:
    sampling = run.config.sampling
    return {
        "model": run.initial.digest,
        "policy": policy.digest,
        "prompts": prompts_key(run, prompts),
        "sampling": sampling_key(run, sampling.n, temperature_of(run)),
        "seed": run.config.seed,
    }


def prompts_key(run: IterativeRun, prompts: PromptFile) -> dict[str, Any]:
    section = run.config.prompts.model_dump(include={"per_round", "heldout", "column"})
    return {**section, "content": prompts.digest(), **template_key(run)}


def template_key(run: OfflineRun) -> dict[str, Any]:
    """What the configuration gives the chat template; nothing by default."""
    given = run.settings.model.chat_template_kwargs
    return {"chat_template_kwargs": given} if given else {}


def thinking_key(run: OfflineRun) -> dict[str, Any]:
    """The tags of a thinking model; nothing for others."""
    return {"thinking": run.tags.to_json()} if run.tags is not None else {}


def temperature_of(run: IterativeRun) -> float | list[float]:
    """Of a round's prompts: one, or several that are dealt over them."""
    return run.config.sampling.temperatures or run.config.sampling.temperature


def sampling_key(run: IterativeRun, n: int, temperature: float | list[float]) -> dict[str, Any]:
    section = run.config.sampling
    added = run.added_stops
    return {
        "n": n,
        "temperature": temperature,
        **section.model_dump(include={"top_p", "top_k", "max_tokens", "shard_size"}),
        "engine": section.engine.model_dump(include={"dtype", "extra"}),
        **({"stop_token_ids": added} if added else {}),
        **section.model_dump(include={"reproducible"}),
        **thinking_key(run),
    }


def parameters_of(run: IterativeRun, n: int, temperature: float | list[float]) -> SamplingParameters:
    section = run.config.sampling.model_dump(include={"top_p", "top_k", "max_tokens"})
    stops = tuple(sorted(turn_ends(run.tokenizer) - {run.tokenizer.eos_token_id}))
    several = tuple(temperature) if isinstance(temperature, list) else temperature
    return SamplingParameters(n, several, **section, stop_token_ids=stops)


def sample_shards(
    run: IterativeRun,
    directory: Path,
    name: str,
    policy: PolicyCheckpoint,
    prompts: PromptFile,
    prompt_ids: Iterable[list[int]],
    parameters: SamplingParameters,
    seed_of: Callable[[str], int],
    *,
    on_shard: Callable[[Path], None] | None = None,
) -> dict[str, int]:
    """Sample the shards that `directory` lacks, and write each as soon as it is complete. Returns the counts of all.

    `prompt_ids` are the token ids of the prompts, in the same order. Completions of a thinking model are divided.
    """
    counts = {"prompts": 0, "completions": 0, "tokens": 0, "truncated": 0}
    if run.tags is not None:
        counts |= {"reasoning_tokens": 0, "unfinished_thoughts": 0}
    begun = False
    with run.progress.stage(name, len(prompts) * parameters.n, "completions") as stage:
        size = run.config.sampling.shard_size
        together = enumerate(zip(batches(prompts, size), batches(prompt_ids, size), strict=True))
        paths = ((directory / f"{shard_name(number)}.parquet", *part) for number, part in together)
        here, ahead = tee((path, path.exists(), asked, ids) for path, asked, ids in paths)
        missing = ((ids, [seed_of(prompt.id) for prompt in asked]) for _, there, asked, ids in ahead if not there)
        with ExitStack() as turn, closing(run.sampler.sample_batches(missing, parameters)) as sampled:
            for shard, there, asked, ids in here:
                if there:
                    groups = read_completion_shard(shard)
                else:
                    if not begun:
                        run.check(policy)
                        turn.enter_context(run.sampling_turn)
                        run.sampler.load(policy.path, policy.digest)
                        stage.begin()
                        begun = True
                    said = next(sampled)
                    if (thinking := run.thinking) is not None:
                        each_prompt = zip(ids, said, strict=True)
                        said = [[thinking.split(prompt, c) for c in group] for prompt, group in each_prompt]
                    groups = [CompletionGroup(*group) for group in zip(asked, ids, said, strict=True)]
                    write_completion_shard(shard, groups)
                each = [c for g in groups for c in g.completions]
                counts["prompts"] += len(groups)
                counts["completions"] += len(each)
                counts["tokens"] += sum(len(c.token_ids) for c in each)
                counts["truncated"] += sum(c.truncated for c in each)
                if run.tags is not None:
                    counts["reasoning_tokens"] += sum(c.reasoning_tokens for c in each)
                    counts["unfinished_thoughts"] += sum(c.unfinished for c in each)
                if on_shard is not None:
                    on_shard(shard)
                stage.to(counts["completions"])
                if not begun:
                    stage.begin()
            if begun:
                sampled.close()
                run.sampler.release()
        stage.remark = f"{counts['tokens'] / max(1, stage.done):.1f} tokens each"
        if unfinished := counts.get("unfinished_thoughts"):
            stage.remark += f"; unfinished thoughts: {unfinished:,}"
    return counts

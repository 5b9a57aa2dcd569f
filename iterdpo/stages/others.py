"""The side of a round's pairs that is not the policy's: one completion a prompt, of another policy or of a column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from iterdpo.data.preferences import given_completion
from iterdpo.errors import DataError
from iterdpo.judging.shards import NamedShard
from iterdpo.judging.stats import JudgeMetrics
from iterdpo.run.artifacts import Completions, Judgments, PolicyCheckpoint, read_groups, shard_name, write_card
from iterdpo.run.rundir import Step
from iterdpo.seeds import derive_seed
from iterdpo.stages.judge import judge_with_progress
from iterdpo.stages.runs import IterativeRun, batches
from iterdpo.stages.sample import parameters_of, prompts_key, sample_shards, sampling_key, temperature_of
from iterdpo.types import Completion, CompletionGroup


def sampled_others(run: IterativeRun, round: int) -> Completions | None:
    """One completion of each of the round's prompts by the other policy; None if no policy is the other source."""
    for step in other_steps(run, round):
        if (manifest := step.manifest()) is None:
            directory, policy = step.begin(), _other_policy(run, round)
            assert policy is not None
            counts = sample_shards(
                run,
                directory,
                "others",
                policy,
                run.prompts.of(round),
                run.pinned_ids(round),
                parameters_of(run, 1, temperature_of(run)),
                lambda prompt_id: _seed(run, round, prompt_id),
            )
            write_card(directory, "shard-*.parquet")
            manifest = step.finish(counts=counts)
        return Completions.of(step.path, manifest)
    return None


def _seed(run: IterativeRun, round: int, prompt_id: str) -> int:
    """Another seed than that of the policy's completions, with which the prompt has the same temperature of several."""
    own, other = (derive_seed(run.config.seed, round, stage, prompt_id) for stage in ("sample", "others"))
    several = len(run.config.sampling.temperatures or [1])
    return other - other % several + own % several


def other_steps(run: IterativeRun, round: int) -> Iterator[Step]:
    """The step of `sampled_others`, if the round has it."""
    if (policy := _other_policy(run, round)) is not None:
        inputs = {
            "model": run.initial.digest,
            "policy": policy.digest,
            "prompts": prompts_key(run, run.prompts.of(round)),
            "sampling": sampling_key(run, 1, temperature_of(run)),
            "seed": run.config.seed,
        }
        yield run.dir.step(round, "others", inputs)


def judged_against(run: IterativeRun, round: int, completions: Completions, sampled: Completions | None) -> Judgments:
    """The training judge's scores of the policy's first completion and the other source's, of each prompt that has both."""
    for step in against_steps(run, round, completions.digest, sampled.digest if sampled else None):
        if (manifest := step.manifest()) is None:
            directory = step.begin()
            asked = batches(against(run, completions, sampled), run.config.sampling.shard_size)
            total = 2 * _with_both(run, round, completions)
            shards: Iterable[NamedShard] = ((shard_name(number), some) for number, some in enumerate(asked))
            metrics = JudgeMetrics()
            with run.turn_of(run.train_judge):
                run.train_judge.begin_stage()
                abstentions = judge_with_progress(
                    run, "against", run.train_judge, shards, directory, total=total, on_shard=metrics.add
                )
                usage = run.train_judge.used()
                run.release_judges()
            write_card(directory, "shard-*.jsonl")
            manifest = step.finish(counts={**abstentions.result(), "metrics": metrics.result(), "usage": usage})
        return Judgments.of(step.path, manifest)
    raise AssertionError("pairing.against names the other source")


def against_steps(run: IterativeRun, round: int, completions: str, sampled: str | None) -> Iterator[Step]:
    """The step of `judged_against`, if the round has it; `completions` and `sampled` are digests."""
    if run.config.pairing.against is not None:
        inputs = {
            "judge": run.train_judge.key,
            "completions": completions,
            "against": run.config.pairing.against.model_dump(include={"column"}),
            **({"others": sampled} if sampled is not None else {}),
        }
        yield run.dir.step(round, "against", inputs)


def against(run: IterativeRun, completions: Completions, sampled: Completions | None) -> Iterator[CompletionGroup]:
    """A group of two for each prompt that has both: the policy's first completion, and the other source's."""
    groups = read_groups(completions.path, arrays=True)
    others = other_completions(run, read_groups(completions.path, arrays=True), sampled)
    for group, other in zip(groups, others, strict=True):
        if other is not None:
            yield replace(group, completions=[group.completions[0], other])


def _with_both(run: IterativeRun, round: int, completions: Completions) -> int:
    """How many of the round's prompts have a completion of the other source."""
    source = run.config.pairing.other_side
    assert source is not None
    if source.column is None:
        return completions.prompts
    return sum(run.other_content(prompt) is not None for prompt in run.prompts.of(round))


def other_completions(
    run: IterativeRun, groups: Iterator[CompletionGroup], sampled: Completions | None
) -> Iterator[Completion | None]:
    """The other source's completion for each group, in order; None if it has none."""
    source = run.config.pairing.other_side
    assert source is not None
    if source.column is None:
        assert sampled is not None
        for group, other in zip(groups, read_groups(sampled.path, arrays=True), strict=True):
            assert group.prompt.id == other.prompt.id
            yield _unscored(other.completions[0])
        return
    for group in groups:
        yield _of_column(run, group, source.column)


def _of_column(run: IterativeRun, group: CompletionGroup, column: str) -> Completion | None:
    """The completion in the prompt's column as token ids, at most `sampling.max_tokens` of them."""
    if (content := run.other_content(group.prompt)) is None:
        return None
    prompt = group.prompt.content
    if not isinstance(content, str) and not isinstance(prompt, str) and content[: len(prompt)] == list(prompt):
        content = content[len(prompt) :]  # the whole conversation
    try:
        return given_completion(
            run.tokenizer,
            group.prompt.content,
            group.prompt_ids,
            content,
            run.config.sampling.max_tokens,
            run.thinking,
        )
    except DataError as error:
        raise DataError(f"{run.place_of(group.prompt)}, column {column!r}: {error}") from error


def _unscored(completion: Completion) -> Completion:
    """Without log-probabilities: they are another policy's than the pair's."""
    return replace(completion, logprobs=[])


def _other_policy(run: IterativeRun, round: int) -> PolicyCheckpoint | None:
    """The other policy of `round`; None if there is none, or its completions are in a column."""
    match run.config.pairing.other_side:
        case None:
            return None
        case source if source.round is not None:
            return run.policy_after(min(source.round, round - 1))
        case source if source.model is not None:
            return run.other_model
    return None

"""A score for each completion, or an abstention: the training judge on a round's completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from iterdpo.escape import printable
from iterdpo.judging.judge import JudgeBase, RunJudge
from iterdpo.judging.shards import RETRY, NamedShard, StreamingJudge, completion_shards, judge_shards
from iterdpo.judging.stats import AbstentionCounts, JudgeMetrics
from iterdpo.run.artifacts import Completions, Judgments, write_card
from iterdpo.run.rundir import Manifest, Step, read_manifest, write_text
from iterdpo.stages.runs import IterativeRun
from iterdpo.types import CompletionGroup, Judgment


def judge(
    run: IterativeRun, round: int, completions: Completions, by: RunJudge, streaming: StreamingJudge | None = None
) -> Judgments:
    """The judge's scores of the completions. Judgments that a `streaming` judge made during sampling are reused."""
    step = run.dir.step(round, "judgments", inputs(completions.digest, by))
    if (manifest := step.manifest()) is None:
        run.warm_up_trainer(round)
        manifest = _judge(run, step, completions, by, streaming or run.streaming_judge(round))
    return Judgments.of(step.path, manifest)


def inputs(completions: str, by: RunJudge) -> dict[str, Any]:
    return {"judge": by.key, "completions": completions}


def retry_judgments(run: IterativeRun, round: int) -> tuple[Manifest, Manifest]:
    """Judge again what abstained in the finished judgments of `round`. Returns the manifests before and after.

    The old judgments are kept in the attic. What was made from them is now outdated, and refused until `--redo`. A
    StaleStepError if they were made by another judge, or for other completions.
    """
    before = read_manifest(run.dir.round_dir(round) / "judgments")
    sampled = read_manifest(run.dir.round_dir(round) / "completions")
    assert before is not None, f"round {round} has no judgments"
    assert sampled is not None, f"round {round} has no completions"
    step = run.dir.step(round, "judgments", inputs(sampled.digest, run.train_judge))
    write_text(step.reopen(keep=run.dir.attic) / RETRY, "")
    completions = Completions.of(run.dir.round_dir(round) / "completions", sampled)
    return before, _judge(run, step, completions, run.train_judge, run.streaming_judge(round))


def _judge(
    run: IterativeRun, step: Step, completions: Completions, by: RunJudge, streaming: StreamingJudge
) -> Manifest:
    directory = step.begin()
    metrics = JudgeMetrics()
    with run.turn_of(by):
        if (streamed := streaming.join()) is None:
            by.begin_stage()
        abstentions = judge_with_progress(
            run,
            "judge",
            by,
            completion_shards(completions.path),
            directory,
            total=completions.completions,
            streamed=lambda name: streaming.path_of(completions.path / f"{name}.parquet"),
            on_shard=metrics.add,
        )
        usage = by.used()
        run.release_judges()
    streaming.clear()
    write_card(directory, "shard-*.jsonl")
    counts = {**abstentions.result(), "metrics": metrics.result(), "usage": usage}
    return step.finish(counts=counts, seconds={"streamed": streamed or 0.0})


def judge_with_progress(
    run: IterativeRun,
    name: str,
    by: RunJudge,
    shards: Iterable[NamedShard],
    directory: Path,
    *,
    total: int,
    streamed: Callable[[str], Path] | None = None,
    on_shard: Callable[[Sequence[CompletionGroup], Sequence[Judgment]], object] = lambda groups, judgments: None,
) -> AbstentionCounts:
    """`judge_shards`, with its progress shown. Returns the abstentions of all judgments."""
    abstentions, total_score, judged = AbstentionCounts(), 0.0, 0
    with run.progress.stage(name, total, "completions") as stage:

        def load() -> JudgeBase:
            judge = by.load()
            stage.begin()
            return judge

        def note(groups: Sequence[CompletionGroup], judgments: Sequence[Judgment]) -> None:
            nonlocal total_score, judged
            on_shard(groups, judgments)
            abstentions.add(judgments)
            scores = [score for j in judgments for score in j.scores if score is not None]
            total_score, judged = total_score + sum(scores), judged + len(scores)
            stage.advance(sum(len(j.scores) for j in judgments))

        judge_shards(by, shards, directory, total=total, load=load, streamed=streamed, on_shard=note)
        stage.remark = f"{by.named.use.rpartition('/')[2]}: "
        stage.remark += f"mean score {total_score / judged:.3f}" if judged else "nothing judged"
        if counts := abstentions.result()["abstentions"]:
            stage.remark += f", {stage.done - judged} abstentions ({printable(next(iter(counts)))[:80]})"
    return abstentions

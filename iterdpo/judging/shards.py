"""Judging shard by shard: each shard's judgments are durable as soon as they are whole, and none is made twice.

`judge_shards` does a stage's judging, with its budget of abstentions. `StreamingJudge` judges a shard while the next is
sampled, and stores the judgments for the stage.
"""

from __future__ import annotations

import contextvars
import itertools
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from iterdpo.errors import JudgingStopped, UserError
from iterdpo.escape import printable
from iterdpo.judging.judge import JudgeBase, RunJudge, judgments_in_turn
from iterdpo.judging.stats import AbstentionCounts
from iterdpo.run.artifacts import read_completion_shard, read_judgment_shard, write_judgment_shard
from iterdpo.run.rundir import digest, write_text
from iterdpo.run.sums import sha256_file
from iterdpo.types import CompletionGroup, Judgment

RETRY = ".retry"
"""In a step under way: judge what abstained again. Written if the budget stopped a stage, and by `judge retry`."""

NamedShard = tuple[str, Sequence[CompletionGroup]]
"""A shard's name, which is that of its judgments too, and its groups: `("shard-000000", [group, …])`."""


def completion_shards(directory: Path) -> Iterator[NamedShard]:
    """Each shard of completions in `directory`, read when it is asked for."""
    for path in sorted(directory.glob("shard-*.parquet")):
        yield path.stem, read_completion_shard(path)


def judge_shards(
    judge: RunJudge,
    shards: Iterable[NamedShard],
    directory: Path,
    *,
    total: int,
    load: Callable[[], JudgeBase] | None = None,
    streamed: Callable[[str], Path] | None = None,
    on_shard: Callable[[Sequence[CompletionGroup], Sequence[Judgment]], object] = lambda groups, judgments: None,
) -> None:
    """Make the missing judgments in `directory`, in the order of the shards.

    Args:
        judge: which judge, and how many of the `total` completions it may leave without a score. More abstentions
            raise JudgingStopped; what was judged stays.
        shards: see `completion_shards`; one at a time is in memory, or a few if the judge works ahead.
        directory: a step under way, or a directory within one.
        total: completions of all shards.
        load: called in place of `judge.load` if anything is missing.
        streamed: where a `StreamingJudge` left the judgments of the shard of this name, if it did.
        on_shard: called with each shard's groups and judgments, in order, also if they were made before.
    """
    named, expected = judge.named, judge.named.expected_abstentions
    most = total if named.max_abstained_count is None else named.max_abstained_count
    allowed = min(int(named.max_abstained * total), most)
    retry = (directory / RETRY).exists()
    counted = AbstentionCounts(leave_out=expected)

    def tasks() -> Iterator[_Task]:
        for name, sampled in shards:
            groups = judge.shown(sampled)
            target = directory / f"{name}.jsonl"
            made = target if target.exists() or streamed is None else streamed(name)
            known = read_judgment_shard(made) if made.exists() else None
            missing = range(len(groups)) if known is None else _unjudged(known, expected) if retry else ()
            yield _Task(target, groups, known or [], missing, write=retry or not target.exists())

    with closing(_work_off(load or judge.load, tasks())) as done:
        for task, judgments in done:
            if task.write:
                write_judgment_shard(task.target, judgments)
            on_shard(task.groups, judgments)
            counts = counted.add(judgments).result()
            if counts["unjudged"] > allowed:
                write_text(directory / RETRY, "")
                reasons = "".join(f"  {n:>8,}  {printable(reason)}\n" for reason, n in counts["abstentions"].items())
                raise JudgingStopped(
                    f"{named.role.replace('_', ' ')} {named.use}: the judge abstained on {counts['unjudged']:,} of "
                    f"{counts['completions']:,} completions so far, but this stage allows {allowed:,} of its {total:,} "
                    f"(max_abstained, max_abstained_count):\n{reasons}The judgments so far are kept in {directory}. "
                    "Fix the cause and run the same command again: it judges only the missing completions"
                )


@dataclass
class _Task:
    """A shard of which `known` has the judgments, but for the groups at the indices `missing`."""

    target: Path
    groups: Sequence[CompletionGroup]
    known: Sequence[Judgment]
    missing: Sequence[int]
    write: bool = True


def _work_off(load: Callable[[], JudgeBase], tasks: Iterable[_Task]) -> Generator[tuple[_Task, list[Judgment]]]:
    """Each task in order with all of its judgments, as soon as they are there. The judge may be some tasks ahead."""
    for incomplete, run in itertools.groupby(tasks, key=lambda task: bool(task.missing)):
        if incomplete:
            yield from _judged(load, run)
        else:
            yield from ((task, list(task.known)) for task in run)


def _judged(load: Callable[[], JudgeBase], tasks: Iterable[_Task]) -> Generator[tuple[_Task, list[Judgment]]]:
    begun: deque[tuple[_Task, list[Judgment]]] = deque()

    def missing() -> Iterator[list[CompletionGroup]]:
        for task in tasks:
            begun.append((task, []))
            yield [task.groups[i] for i in task.missing]

    with closing(judgments_in_turn(load, missing())) as judgments:
        for judgment in judgments:
            task, fresh = begun[0]
            fresh.append(judgment)
            if len(fresh) == len(task.missing):
                begun.popleft()
                judged = {**dict(enumerate(task.known)), **dict(zip(task.missing, fresh, strict=True))}
                yield task, [judged[i] for i in range(len(task.groups))]


class StreamingJudge:
    """Judges shards in a separate thread, in the order in which they are put, while the next ones are sampled.

    It is made for a round by the loop, started by the stage `sample` if there is anything to sample, and joined by
    the stage `judge`. Its thread has the context variables of the caller of `start`: a judge that waits for a person
    finds its Prefect run. After a failure nothing more is judged. The next `put` raises user errors and
    interruptions; any other error is dropped here, and recurs when the stage judges the shard itself.
    """

    def __init__(self, judge: RunJudge, directory: Path) -> None:
        """`directory`: where judgments wait for the stage, in files named by content."""
        self._judge, self._directory = judge, directory
        self._seconds = 0.0
        self._error: BaseException | None = None
        self._cancelled = False
        self._shards: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless the judge may need the device that samples, or its configuration says not to."""
        stream = self._judge.named.stream
        if stream is False or (stream is None and self._judge.load().needs_device):
            return
        self._judge.begin_stage()
        self._directory.mkdir(parents=True, exist_ok=True)
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=[self._work], name="streaming-judge", daemon=True)
        self._thread.start()

    def put(self, shard: Path) -> None:
        """Judge the completions in the file `shard`."""
        if isinstance(self._error, UserError) or not isinstance(self._error, Exception | None):
            raise self._error
        if self._thread is not None:
            self._shards.put(shard)

    def join(self) -> float | None:
        """Wait for the shards that were put. Returns the seconds that judging took; None if it never started."""
        if self._thread is None:
            return None
        self._shards.put(None)
        self._thread.join()
        return self._seconds

    def cancel(self) -> None:
        """Begin no further shard, and do not wait."""
        self._cancelled = True
        self._shards.put(None)

    def path_of(self, shard: Path) -> Path:
        """The file for the judgments of this file of completions. Equal judge and content give an equal name."""
        return self._directory / f"{digest([self._judge.key, sha256_file(shard)])}.jsonl"

    def clear(self) -> None:
        """Delete what the stage has taken over."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _work(self) -> None:
        while (shard := self._shards.get()) is not None:
            started = time.perf_counter()
            try:
                with closing(_work_off(self._judge.load, self._tasks(shard))) as done:
                    for task, judgments in done:
                        write_judgment_shard(task.target, judgments)
                        if self._cancelled:
                            break
            except BaseException as error:
                self._error = error
            self._seconds += time.perf_counter() - started

    def _tasks(self, shard: Path | None) -> Iterator[_Task]:
        """What `shard` and the shards that wait after it lack."""
        while shard is not None:
            try:
                task = self._task(shard)
            except FileNotFoundError:  # the step was sealed meanwhile: `completions.partial` is `completions`
                task = self._task(shard.parent.with_suffix("") / shard.name)
            if task is not None:
                yield task
            if self._shards.empty():
                return
            shard = self._shards.get()
        self._shards.put(None)  # which ends the thread

    def _task(self, shard: Path) -> _Task | None:
        target = self.path_of(shard)
        if self._cancelled or self._error is not None or target.exists():
            return None
        groups = self._judge.shown(read_completion_shard(shard))
        return _Task(target, groups, [], range(len(groups)))


def _unjudged(judgments: Sequence[Judgment], expected: Collection[str]) -> list[int]:
    """Those with an abstention that was not expected."""
    return [i for i, judgment in enumerate(judgments) if not {None, *expected}.issuperset(judgment.abstentions)]

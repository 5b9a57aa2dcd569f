"""Completions and judgments shard by shard, on disk, in order: each durable as soon as it is whole, none made twice.

`judge_shards` is a stage's judging, with its budget of abstentions. `EarlyJudge` judges a shard while the next is
sampled, and leaves what it made where the stage finds it.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgingStopped, UserError
from iterdpo.judging.judge import JudgeBase, NamedJudge, judgments_in_turn
from iterdpo.judging.stats import AbstentionCounts, printable
from iterdpo.run.rundir import digest, read_jsonl, write_jsonl, write_text
from iterdpo.types import CompletionGroup, Judgment

RETRY = ".retry"
"""In a step under way: judge what abstained again. Written where the budget stopped a stage, and by `judge retry`."""


def shard_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.jsonl"))


def read_groups(directory: Path) -> list[CompletionGroup]:
    return [group for shard in shard_paths(directory) for group in _groups(shard)]


def group_shards(directory: Path) -> Iterator[tuple[str, list[CompletionGroup]]]:
    """(name, groups) of each shard, read when it is asked for."""
    for shard in shard_paths(directory):
        yield shard.name, _groups(shard)


def read_judgments(directory: Path) -> list[Judgment]:
    return [judgment for shard in shard_paths(directory) for judgment in _judgments(shard)]


def judge_key(named: NamedJudge) -> dict[str, str]:
    """What of a judge goes into the key of its results."""
    return {"use": named.use.rpartition("/")[2], "version": named.version}


def judge_shards(
    named: NamedJudge,
    load: Callable[[], JudgeBase],
    shards: Iterable[tuple[str, list[CompletionGroup]]],
    directory: Path,
    *,
    total: int,
    early: Path | None = None,
    on_shard: Callable[[Sequence[Judgment]], None] = lambda fresh: None,
) -> list[Judgment]:
    """Judge what is missing in `directory`. Returns all judgments, in the order of the groups.

    Args:
        named: which judge, and how many of the `total` completions it may leave without a score.
        load: gives the judge; called where something is missing.
        shards: see `group_shards`.
        directory: a step under way, or a directory within one.
        total: completions of all shards.
        early: where an `EarlyJudge` left what it made.
        on_shard: called with the judgments of each shard.

    Raises:
        JudgingStopped: more abstentions than allowed. What was judged stays.
    """
    judgments: list[Judgment] = []
    allowed = min(
        int(named.max_abstained * total), total if named.max_abstained_count is None else named.max_abstained_count
    )
    counted = AbstentionCounts(leave_out=named.by_design)
    retry = (directory / RETRY).exists()

    def tasks() -> Iterator[_Task]:
        for name, groups in shards:
            target = directory / name
            made = target if target.exists() or early is None else early / _early_name(named, groups)
            known = _judgments(made) if made.exists() else None
            missing = range(len(groups)) if known is None else _unjudged(known, named.by_design) if retry else ()
            yield _Task(target, groups, known or [], missing, write=retry or not target.exists())

    with closing(_work_off(load, tasks())) as done:
        for task, fresh in done:
            if task.write:
                write_jsonl(task.target, (j.to_json() for j in fresh))
            judgments += fresh
            on_shard(fresh)
            counts = counted.add(fresh).result()
            if counts["unjudged"] > allowed:
                write_text(directory / RETRY, "")
                raise JudgingStopped(_stopped(named, counts, total, allowed, directory))
    return judgments


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
    tasks = iter(tasks)
    begun: deque[tuple[_Task, list[Judgment]]] = deque()

    def missing(first: _Task) -> Iterator[list[CompletionGroup]]:
        for task in chain([first], tasks):
            begun.append((task, []))
            yield [task.groups[i] for i in task.missing]

    def done() -> Iterator[tuple[_Task, list[Judgment]]]:
        while begun and len(begun[0][1]) == len(begun[0][0].missing):
            task, fresh = begun.popleft()
            judged = {**dict(enumerate(task.known)), **dict(zip(task.missing, fresh, strict=True))}
            yield task, [judged[i] for i in range(len(task.groups))]

    for task in tasks:
        if not task.missing:  # needs no judge yet
            yield task, list(task.known)
            continue
        with closing(judgments_in_turn(load, missing(task))) as judgments:
            for judgment in judgments:
                yield from done()  # those before it in which nothing was missing
                begun[0][1].append(judgment)
                yield from done()
    yield from done()


class EarlyJudge:
    """Judges shards in a thread of its own, in the order in which they are put, beside whatever else goes on.

    The thread has the context variables of whoever made it: a judge that waits for a person finds its Prefect run.
    After a failure nothing more is judged. The next `put` raises it where it is the user's to mend, or no failure but
    an interruption (the run was cancelled in Prefect); the stage that comes later meets any other by itself.
    """

    def __init__(self, named: NamedJudge, judge: JudgeBase, directory: Path) -> None:
        self.seconds = 0.0
        self._error: BaseException | None = None
        self._cancelled = False
        self._named, self._judge, self._directory = named, judge, directory
        self._shards: queue.SimpleQueue[list[CompletionGroup] | None] = queue.SimpleQueue()
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=[self._work], name="early-judge", daemon=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def put(self, groups: list[CompletionGroup]) -> None:
        if isinstance(self._error, UserError) or not isinstance(self._error, Exception | None):
            raise self._error
        self._shards.put(groups)

    def join(self) -> float:
        """Wait for what was put. Returns the seconds that judging took."""
        self._shards.put(None)
        self._thread.join()
        return self.seconds

    def cancel(self) -> None:
        """Begin no further shard, and do not wait."""
        self._cancelled = True
        self._shards.put(None)

    def _work(self) -> None:
        while (groups := self._shards.get()) is not None:
            started = time.perf_counter()
            try:
                with closing(_work_off(lambda: self._judge, self._tasks(groups))) as judged:
                    for task, fresh in judged:
                        write_jsonl(task.target, (j.to_json() for j in fresh))
                        if self._cancelled:
                            break
            except BaseException as error:
                self._error = error
            self.seconds += time.perf_counter() - started

    def _tasks(self, groups: list[CompletionGroup] | None) -> Iterator[_Task]:
        """What `groups` and the shards that wait behind them lack."""
        while groups is not None:
            target = self._directory / _early_name(self._named, groups)
            if not (self._cancelled or self._error is not None or target.exists()):
                yield _Task(target, groups, [], range(len(groups)))
            if self._shards.empty():
                return
            groups = self._shards.get()
        self._shards.put(None)  # which ends the thread


def _early_name(named: NamedJudge, groups: Sequence[CompletionGroup]) -> str:
    """Named by content, so that it is found by whoever judges the same completions by the same judge."""
    return f"{digest([judge_key(named), [g.to_json() for g in groups]])}.jsonl"


def _unjudged(judgments: Sequence[Judgment], by_design: Collection[str]) -> list[int]:
    """Those in which something abstained, other than by design."""
    return [i for i, judgment in enumerate(judgments) if not {None, *by_design}.issuperset(judgment.abstentions)]


def _stopped(named: NamedJudge, counts: dict[str, Any], total: int, allowed: int, directory: Path) -> str:
    rows = "\n".join(f"  {count:>8,}  {printable(reason)}" for reason, count in counts["abstentions"].items())
    return (
        f"{named.role.replace('_', ' ')} {named.use}: {counts['unjudged']:,} of {counts['completions']:,} completions "
        f"could not be judged, and {allowed:,} of the stage's {total:,} may (max_abstained, max_abstained_count):\n"
        f"{rows}\nWhat was judged is kept in {directory}. Once the cause is mended, the same command goes on, and asks "
        "again only for what is missing"
    )


def _groups(shard: Path) -> list[CompletionGroup]:
    return [CompletionGroup.from_json(row) for row in read_jsonl(shard)]


def _judgments(shard: Path) -> list[Judgment]:
    return [Judgment.from_json(row) for row in read_jsonl(shard)]

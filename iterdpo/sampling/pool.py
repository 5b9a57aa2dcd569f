"""Several engines that sample from one queue of shards.

    caller --(batches, in order)--> Queue <--(take, put)-- a thread for each engine
    caller <--(results, in order)-- Queue

Each engine takes the next batch when it has room, so that a slow one takes fewer. The batches of an engine that dies go
back to the front of the queue, and the engine is started again. What is sampled does not depend on which engine did it,
if a sampler keeps what `Sampler.sample` promises.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from iterdpo.errors import ChildFailed
from iterdpo.sampling.base import Batch, Sampler, SamplingParameters
from iterdpo.types import Completion

R = TypeVar("R")
Groups = list[list[Completion]]


@dataclass
class Job:
    """A batch on its way: `Job(number=3, batch=([[1, 2]], [7]), engine=1, lost=0)`."""

    number: int
    batch: Batch
    engine: int = -1
    lost: int = 0
    """How many engines have died with it."""


class Deal:
    """Which batch is next, and whose turn it is. Without threads, clocks or engines.

    `most` batches wait to be taken at any time. If the first result is late, no further batch is read once more results
    are kept than a few times those on their way. No engine takes many more than another has, so that at the end of a
    stage none is idle while another has a row of them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.waiting: deque[Job] = deque()
        self._results: dict[int, Groups] = {}
        self._read = self._given = 0
        self.held: dict[int, int] = {}  # how many batches each engine has that is at work
        self.ended = False

    def hungry(self) -> bool:
        """Whether another batch should be read."""
        few = len(self.waiting) < self._most and len(self._results) <= 4 * self._most + 2 * self.flying
        return few and not self.ended

    @property
    def flying(self) -> int:
        return sum(self.held.values())

    def add(self, batch: Batch | None) -> None:
        """The next batch that was read; None: there are no more."""
        if batch is None:
            self.ended = True
        else:
            self.waiting.append(Job(self._read, batch))
            self._read += 1

    def take(self, engine: int) -> Job | None:
        """The batch that waits the longest, for an engine; None: none waits, or the engine has more than others."""
        held = self.held.setdefault(engine, 0)
        if not self.waiting or held > min(self.held.values()) + 1:
            return None
        self.held[engine] += 1
        job = self.waiting.popleft()
        job.engine = engine
        return job

    def put(self, job: Job, groups: Groups) -> None:
        assert job.number >= self._given
        assert job.number not in self._results
        self.held[job.engine] -= 1
        self._results[job.number] = groups

    def give_back(self, engine: int, jobs: Sequence[Job]) -> None:
        """All that an engine has, because it died. They are the next ones to be taken."""
        self.held.pop(engine, None)
        for job in reversed(jobs):
            job.lost += 1
            self.waiting.appendleft(job)

    def next_result(self) -> Groups | None:
        """Of the first batch whose result was not given; None: it is not there."""
        if (groups := self._results.pop(self._given, None)) is not None:
            self._given += 1
        return groups

    def over(self) -> bool:
        """Whether no engine will be needed again."""
        return self.ended and not self.waiting and not self.flying

    def due(self) -> bool:
        return self._given in self._results


class Queue:
    """A `Deal` between the caller's thread, which reads batches and gets their results, and one for each engine."""

    def __init__(self, batches: Iterable[Batch], *, most: int) -> None:
        self._source, self._deal = iter(batches), Deal(most)
        self._changed = threading.Condition()
        self._attended = False  # the caller is here, and reads
        self.stopped = False
        self._error: BaseException | None = None

    def results(self) -> Generator[Groups]:
        """The groups of each batch, in the order of the batches. Raises what `fail` was given."""
        deal = self._deal
        try:
            while True:
                with self._changed:
                    self._attended = True
                    self._changed.wait_for(lambda: self._error or deal.hungry() or deal.due() or deal.over())
                    if self._error is not None:
                        raise self._error
                    hungry, groups = deal.hungry(), None
                    if not hungry:
                        groups = deal.next_result()
                        if groups is None:
                            return
                        self._attended = False
                        self._changed.notify_all()
                if hungry:
                    batch = next(self._source, None)
                    with self._changed:
                        deal.add(batch)
                        self._changed.notify_all()
                else:
                    assert groups is not None
                    yield groups
        finally:
            self.stop()

    def take(self, engine: int, *, idle: bool) -> Job | None:
        """The next batch, for an engine that has none (`idle`), or has others on their way; None: there is none now.

        An idle engine waits until all are done: another may die with its batches.
        """
        deal = self._deal

        def settled() -> bool:
            if self.stopped or deal.waiting:
                return True
            return deal.over() if idle else not (self._attended and deal.hungry())

        with self._changed:
            self._changed.wait_for(settled)
            job = None if self.stopped else deal.take(engine)
            self._changed.notify_all()
            return job

    def put(self, job: Job, groups: Groups) -> None:
        with self._changed:
            self._deal.put(job, groups)
            self._changed.notify_all()

    def give_back(self, engine: int, jobs: Sequence[Job]) -> None:
        with self._changed:
            self._deal.give_back(engine, jobs)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let `results` raise this, and deal nothing more."""
        with self._changed:
            self._error = self._error or error
        self.stop()

    def stop(self) -> None:
        """No batch is dealt from now on."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    @property
    def open(self) -> bool:
        """Whether a batch waits, or may come (back)."""
        with self._changed:
            return not self.stopped and not self._deal.over()


class Pool(Sampler):
    """Engines that take turns at one queue; one engine is a pool, too.

    Args:
        engines: samplers that raise ChildFailed if their process is lost, and start a new one at the next `load`.
        restarts: how often an engine is started again before it is given up, and a batch tried again with another.
        say: called with a note for the user.
    """

    def __init__(
        self, engines: Sequence[Sampler], *, restarts: int = 2, say: Callable[[str], None] = lambda text: None
    ) -> None:
        assert engines
        self.engines, self._restarts, self._say = list(engines), restarts, say
        self._alive = [False] * len(engines)
        self._stopping = False
        self._policy: tuple[Path, str] | None = None

    def warm_up(self) -> None:
        """Let each engine that can be started beforehand begin to start, without waiting for it."""
        for engine in self.engines:
            if (warm_up := getattr(engine, "warm_up", None)) is not None:
                warm_up()

    def load(self, policy: Path, digest: str) -> None:
        """All engines at once. One that is lost is started again; an error if none has the policy in the end."""
        self._policy, self._stopping = (policy, digest), False
        failures = [failed for failed in self._each(self._load_one) if failed is not None]
        if not any(self._alive):
            raise failures[0]
        for failed in failures:
            self._say(f"going on with {sum(self._alive)} of {len(self.engines)} engines: {failed}")

    def _load_one(self, number: int) -> ChildFailed | None:
        """Why it has not taken the policy. What has never run is not tried twice: it would fail alike."""
        assert self._policy is not None
        for left in reversed(range(self._restarts + 1 if self._alive[number] else 1)):
            try:
                self.engines[number].load(*self._policy)
            except ChildFailed as failed:
                if not left or self._stopping:
                    self._alive[number] = False
                    return failed
                self._say(f"starting an engine again: {failed}")
            else:
                self._alive[number] = True
                break
        return None

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        [groups] = self.sample_batches([(list(prompt_ids), list(seeds))], parameters)
        return groups

    def sample_batches(self, batches: Iterable[Batch], parameters: SamplingParameters) -> Generator[Groups]:
        """In order, while the engines work on. If the caller stops early, the engines that are at work are closed."""
        assert self._policy is not None, "load a policy first"
        numbers = [number for number, alive in enumerate(self._alive) if alive]
        queue = Queue(batches, most=len(numbers))
        self._stopping = False
        taken: list[deque[Job]] = [deque() for _ in self.engines]

        def work(number: int) -> None:
            try:
                while queue.open and self._alive[number]:
                    self._work(number, queue, taken[number], parameters)
            except BaseException as error:
                queue.fail(error)

        with ThreadPoolExecutor(len(numbers), "engine") as threads:
            at_work = {threads.submit(work, number): number for number in numbers}
            try:
                yield from queue.results()
            finally:
                queue.stop()
                self._end(at_work)

    def _work(self, number: int, queue: Queue, taken: deque[Job], parameters: SamplingParameters) -> None:
        """Let an engine sample until the queue is empty, or it dies; then start it again."""
        engine = self.engines[number]

        def dealt() -> Iterator[Batch]:
            while (job := queue.take(number, idle=not taken)) is not None:
                taken.append(job)
                yield job.batch

        try:
            for groups in engine.sample_batches(dealt(), parameters):
                queue.put(taken.popleft(), groups)
        except ChildFailed as failed:
            if queue.stopped:
                return
            lost = list(taken)
            taken.clear()
            if any(job.lost >= self._restarts for job in lost):
                raise
            queue.give_back(number, lost)
            prompts = sum(len(job.batch[0]) for job in lost)
            self._say(f"an engine is lost, and {prompts} prompts are dealt again: {failed}")
            gone = self._load_one(number)
            if gone is not None and not any(self._alive):
                raise gone from failed

    def release(self) -> None:
        self._each(self._release_one)

    def _release_one(self, number: int) -> None:
        try:
            self.engines[number].release()
        except ChildFailed as failed:  # it has ended, and its memory is free
            self._say(f"an engine is lost after its work: {failed}")

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def _each(self, call: Callable[[int], R]) -> list[R]:
        numbers = range(len(self.engines))
        if len(self.engines) == 1:
            return [call(0)]
        with ThreadPoolExecutor(len(self.engines), "engine") as threads:
            at_work = {threads.submit(call, number): number for number in numbers}
            try:
                for thread in wait(at_work, return_when=FIRST_EXCEPTION).done:
                    thread.result()
                return [thread.result() for thread in at_work]
            finally:
                self._end(at_work)

    def _end(self, at_work: Mapping[Future[Any], int]) -> None:
        """Close the engines, by thread, that are still at work: nobody waits for what they make."""
        self._stopping = True
        while busy := wait(at_work, timeout=0.2).not_done:
            for thread in busy:  # again and again: an engine may just be starting
                self.engines[at_work[thread]].close()

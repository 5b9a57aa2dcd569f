"""Many jobs at once in an event loop, their results in order; and those results for code that is not asynchronous."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

LEAD = 4
"""Up to `LEAD * concurrency` jobs of `run_each` are queued ahead of the next result, which may be slow."""


async def run_each(jobs: Iterable[Callable[[], Awaitable[T]]], *, concurrency: int) -> AsyncGenerator[T]:
    """The results of the jobs, in their order, each as soon as it is ready. At most `concurrency` jobs run at once.

    Up to `LEAD * concurrency` jobs are queued ahead of the next result, so that one slow job does not stall the others at
    once. If a job raises, the results before it that are ready are still yielded, and the other jobs are cancelled. If
    `jobs` raises, the jobs taken before are finished first. Closing the generator cancels all jobs under way.
    """
    slots = asyncio.Semaphore(concurrency)
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    ahead: deque[asyncio.Task[T]] = deque()
    broken: Exception | None = None

    async def run(job: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            if failed.done():
                raise asyncio.CancelledError
            try:
                return await job()
            except BaseException as error:
                if not failed.done():
                    failed.set_result(error)
                raise

    rest = iter(jobs)
    try:
        while True:
            try:
                ahead.extend(asyncio.create_task(run(job)) for job in islice(rest, LEAD * concurrency - len(ahead)))
            except Exception as error:
                broken, rest = error, iter(())
            if not ahead:
                break
            await asyncio.wait((ahead[0], failed), return_when=asyncio.FIRST_COMPLETED)
            if not ahead[0].done() or ahead[0].cancelled() or ahead[0].exception():
                raise failed.result()
            yield ahead.popleft().result()
        if broken is not None:
            raise broken
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


def in_own_loop(results: AsyncGenerator[T]) -> Generator[T]:
    """`results` for code that is not asynchronous. Work on them goes on only while the next one is awaited."""
    with asyncio.Runner() as runner:
        try:
            while True:
                yield runner.run(anext(results))
        except StopAsyncIteration:
            return
        except GeneratorExit:  # only then is it not in the middle of something, which the runner would cancel
            runner.run(results.aclose())
            raise

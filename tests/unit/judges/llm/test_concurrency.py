"""Jobs side by side, their results in order."""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.llm.concurrency import LEAD, in_own_loop, run_each


def test_jobs_are_taken_one_by_one_and_their_results_are_in_order() -> None:
    taken = running = most = done = 0

    async def job(n: int) -> int:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        assert taken <= done + LEAD * 7  # no more are taken, however many there are
        await asyncio.sleep(0.001 * (n % 3))
        running -= 1
        done += 1
        return n * n

    def jobs() -> Iterator[Any]:
        nonlocal taken
        for n in range(500):
            taken += 1
            yield functools.partial(job, n)

    assert list(in_own_loop(run_each(jobs(), concurrency=7))) == [n * n for n in range(500)]
    assert most == 7
    assert list(in_own_loop(run_each([], concurrency=7))) == []


class Interruption(BaseException):
    """As Prefect's handler of SIGTERM raises one, in the middle of whatever the main thread does."""


@pytest.mark.parametrize("error", [JudgeError("stop"), ValueError("stop"), Interruption("stop")])
def test_an_exception_cancels_the_other_jobs_and_rises_as_it_is(error: BaseException) -> None:
    started: list[int] = []
    cancelled: list[int] = []

    async def job(n: int) -> None:
        started.append(n)
        if n == 2:
            raise error
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(n)
            raise

    with pytest.raises(type(error), match=r"^stop$"):
        next(in_own_loop(run_each((functools.partial(job, n) for n in range(100)), concurrency=4)))
    assert set(started) <= {0, 1, 2, 3}
    assert sorted(cancelled) == [n for n in sorted(started) if n != 2]


async def later(n: int) -> int:
    await asyncio.sleep(0.001 * n)
    return n


def test_what_was_done_before_a_job_that_raises_counts() -> None:
    async def job(n: int) -> int:
        if n == 2:
            await asyncio.sleep(0.01)  # until those before it are done
            raise JudgeError("stop")
        return n

    results = in_own_loop(run_each((functools.partial(job, n) for n in range(9)), concurrency=3))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(JudgeError, match=r"^stop$"):
        next(results)


def test_the_jobs_before_one_that_cannot_be_read_are_worked_off() -> None:
    def jobs() -> Iterator[Any]:
        yield from (functools.partial(later, n) for n in range(5))
        raise ValueError("shard-0001.jsonl, line 3")

    results = in_own_loop(run_each(jobs(), concurrency=2))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="line 3"):
        next(results)


def test_an_interruption_rises_as_it_is_and_ends_what_is_under_way() -> None:
    ended: list[int] = []

    async def job(n: int) -> None:
        try:
            await asyncio.sleep(10)
        finally:
            ended.append(n)

    def interrupt(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interruption):
            list(in_own_loop(run_each((functools.partial(job, n) for n in range(9)), concurrency=3)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sorted(ended) == [0, 1, 2]


def test_closing_the_results_early_ends_what_is_under_way() -> None:
    ended: list[int] = []

    async def job(n: int) -> int:
        try:
            return await later(50 * n)
        finally:
            ended.append(n)

    results = in_own_loop(run_each((functools.partial(job, n) for n in range(9)), concurrency=3))
    assert next(results) == 0
    results.close()
    assert sorted(ended) == [0, 1, 2, 3]

"""Jobs side by side, their results in order; the retry loop, with waits that are noted in place of slept; Retry-After; and the key."""

from __future__ import annotations

import asyncio
import functools
import signal
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.llm.transport import (
    LEAD,
    Failure,
    authorization,
    checked_key_name,
    in_own_loop,
    retry_after_seconds,
    run_each,
    with_retries,
)


def tried(*outcomes: Any, **limits: Any) -> tuple[Any, list[float]]:
    """The result of attempts with these outcomes, and the waits between them; jitter is at its most."""
    rest, waits = iter(outcomes), []

    async def attempt() -> Any:
        return next(rest)

    async def pause(seconds: float, failure: Failure) -> None:
        waits.append(seconds)

    settings = {"attempts": 10, "backoff": 1.0, "max_backoff": 30.0, **limits}
    return asyncio.run(with_retries(attempt, pause=pause, **settings)), waits


@pytest.fixture(autouse=True)
def _most_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("judges.llm.transport.random.uniform", lambda low, high: high)


BUSY = Failure("HTTP 503")


def test_the_longest_wait_doubles_up_to_its_bound() -> None:
    assert tried(*[BUSY] * 7, "A") == ("A", [1, 2, 4, 8, 16, 30, 30])


def test_a_server_may_ask_for_a_longer_wait_than_the_bound() -> None:
    assert tried(Failure("HTTP 429", retry_after=99), BUSY, "A") == ("A", [99, 2])


def test_the_last_failure_is_the_result_and_nothing_is_waited_for_after_it() -> None:
    assert tried(BUSY, Failure("HTTP 500"), attempts=2) == (Failure("HTTP 500"), [1])


def test_a_failure_that_would_come_again_is_not_tried_again() -> None:
    refused = Failure("HTTP 422", retry=False)
    assert tried(refused) == (refused, [])


def test_many_attempts_overflow_no_number() -> None:
    assert tried(*[BUSY] * 2000, "A", attempts=3000, max_backoff=1e300)[0] == "A"


def test_retry_after_is_read_as_seconds_or_a_date() -> None:
    assert [retry_after_seconds(h) for h in (None, "", "soon", "-5", "inf", "2.5", "120")] == [0, 0, 0, 0, 0, 2.5, 120]
    assert 500 < retry_after_seconds(formatdate(time.time() + 600, usegmt=True)) <= 600
    assert retry_after_seconds("Tue, 01 Jan 1980 00:00:00 GMT") == 0


def test_the_key_comes_from_the_variable_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert authorization(None, owner="remote") == {}
    monkeypatch.setenv("MY_KEY", " secret\n")
    assert authorization("MY_KEY", owner="remote") == {"Authorization": "Bearer secret"}
    monkeypatch.setenv("MY_KEY", "sécret")
    with pytest.raises(JudgeError, match=r"remote: .*MY_KEY has characters that a key cannot have") as raised:
        authorization("MY_KEY", owner="remote")
    assert "cret" not in str(raised.value)


def test_a_key_is_no_name_and_is_not_repeated() -> None:
    checked_key_name("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="is the name of an environment variable") as raised:
        checked_key_name("sk-secret")
    assert "secret" not in str(raised.value)


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

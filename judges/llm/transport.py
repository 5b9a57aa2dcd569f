"""For every judge that asks a server: many jobs at once, their results in order, and for each of them the key, one
HTTP request with its attempts, and the retry loop.

The loop is written out because it is shorter than a configuration of tenacity: an attempt reports its failure as a
value with the server's Retry-After, and the caller's pause ends early with its deadlines and its circuit breaker, so
that tenacity would need our own wait, stop, retry and sleep.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from iterdpo.errors import JudgeError

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

LEAD = 4
"""Up to `LEAD * concurrency` jobs of `run_each` are queued ahead of the next result, which may be slow."""

RETRIED = {408, 409, 425, 429}
"""HTTP statuses that are tried again, besides 500 and above."""
REFUSED = {400, 413, 422}
"""HTTP statuses that refuse this one request. All others are mistakes in the configuration."""


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


class Failure(NamedTuple):
    """An attempt that failed: `Failure("HTTP 429", retry_after=3.0)`. `retry`: another attempt may succeed."""

    reason: str
    retry_after: float = 0.0
    retry: bool = True


async def with_retries(
    attempt: Callable[[], Awaitable[T | Failure]],
    pause: Callable[[float, Failure], Awaitable[None]],
    attempts: int,
    backoff: float,
    max_backoff: float,
) -> T | Failure:
    """The first result of `attempt` that is no failure, or the last failure.

    The wait before the second attempt is drawn between 0 and `backoff` seconds; that bound doubles with each further
    attempt, up to `max_backoff`, and a server's Retry-After may ask for more. `pause` sleeps for so many seconds after a
    failure, or raises if there should be no further attempt.
    """
    for made in count(1):
        outcome = await attempt()
        if not isinstance(outcome, Failure) or not outcome.retry or made == attempts:
            break
        # Full jitter; it changes no result, and so has no seed.
        jitter = random.uniform(0, min(max_backoff, backoff * 2 ** min(made - 1, 60)))
        await pause(max(jitter, outcome.retry_after), outcome)
    return outcome


async def brief_pause(seconds: float, _: Failure) -> None:
    """The `pause` of `with_retries` before a run begins: one second at most, whatever a server asks for."""
    await asyncio.sleep(min(seconds, 1.0))


async def post(
    session: aiohttp.ClientSession, url: str, data: bytes, *, seconds: float, limit: float, headers: Mapping[str, str]
) -> tuple[int, bytes] | Failure:
    """One attempt of at most `seconds`: status and body, unless another attempt may succeed.

    `limit` is the number of seconds that the reason for a time-out names.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with session.post(url, data=data, headers=headers, timeout=timeout, allow_redirects=False) as response:
            status, body = response.status, await response.read()
    except TimeoutError:
        return Failure(f"timed out after {limit:g} s")
    except (aiohttp.ClientError, OSError) as error:
        return Failure(_connection_reason(error))
    if status in RETRIED or status >= 500:
        return Failure(f"HTTP {status}", retry_after_seconds(response.headers.get("Retry-After")))
    return status, body


def checked_key_name(name: str) -> str:
    """Refuse what is not the name of an environment variable, without repeating it: it may be the key itself.

    Raises:
        ValueError: the message follows the name of the setting.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError("is the name of an environment variable: OPENAI_API_KEY. Keys belong in the environment only")
    return name


def authorization(name: str | None, *, owner: str) -> dict[str, str]:
    """The header with the key in the environment variable `name`. Made when it is sent, because the key is kept nowhere.

    Raises:
        JudgeError: the variable is not set, or holds no key.
    """
    if name is None:
        return {}
    key = os.environ.get(name, "").strip()
    if not key:
        raise JudgeError(f"{owner}: api_key_env: the environment variable {name} is not set; set it to the key")
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(f"{owner}: api_key_env: the environment variable {name} has characters that a key cannot have")
    return {"Authorization": f"Bearer {key}"}


def retry_after_seconds(header: str | None) -> float:
    """A Retry-After header, seconds or a date, as seconds from now; 0 if there is none that can be read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()):
        return float(header)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0


def _connection_reason(error: Exception) -> str:
    import aiohttp

    refused = isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno in (errno.ECONNREFUSED, None)
    reasons: dict[type[Exception], str] = {  # the first that fits
        aiohttp.ClientConnectorDNSError: "host name not found",
        aiohttp.ClientSSLError: "no secure connection",
        aiohttp.ClientConnectorError: "connection refused" if refused else "no connection",
        aiohttp.ClientPayloadError: "connection closed within the reply",
        aiohttp.ClientResponseError: "the reply was not HTTP",
    }
    return next((reason for kind, reason in reasons.items() if isinstance(error, kind)), "connection closed")

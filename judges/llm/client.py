"""A client for OpenAI-compatible chat endpoints: an API, or `vllm serve`.

In go chat messages and request fields; out comes a `Reply`, or a `CallFailed` with a short, stable reason that a judge
records as an abstention. What only the user can mend (a refused key, an unknown model, a damaged cache) is a
`JudgeError` at once. Replies are kept on disk by the content of their calls, so that none is paid twice.

    async with Client(Endpoint(base_url="http://localhost:8000/v1"), model="my-judge") as client:
        async for reply in run_each((partial(client.chat, m, max_tokens=8) for m in prompts), concurrency=32):
            print(reply.text)

The retry loop and the limiter are written out: tenacity would need a wait and a stop of our own (Retry-After, two
deadlines, the breaker) and save no line; aiolimiter is bound to one event loop and takes no correction of an estimate.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import math
import os
import random
import re
import sqlite3
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from iterdpo.config import Section, explain
from iterdpo.errors import JudgeError
from iterdpo.judging.stats import printable

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

RETRIED = {408, 409, 425, 429}
"""HTTP statuses that are tried again, beside 500 and above."""
REFUSED = {400, 413, 422}
"""HTTP statuses that refuse this one call. All others are mistakes in the configuration."""
LEAD = 4
"""Times the concurrency: how many jobs `run_each` takes ahead of the result that is due, which may be slow."""
DOWN = "the endpoint is down"
OWN_FIELDS = {"model", "messages", "stream", "n"}
SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie", re.I)


class Endpoint(Section):
    """The `endpoint` mapping of an LLM judge.

    Raises:
        JudgeError: an unknown key, a value out of range, or a budget of money without prices.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | None = None
    """Where the endpoint is, up to and with /v1: `http://localhost:8000/v1`."""
    api_key_env: str | None = None
    """The NAME of the environment variable that holds the key. The key itself is read for each request, and is kept
    nowhere."""
    concurrency: int = Field(32, ge=1)
    """Requests at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Requests are spread evenly to stay below this rate. Attempts that fail count."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """The same for tokens read and written: an estimate when a request is sent, corrected by what the server reports."""
    timeout: float = Field(60, gt=0)
    """Seconds for one attempt."""
    deadline: float = Field(600, gt=0)
    """Seconds for one call with all its attempts, from when the first is sent."""
    stage_deadline: float | None = Field(None, gt=0)
    """Seconds for all calls of a stage; those in which it waits for the next shard to be sampled do not count. When they
    are over, the calls that remain fail at once."""
    attempts: int = Field(6, ge=1)
    """Attempts of one call, where the error deserves another: HTTP 408, 409, 425, 429 and 5xx, time-outs, connections
    that break, replies that are cut off."""
    backoff: float = Field(0.5, gt=0)
    """Seconds before the second attempt, at most; they double with each further one. Drawn between 0 and that."""
    max_backoff: float = Field(30, gt=0)
    """The longest such wait, in seconds. A server's Retry-After may ask for more, up to `deadline`."""
    give_up_after: int = Field(20, ge=1)
    """When so many calls in a row have failed for good, the endpoint is taken as down: those under way fail too."""
    max_tokens_spent: int | None = Field(None, gt=0)
    """Tokens, read and written, that a stage may use. A hard stop."""
    max_cost_usd: float | None = Field(None, gt=0)
    """US dollars that a stage may cost. A hard stop; needs the prices."""
    price_in: float = Field(0, ge=0)
    """US dollars for a million tokens read."""
    price_out: float = Field(0, ge=0)
    """US dollars for a million tokens written."""
    cache: str | None = None
    """The SQLite file that keeps the replies that could be read, by the content of the request; several runs may share
    it. `off` keeps none. Default: iterdpo/judge-calls.sqlite in $XDG_CACHE_HOME or ~/.cache."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further HTTP headers, none of them secret."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request body: `{seed: 1, top_p: 0.9}`. They win over the judge's; null leaves one out."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
            return
        except ValidationError as error:
            wrong = "; ".join(explain(Endpoint, e) for e in error.errors())
        raise JudgeError(f"endpoint: {wrong}")  # outside `except`, so that no input hangs on it

    @field_validator("base_url")
    @classmethod
    def _an_http_address(cls, url: str | None) -> str | None:
        return None if url is None else _checked_url(url)

    @field_validator("api_key_env")
    @classmethod
    def _a_name_and_not_a_key(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # does not repeat what may be a key
            raise ValueError(
                "is the name of an environment variable, in capitals: OPENAI_API_KEY. The key itself belongs into "
                "the environment, never into a configuration"
            )
        return name

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_a_word(cls, cache: object) -> object:
        return "off" if cache is False else cache  # YAML reads `off` as false

    @field_validator("headers")
    @classmethod
    def _no_secrets(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not (name + value).isprintable():
                raise ValueError(f"{name!r} has a character that no header has")
            if SECRET_HEADER.search(name):
                raise ValueError(f"{name!r} looks like a secret; name the key's environment variable in api_key_env")
        return headers

    @field_validator("extra")
    @classmethod
    def _not_the_clients(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(OWN_FIELDS & extra.keys()):
            raise ValueError(f"{own[0]!r} is not to be set here; the judge sets it")
        return extra

    @model_validator(mode="after")
    def _money_needs_prices(self) -> Endpoint:
        if self.max_cost_usd is not None and not self.price_in + self.price_out:
            raise ValueError("max_cost_usd: set price_in and price_out too, in US dollars for a million tokens")
        return self

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """US dollars."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


class Reply(NamedTuple):
    """`Reply(text="A", finish_reason="stop", top_logprobs=[{"A": -0.1, "B": -2.4}], tokens_in=412, tokens_out=1,
    cached=False)`

    `top_logprobs` has a mapping for each generated token, from a token's text to its log-probability; it is empty
    unless the call asked for `logprobs`. `cached`: nothing was paid for it now.
    """

    text: str
    finish_reason: str | None
    top_logprobs: list[dict[str, float]]
    tokens_in: int
    tokens_out: int
    cached: bool


class CallFailed(Exception):
    """A call that failed for good. Its text is a short, stable reason, without keys or messages."""


def refused(reason: str) -> bool:
    """Whether a `CallFailed` with this text was refused for what it asks, and would be again."""
    return reason.startswith(tuple(f"HTTP {status}" for status in REFUSED))


async def run_each(jobs: Iterable[Callable[[], Awaitable[T]]], *, concurrency: int) -> AsyncGenerator[T]:
    """What the jobs return, in order, as soon as it is there. At most `concurrency` run at once.

    `LEAD` times as many are taken from `jobs`, so that one that takes long holds the others up later. Where a job raises,
    those before it that are done count, and the others are cancelled; where `jobs` raises, those taken before are
    worked off. Closing the generator cancels all that is under way.
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
    """`results` for code that is not asynchronous. They are worked on while the next one is asked for."""
    with asyncio.Runner() as runner:
        try:
            while True:
                yield runner.run(anext(results))
        except StopAsyncIteration:
            return
        except GeneratorExit:  # only then is it not in the middle of something, which the runner would cancel
            runner.run(results.aclose())
            raise


class Client:
    """Calls one model of an endpoint. `async with` opens it for an event loop; it may be opened again later, in another
    loop or thread, one at a time. The totals of `usage` survive.

    `stage_deadline`, the budgets and `give_up_after` hold for a stage, which lasts until the next `begin_stage`. Opened
    again within a stage, an endpoint that was taken as down gets another chance, and is down again at the first call
    that fails.

    A budget is held by estimates that are reserved before a request is sent: a token for each four bytes of its body,
    and its `max_tokens` (without one, the longest reply so far). It is overspent by no more than what the requests
    then in flight, at most `concurrency`, use beyond their estimates. Attempts that failed are not counted, because no
    server says what they cost.
    """

    def __init__(self, endpoint: Endpoint, *, model: str, base_url: str | None = None) -> None:
        self.base_url = base_url or endpoint.base_url
        """Where to call. A judge that starts its own server sets it then, before the client is opened."""
        self.endpoint = endpoint
        self.model = model
        self._totals: dict[str, float] = dict.fromkeys(
            ("calls", "cached", "retries", "failed", "tokens_in", "tokens_out", "seconds"), 0
        )
        self._longest_reply = 0  # tokens
        self._next_request = self._next_tokens = 0.0  # when the rates allow the next request
        self._flights: dict[str, asyncio.Future[Reply]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._cache: _Cache | None = None
        self.begin_stage()

    def begin_stage(self) -> None:
        """Start the deadline, the budgets and the count of failures anew. Not while calls are under way."""
        assert not self._flights, "a stage begins when the calls of the one before are done"
        self._stage_began: float | None = None  # at the first request since it was opened
        self._stage_used = 0.0  # seconds, until it was closed
        self._stopped: str | None = None
        self._halted = asyncio.Event()
        self._failed_in_a_row = 0
        self._before = (self._totals["tokens_in"], self._totals["tokens_out"])

    async def __aenter__(self) -> Client:
        import aiohttp

        assert self._session is None, "a Client is open in one event loop at a time"
        if self.base_url is None:
            raise JudgeError("endpoint: missing key 'base_url'; where the model is served: http://localhost:8000/v1")
        try:
            self.base_url = _checked_url(self.base_url)
        except ValueError as error:
            raise JudgeError(f"endpoint: base_url: {error}") from None
        if self.endpoint.cache != "off":
            self._cache = _Cache(self.endpoint.cache)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the slots limit it
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=_proxy(self.base_url),  # and not trust_env, which would look for keys in ~/.netrc at each request
        )
        self._slots = asyncio.Semaphore(self.endpoint.concurrency)
        self._turn = asyncio.Lock()
        self._halted = asyncio.Event()
        self._settled = asyncio.Event()
        self._in_flight = 0
        self._reserved = (0, 0)  # tokens in and out
        if self.down:
            self._stopped, self._failed_in_a_row = None, self.endpoint.give_up_after - 1
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
        if self._cache is not None:
            self._cache.close()
        self._session = self._cache = None
        self._stage_used += time.monotonic() - self._stage_began if self._stage_began else 0
        self._stage_began = None

    async def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        salt: str = "",
        keep: Callable[[Reply], bool] = lambda reply: True,
        **body: Any,
    ) -> Reply:
        """POST base_url/chat/completions with `messages` and the fields of `body`.

        A reply is looked up and kept under a hash of the whole request and `salt`; another salt asks again. Identical
        calls at once are made once. A reply that is empty, or that `keep` does not want, is returned, but not kept, so
        that it can be asked for again.

        Raises:
            CallFailed: no reply, for a reason that an abstention can give.
            JudgeError: what only the user can mend: the key, the model, the address, the cache file.
        """
        fields = {**body, **self.endpoint.extra, "model": self.model, "messages": messages}
        request = {name: value for name, value in fields.items() if value is not None}
        payload = json.dumps(request, sort_keys=True).encode()
        key = hashlib.sha256(json.dumps(salt).encode() + payload).hexdigest()
        self._totals["calls"] += 1
        try:
            while flight := self._flights.get(key):
                await asyncio.wait((flight,))  # unlike `await flight`, does not cancel it for the others
                if not flight.cancelled():
                    return self._free(flight.result())
            if self._cache is not None and (kept := self._cache.get(key)) is not None and keep(kept):
                return self._free(kept)
            flight = self._flights[key] = asyncio.get_running_loop().create_future()
            try:
                reply = await self._pay(payload, request)
                if self._cache is not None and (reply.text.strip() or reply.top_logprobs) and keep(reply):
                    self._cache.put(key, reply)
                flight.set_result(reply)
            except BaseException as error:
                if isinstance(error, Exception):
                    flight.set_exception(error)
                    flight.exception()  # taken note of, so that asyncio does not warn where nobody else waits
                else:
                    flight.cancel()
                raise
            finally:
                del self._flights[key]
            return reply
        except CallFailed:
            self._totals["failed"] += 1
            raise

    @property
    def down(self) -> bool:
        """Whether the endpoint is taken as down."""
        return self._stopped == DOWN

    def usage(self) -> dict[str, float]:
        """Totals since the client was made. Tokens, dollars and seconds are those of the calls that were not cached."""
        return {**self._totals, "cost_usd": self.endpoint.cost(self._totals["tokens_in"], self._totals["tokens_out"])}

    def _free(self, reply: Reply) -> Reply:
        self._totals["cached"] += 1
        return reply._replace(cached=True)

    async def _pay(self, payload: bytes, request: dict[str, Any]) -> Reply:
        """One call with all its attempts. Between attempts it holds no slot."""
        endpoint = self.endpoint
        most_out = request.get("max_completion_tokens") or request.get("max_tokens") or self._longest_reply
        estimate = (len(payload) // 4, most_out)
        began: float | None = None
        attempt = 0
        outcome: Reply | _Failure = _Failure("timed out")
        try:
            while True:
                attempt += 1
                async with self._slots:
                    await self._admit(*estimate)
                    began = began or time.monotonic()
                    limit = min(endpoint.timeout, began + endpoint.deadline - time.monotonic(), self._stage_left())
                    try:
                        if limit > 0:  # else it waited for its slot until the deadline
                            outcome = await self._attempt(payload, request, estimate, limit)
                    finally:
                        self._settle(estimate, outcome)
                if isinstance(outcome, Reply):
                    self._failed_in_a_row = 0
                    return outcome
                if not outcome.retry:
                    self._failed_in_a_row = 0  # the endpoint is there, it only refuses this call
                    raise CallFailed(outcome.reason)
                self._check_stage()
                if attempt == endpoint.attempts:
                    self._give_up(f"{outcome.reason} ({attempt} attempt{'s' * (attempt > 1)})")
                # Full jitter; it changes no result, and so has no seed.
                delay = random.uniform(0, min(endpoint.max_backoff, endpoint.backoff * 2 ** min(attempt - 1, 60)))
                delay = max(delay, outcome.retry_after)
                if time.monotonic() + delay >= began + endpoint.deadline:
                    self._give_up(f"{outcome.reason} (deadline of {endpoint.deadline:g} s)")
                self._totals["retries"] += 1
                await self._wait(delay)
        finally:
            self._totals["seconds"] += time.monotonic() - began if began else 0

    async def _attempt(
        self, payload: bytes, request: dict[str, Any], estimate: tuple[int, int], limit: float
    ) -> Reply | _Failure:
        import aiohttp

        assert self._session is not None, "open the Client first: async with client"
        # Requests are written one at a time, two rounds of the loop apart. Before Python 3.12 aiohttp leaves the writing
        # to a task: calls that are ready together would wait until all of them are made, be answered together, and stay
        # a herd, while which is served the endpoint has nothing to do. At 32 calls of 50 ms that costs 5 % and more.
        await self._turn.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._turn.release)
        try:
            async with self._session.post(
                f"{self.base_url}/chat/completions",
                data=payload,
                headers=self._headers(),
                timeout=aiohttp.ClientTimeout(total=limit),
                allow_redirects=False,
            ) as response:
                data = await response.read()
        except TimeoutError:
            return _Failure(f"timed out after {min(self.endpoint.timeout, self.endpoint.deadline):g} s")
        except (aiohttp.ClientError, OSError) as error:
            return _Failure(connection_reason(error))
        status = response.status
        if status in RETRIED or status >= 500:
            return _Failure(f"HTTP {status}", retry_after_seconds(response.headers.get("Retry-After")))
        if 200 <= status < 300:
            return _read_reply(data, estimate)
        said, slug = _error_of(data)
        said = _without_key(said, self._headers().get("Authorization", "").removeprefix("Bearer "))
        if status in REFUSED:
            reason = _stable(said, json.dumps(request["messages"], ensure_ascii=False)) or slug
            return _Failure(f"HTTP {status}: {reason}" if reason else f"HTTP {status}", retry=False)
        raise JudgeError(
            f"endpoint {self.base_url}: HTTP {status}{f' ({printable(said)[:200]})' if said else ''}; "
            + self._remedy(status)
        )

    def _headers(self) -> dict[str, str]:
        """Made for each request, because the key is kept nowhere."""
        headers = {**self.endpoint.headers, "Content-Type": "application/json"}
        if (name := self.endpoint.api_key_env) is not None:
            headers["Authorization"] = f"Bearer {_read_key(name)}"
        return headers

    def _remedy(self, status: int) -> str:
        match status:
            case 401 | 403 if self.endpoint.api_key_env is None:
                return "name the environment variable that holds the key in api_key_env"
            case 401 | 403:
                return f"the key in ${self.endpoint.api_key_env} (api_key_env) was refused; give one that may use it"
            case 404:
                return f"no such model or address: check model ({self.model!r}) and base_url, which mostly ends in /v1"
            case _:
                return "check base_url and model"

    async def _admit(self, tokens_in: int, tokens_out: int) -> None:
        """Wait until the rates and budgets allow an attempt, then reserve what it may use."""
        endpoint = self.endpoint
        now = time.monotonic()
        self._stage_began = self._stage_began or now
        self._check_stage()
        at = max(now, self._next_request, self._next_tokens)
        if endpoint.requests_per_minute is not None:
            self._next_request = at + 60 / endpoint.requests_per_minute
        if endpoint.tokens_per_minute is not None:
            self._next_tokens = at + (tokens_in + tokens_out) * 60 / endpoint.tokens_per_minute
        if at > now:
            await self._wait(at - now)
        while (spent := self._over_budget(tokens_in, tokens_out)) is not None:
            if not self._in_flight:
                self._stop(spent)
            self._check_stage()
            self._settled.clear()
            await self._settled.wait()  # those in flight may use less than is reserved for them
        self._in_flight += 1
        self._reserved = (self._reserved[0] + tokens_in, self._reserved[1] + tokens_out)

    def _settle(self, estimate: tuple[int, int], outcome: Reply | _Failure) -> None:
        """Put what an attempt used in the place of what was reserved."""
        self._in_flight -= 1
        self._reserved = (self._reserved[0] - estimate[0], self._reserved[1] - estimate[1])
        if isinstance(outcome, Reply):
            self._totals["tokens_in"] += outcome.tokens_in
            self._totals["tokens_out"] += outcome.tokens_out
            self._longest_reply = max(self._longest_reply, outcome.tokens_out)
            if self.endpoint.tokens_per_minute is not None:
                beyond = outcome.tokens_in + outcome.tokens_out - sum(estimate)
                self._next_tokens += beyond * 60 / self.endpoint.tokens_per_minute
        self._settled.set()

    def _over_budget(self, tokens_in: float, tokens_out: float) -> str | None:
        """The budget that another attempt would exceed."""
        tokens_in += self._totals["tokens_in"] - self._before[0] + self._reserved[0]
        tokens_out += self._totals["tokens_out"] - self._before[1] + self._reserved[1]
        if self.endpoint.max_tokens_spent is not None and tokens_in + tokens_out > self.endpoint.max_tokens_spent:
            return "budget of tokens spent"
        if self.endpoint.max_cost_usd is not None:
            return (
                "budget of money spent"
                if self.endpoint.cost(tokens_in, tokens_out) > self.endpoint.max_cost_usd
                else None
            )
        return None

    def _stage_left(self) -> float:
        if self.endpoint.stage_deadline is None or self._stage_began is None:
            return math.inf
        return self._stage_began - self._stage_used + self.endpoint.stage_deadline - time.monotonic()

    def _check_stage(self) -> None:
        if self._stopped is not None:
            raise CallFailed(self._stopped)
        if self._stage_left() <= 0:
            raise CallFailed(f"the stage's deadline of {self.endpoint.stage_deadline:g} s is over")

    async def _wait(self, seconds: float) -> None:
        """Sleep, but no longer than the stage goes on."""
        left = self._stage_left()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, left)):
                await self._halted.wait()
        self._check_stage()

    def _stop(self, reason: str) -> None:
        """All other calls of the stage fail with `reason`."""
        self._stopped = self._stopped or reason
        self._halted.set()
        self._settled.set()

    def _give_up(self, reason: str) -> NoReturn:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.endpoint.give_up_after:
            self._stop(DOWN)
        raise CallFailed(reason)


class _Failure(NamedTuple):
    """An attempt that failed: `_Failure("HTTP 429", retry_after=3.0)`."""

    reason: str
    retry_after: float = 0.0
    retry: bool = True


class _Cache:
    """Replies by the hash of their requests, as JSON in an SQLite file that processes and threads share.

    Each reply is a transaction of its own: it outlives a killed process. What the operating system had not yet written
    when a machine loses power is lost.
    """

    def __init__(self, path: str | None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.path = Path(path or f"{base}/iterdpo/judge-calls.sqlite").expanduser()
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                self._write_ahead()
                self.database.execute("PRAGMA synchronous = NORMAL")
                self.database.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID"
                )
            except BaseException:
                self.database.close()
                raise

    def get(self, key: str) -> Reply | None:
        with self._named_errors():
            row = self.database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return None if row is None else Reply._make([*json.loads(row[0]), True])

    def put(self, key: str, reply: Reply) -> None:
        with self._named_errors():
            self.database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(reply[:-1])))

    def close(self) -> None:
        self.database.close()

    def _write_ahead(self) -> None:
        """WAL mode, for readers beside a writer. The switch, made once in the life of a file, does not wait for locks."""
        for attempt in range(1000):
            try:
                self.database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or attempt == 999:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise JudgeError(
                f"endpoint: cache {self.path}: cannot be used: {error}; move the file away, name another in `cache`, or "
                "set `cache: off`"
            ) from error


def _checked_url(url: str) -> str:
    """`url` without a slash at its end.

    Raises:
        ValueError: it is no address of an endpoint. Says nothing of a password in it.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or re.search(r"\s", url):
        raise ValueError("is no address; it reads http://host:port/v1 or https://host/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "has a user, a query or a fragment, which may be secret; name the key's variable in api_key_env"
        )
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        raise ValueError("ends before /chat/completions, which is added")
    return url


def _read_key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key:
        raise JudgeError(f"endpoint: api_key_env: the environment variable {name} is not set; set it to the key")
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(f"endpoint: api_key_env: the environment variable {name} has characters that no key has")
    return key


def _proxy(url: str) -> str | None:
    """The environment's proxy for `url`; none to this machine, where iterdpo's own servers are."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    return None if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host) else getproxies().get(parts.scheme)


def connection_reason(error: Exception) -> str:
    import aiohttp

    match error:
        case aiohttp.ClientConnectorDNSError():
            return "host name not found"
        case aiohttp.ClientSSLError():
            return "no secure connection"
        case aiohttp.ClientConnectorError() if error.os_error.errno in (errno.ECONNREFUSED, None):
            return "connection refused"
        case aiohttp.ClientConnectorError():
            return "no connection"
        case aiohttp.ClientPayloadError():
            return "connection closed within the reply"
        case aiohttp.ClientResponseError():
            return "the reply was not HTTP"
        case _:
            return "connection closed"


def _read_reply(data: bytes, estimate: tuple[int, int]) -> Reply | _Failure:
    """The reply in a body that came with status 200; usage that is not reported is estimated."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        start = data.lstrip()[:1]
        return _Failure(
            "the reply was empty" if not start
            else "the reply was cut off JSON" if start == b"{"
            else "the reply was not JSON"
        )  # fmt: skip
    try:
        choice = answer["choices"][0]
        content = choice["message"].get("content")
    except (LookupError, TypeError, AttributeError):
        return _Failure("the reply had no choices")
    finish_reason = choice.get("finish_reason")
    if finish_reason in ("abort", "error"):  # vLLM's and OpenRouter's, with whatever there was until then
        return _Failure("the server broke the reply off")
    if isinstance(content, list):  # parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    text = content if isinstance(content, str) else ""
    usage = answer.get("usage")
    used = [usage.get(k) if isinstance(usage, dict) else None for k in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (
        n if isinstance(n, int) and n >= 0 else guess
        for n, guess in zip(used, (estimate[0], len(text.encode(errors="replace")) // 4), strict=True)
    )
    return Reply(
        text, str(finish_reason) if finish_reason else None, _top_logprobs(choice), tokens_in, tokens_out, False
    )


def _top_logprobs(choice: dict[str, Any]) -> list[dict[str, float]]:
    """As in `Reply`. Where several tokens have the same text, the likeliest counts; malformed ones are left out."""
    found: list[dict[str, float]] = []
    try:
        for position in choice["logprobs"]["content"]:
            tokens: dict[str, float] = {}
            for top in position["top_logprobs"]:
                tokens[top["token"]] = max(float(top["logprob"]), tokens.get(top["token"], -math.inf))
            found.append(tokens)
    except (LookupError, TypeError, ValueError):
        return []
    return found


def _error_of(data: bytes) -> tuple[str, str]:
    """An error's message and its code or type, in OpenAI's form or vLLM's; what of them there is."""
    try:
        error = json.loads(data)
        error = error.get("error") or error.get("detail") or error
        if not isinstance(error, dict):
            return str(error), ""
        slug = next(
            (s for k in ("code", "type") if re.fullmatch(r"[A-Za-z_]\w{2,60}", s := str(error.get(k) or ""))), ""
        )
        return str(error.get("message") or ""), slug
    except (ValueError, RecursionError, AttributeError):
        text = data[:500].decode(errors="replace").strip()
        return ("" if text.startswith("<") else text), ""


def _without_key(text: str, key: str) -> str:
    """`text` with *** for each word that has six characters of the key: servers quote it, in whole or in part."""
    if not key:
        return text
    pieces = {key[i : i + 6] for i in range(max(1, len(key) - 5))}
    return re.sub(r"\S+", lambda word: "***" if any(piece in word[0] for piece in pieces) else word[0], text)


def _stable(said: str, messages: str) -> str:
    """The first sentence of an error with N for its numbers, so that it can be counted; empty if it quotes a message."""
    sentence = printable(re.split(r"(?<=[a-z])\. |\n", said, maxsplit=1)[0])[:120].rstrip(". ")
    if any(sentence[i : i + 16] in messages for i in range(max(0, len(sentence) - 15))):
        return ""
    return re.sub(r"\d+", "N", sentence)


def retry_after_seconds(header: str | None) -> float:
    """A Retry-After header, seconds or a date, as seconds from now; 0 where there is none that can be read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()):
        return float(header)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0

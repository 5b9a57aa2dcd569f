"""A client for OpenAI-compatible chat endpoints: an API, or `vllm serve`.

It takes chat messages and request fields and returns a `Reply`, or raises `CallFailed` with a short, stable reason that a
judge records as an abstention. A mistake that only the user can fix (a refused key, an unknown model, a damaged cache)
is a `JudgeError` at once. Replies are kept on disk by the content of their calls, so that none is paid for twice.

    async with Client(Endpoint(base_url="http://localhost:8000/v1"), model="my-judge") as client:
        async for reply in run_each((partial(client.chat, m, max_tokens=8) for m in prompts), concurrency=32):
            print(reply.text)

Client and limiter are written by hand: the openai client has no budgets, no cache and no circuit breaker, and aiolimiter
is bound to one event loop and cannot correct an estimate.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from iterdpo.errors import JudgeError
from iterdpo.escape import printable
from judges.cache import SQLiteCache
from judges.llm.reply import Reply, error_of, read_reply, stable_reason, without_key
from judges.llm.settings import Endpoint
from judges.llm.transport import REFUSED, Failure, authorization, brief_pause, post, with_retries

if TYPE_CHECKING:
    import aiohttp

DOWN = "the endpoint is down"
PROBE = 30.0
"""Seconds in which an endpoint must answer before a run begins."""


class CallFailed(Exception):
    """A call that failed for good. Its text is a short, stable reason, without keys or messages."""


def refused(reason: str) -> bool:
    """Whether a `CallFailed` with this text was refused for what it asks, and would be again."""
    return reason.startswith(tuple(f"HTTP {status}" for status in REFUSED))


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
        """The address to call. A judge that starts its own server sets it before the client is opened."""
        self.endpoint = endpoint
        self.model = model
        counted = ("calls", "cached", "retries", "failed", "tokens_in", "tokens_out", "seconds")
        self._totals: dict[str, float] = dict.fromkeys(counted, 0)
        self._longest_reply = 0  # tokens
        self._next_request = self._next_tokens = 0.0  # when the rates allow the next request
        self._flights: dict[str, asyncio.Future[Reply]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._cache: SQLiteCache | None = None
        self.begin_stage()

    def begin_stage(self) -> None:
        """Reset the deadline, the budgets and the count of failures. Not to be called while calls are under way."""
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
            raise JudgeError("endpoint: missing key 'base_url', the address of the server: http://localhost:8000/v1")
        self.base_url = str(Endpoint(base_url=self.base_url).base_url)
        if self.endpoint.cache != "off":
            default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/iterdpo/judge-calls.sqlite"
            file = Path(self.endpoint.cache or default).expanduser()
            remedy = "name another in `cache`, or set `cache: off`"
            self._cache = SQLiteCache(file, table="replies", column="reply", owner="endpoint", remedy=remedy)
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
        instead: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> Reply:
        """POST base_url/chat/completions with `messages` and the fields of `body`.

        A reply is looked up and kept under a hash of the whole request and `salt`; another salt asks again. Identical
        calls at once are made once. A reply that is empty, or that `keep` does not want, is returned, but not kept, so
        that it can be asked for again. `instead` has fields that are sent in place of those of `body`; the reply is kept
        as that to `body`.

        Raises:
            CallFailed: no reply, for a reason that an abstention can give.
            JudgeError: a mistake that only the user can fix: in the key, the model, the address, the cache file.
        """
        fixed = {**self.endpoint.extra, "model": self.model, "messages": messages}
        asked = {k: v for k, v in {**body, **fixed}.items() if v is not None}
        request = {k: v for k, v in {**asked, **(instead or {}), **fixed}.items() if v is not None}
        payload = json.dumps(request, sort_keys=True).encode()
        key = hashlib.sha256(json.dumps(salt).encode() + json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self._totals["calls"] += 1
        try:
            while flight := self._flights.get(key):
                await asyncio.wait((flight,))  # unlike `await flight`, does not cancel it for the others
                if not flight.cancelled():
                    self._totals["cached"] += 1
                    return flight.result()._replace(cached=True)
            if self._cache is not None:
                kept = self._cache.get(key, lambda text: Reply._make([*json.loads(text), True]))
                if kept is not None and keep(kept):
                    self._totals["cached"] += 1
                    return kept
            flight = self._flights[key] = asyncio.get_running_loop().create_future()
            try:
                reply = await self._call_with_retries(payload, request)
                if self._cache is not None and (reply.text.strip() or reply.top_logprobs) and keep(reply):
                    self._cache.put({key: json.dumps(reply[:-1])})
                flight.set_result(reply)
            except BaseException as error:
                if isinstance(error, Exception):
                    flight.set_exception(error)
                    flight.exception()  # retrieved, so that asyncio does not warn if no other call waits for it
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

    async def _call_with_retries(self, payload: bytes, request: dict[str, Any]) -> Reply:
        """One call with all its attempts. Between attempts it holds no slot."""
        endpoint = self.endpoint
        most_out = request.get("max_completion_tokens") or request.get("max_tokens") or self._longest_reply
        estimate = (len(payload) // 4, most_out)
        began: float | None = None
        sent = 0
        outcome: Reply | Failure = Failure("timed out")  # stays if the deadline comes while it waits for a slot

        async def attempt() -> Reply | Failure:
            nonlocal began, sent, outcome
            async with self._slots:
                await self._admit(*estimate)
                began = began or time.monotonic()
                seconds = min(endpoint.timeout, began + endpoint.deadline - time.monotonic(), self._stage_left())
                try:
                    if seconds > 0:
                        self._totals["retries"] += sent > 0
                        sent += 1
                        outcome = await self._attempt(payload, request, estimate, seconds)
                finally:
                    self._settle(estimate, outcome)
            if isinstance(outcome, Failure) and outcome.retry:
                self._check_stage()
            return outcome

        async def pause(seconds: float, failure: Failure) -> None:
            assert began is not None
            if time.monotonic() + seconds >= began + endpoint.deadline:
                self._give_up(f"{failure.reason} (deadline of {endpoint.deadline:g} s)")
            await self._wait(seconds)

        try:
            await with_retries(attempt, pause, endpoint.attempts, endpoint.backoff, endpoint.max_backoff)
        finally:
            self._totals["seconds"] += time.monotonic() - began if began else 0
        if isinstance(outcome, Failure) and outcome.retry:
            self._give_up(f"{outcome.reason} ({endpoint.attempts} attempt{'s' * (endpoint.attempts > 1)})")
        self._failed_in_a_row = 0  # it answers, even if it refuses this call
        if isinstance(outcome, Failure):
            raise CallFailed(outcome.reason)
        return outcome

    async def _attempt(
        self, payload: bytes, request: dict[str, Any], estimate: tuple[int, int], seconds: float
    ) -> Reply | Failure:
        assert self._session is not None, "open the Client first: async with client"
        # Requests are written one at a time, two rounds of the loop apart. Before Python 3.12 aiohttp leaves the writing
        # to a task: calls that are ready together would wait until all of them are made and be answered together, so
        # requests arrive in bursts and the endpoint idles between them. At 32 calls of 50 ms that costs 5 % and more.
        await self._turn.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._turn.release)
        key = authorization(self.endpoint.api_key_env, owner="endpoint")
        headers = {**self.endpoint.headers, "Content-Type": "application/json", **key}
        url, limit = f"{self.base_url}/chat/completions", min(self.endpoint.timeout, self.endpoint.deadline)
        answer = await post(self._session, url, payload, seconds=seconds, limit=limit, headers=headers)
        if isinstance(answer, Failure):
            return answer
        status, data = answer
        if 200 <= status < 300:
            return read_reply(data, estimate)
        said, slug = error_of(data)
        said = without_key(said, key.get("Authorization", "").removeprefix("Bearer "))
        if status in REFUSED:
            reason = stable_reason(said, json.dumps(request["messages"], ensure_ascii=False)) or slug
            return Failure(f"HTTP {status}: {reason}" if reason else f"HTTP {status}", retry=False)
        said = f" ({printable(said)[:200]})" if said else ""
        raise JudgeError(f"endpoint {self.base_url}: HTTP {status}{said}; {self._remedy(status)}")

    def _remedy(self, status: int) -> str:
        match status, self.endpoint.api_key_env:
            case 401 | 403, None:
                return "name the environment variable that holds the key in api_key_env"
            case 401 | 403, name:
                return f"the key in ${name} (api_key_env) was refused; use a key with access to it"
            case 404, _:
                return f"no such model or address: check model ({self.model!r}) and base_url, which usually ends in /v1"
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

    def _settle(self, estimate: tuple[int, int], outcome: Reply | Failure) -> None:
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
        tokens_in += self._totals["tokens_in"] - self._before[0] + self._reserved[0]
        tokens_out += self._totals["tokens_out"] - self._before[1] + self._reserved[1]
        if self.endpoint.max_tokens_spent is not None and tokens_in + tokens_out > self.endpoint.max_tokens_spent:
            return "budget of tokens spent"
        dollars = self.endpoint.max_cost_usd
        over = dollars is not None and self.endpoint.cost(tokens_in, tokens_out) > dollars
        return "budget of money spent" if over else None

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
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, self._stage_left())):
                await self._halted.wait()
        self._check_stage()

    def _stop(self, reason: str) -> None:
        self._stopped = self._stopped or reason
        self._halted.set()
        self._settled.set()

    def _give_up(self, reason: str) -> NoReturn:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.endpoint.give_up_after:
            self._stop(DOWN)
        raise CallFailed(reason)


class CountingClient(Client):
    """Counts calls, and what they would read and write at most, and sends nothing. Each call gets `reply`, or fails without.

    A token is four bytes of the messages. Identical calls count once.
    """

    def __init__(self, endpoint: Endpoint, *, model: str, reply: str | None = None) -> None:
        super().__init__(endpoint, model=model)
        self._reply = reply
        self._seen: set[bytes] = set()

    async def __aenter__(self) -> CountingClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def chat(self, messages: list[dict[str, Any]], **body: Any) -> Reply:
        """As `Client.chat`."""
        own = {name: value for name, value in body.items() if name not in ("salt", "keep", "instead")}
        request = {**own, **self.endpoint.extra, "messages": messages}
        name = hashlib.sha256(json.dumps(request).encode()).digest()
        if name not in self._seen:
            self._seen.add(name)
            self._totals["calls"] += 1
            self._totals["tokens_in"] += sum(len(str(message["content"]).encode()) for message in messages) // 4
            self._totals["tokens_out"] += int(request.get("max_completion_tokens") or request.get("max_tokens") or 0)
        if self._reply is None:
            raise CallFailed("not asked")
        return Reply(self._reply, "stop", [{"A": 0.0}], 0, 0, False)


async def probe(endpoint: Endpoint, model: str) -> None:
    """Ask `model` one question of a few tokens: is there a server, and does it take key and model?

    Without an answer it is asked again, twice at most. An overloaded server (HTTP 429, 5xx) passes: the judge's own attempts may wait for it.

    Raises:
        JudgeError: there is no answer, or the key, the address, the model or such a request is refused.
    """
    body = {"max_tokens": 16, **endpoint.extra, "model": model, "messages": [{"role": "user", "content": "Say yes."}]}
    request = {name: value for name, value in body.items() if value is not None}
    async with Client(endpoint.model_copy(update={"cache": "off"}), model=model) as client:
        payload, seconds = json.dumps(request).encode(), min(endpoint.timeout, PROBE)
        outcome = await with_retries(
            lambda: client._attempt(payload, request, (16, 16), seconds), brief_pause, 3, endpoint.backoff, 1.0
        )
    if isinstance(outcome, Reply) or (outcome.retry and outcome.reason.startswith("HTTP ")):
        return
    remedy = "start the server, or check base_url" if outcome.retry else "check model and extra"
    raise JudgeError(f"endpoint {client.base_url}: asked before the run begins: {outcome.reason}; {remedy}")


def _proxy(url: str) -> str | None:
    """The environment's proxy for `url`; None for this machine, on which iterdpo's own servers run."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    return None if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host) else getproxies().get(parts.scheme)

"""A chat endpoint for tests of judges: a real HTTP server on this machine with configurable answers and failures.

    def verdict(body):
        return "A" if "good" in body["messages"][-1]["content"] else "B"

    with FakeEndpoint(verdict, faults=0.3, seed=1) as server:
        judge = load_judge("pairwise", {"model": "fake", "endpoint": {"base_url": server.base_url, "cache": "off"}})
        ...
        assert max(server.complete_replies.values()) == 1  # nothing was paid twice

It speaks /v1/chat/completions and /v1/models. Needs aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from aiohttp import web

Body = dict[str, Any]

FAULTS = (
    "429",
    "429 with Retry-After",
    "500",
    "503",
    "hang",
    "closed before the reply",
    "closed within the reply",
    "cut-off JSON",
    "empty body",
    "HTML page",
    "no choices",
)
"""What can go wrong with a request, so that a client sees it."""

GARBAGE: tuple[str | None, ...] = (
    None,
    "",
    " \n\t",
    "Verdict: A\nVerdict: B",
    "[[A]] is better. No: [[B]] is better.",
    "Verdict: \u0410",  # a Cyrillic A
    "V\u0435rdict: A",  # a Cyrillic e
    "Verdict: \u0392",  # a Greek B
    "Verdict: \U0001d400",  # a mathematical A
    "Ver\u200bdict: \u202eA\u202c\nVerdict: \uff22",  # both, with invisible marks and in full width
)
"""Replies with status 200 and a content that says nothing, or both; only a parser can tell."""


@dataclass(eq=False)
class FakeEndpoint:
    """A chat endpoint in a thread of this process, from `with` until its end.

    Args:
        reply: from a request's body to the reply: its text, or a mapping. `{"text": ..., "logprobs": {"A": -0.1, "B":
            -2.3}}` gives the first token's log-probabilities (a list of mappings: each token's), which are sent if
            the request asked for `logprobs`; `finish_reason` and `usage` replace what else is said of the text. A
            mapping with `status` is sent as it is: `{"status": 404, "body": "no such model", "headers": {...}}`.
        latency: seconds before an answer.
        faults: the share of requests that go wrong, each with one of `kinds`.
        max_faults: how often one and the same request goes wrong at most.
        retry_after: what "429 with Retry-After" says.
        garbage: the share of requests that are answered by one of `GARBAGE` in the place of `reply`; the same request
            always by the same.
        seed: the faults and garbage of a request depend on it, on the request's body, and on how often that came;
            not on the order of requests.
        api_key: refuse requests with another key by 401.
    """

    reply: Callable[[Body], str | Body]
    _: KW_ONLY
    latency: float = 0.0
    faults: float = 0.0
    kinds: Sequence[str] = FAULTS
    max_faults: int | None = None
    retry_after: str = "0"
    garbage: float = 0.0
    seed: int = 0
    api_key: str | None = None
    model: str = "fake"

    def __post_init__(self) -> None:
        self.requests = 0
        """Chat requests that came, whatever became of them."""
        self.attempts: Counter[str] = Counter()
        """How often each request came, by the SHA-256 of its body."""
        self.complete_replies: Counter[str] = Counter()
        """How often each request was answered in full: what an API would have charged for. Garbage counts."""
        self.faults_given: Counter[str] = Counter()
        """How often each of `kinds` was given."""
        self.spans: dict[str, tuple[float, float]] = {}
        """When each request first came, and when it last ended, in seconds of the server's clock."""
        self.in_flight = self.max_in_flight = 0
        self.slept = 0.0
        """Seconds slept for `latency`, all requests together."""
        self._port = 0
        self._site: web.TCPSite | None = None

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:41873/v1`; the same until the end, down or not."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def down(self) -> bool:
        """Set it to break all connections and refuse new ones; unset it to be back at the same address."""
        return self._site is None

    @down.setter
    def down(self, down: bool) -> None:
        asyncio.run_coroutine_threadsafe(self._stop() if down else self._listen(), self._loop).result(10)

    def __enter__(self) -> FakeEndpoint:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="FakeEndpoint", daemon=True)
        self._thread.start()
        self.down = False
        return self

    def __exit__(self, *_: object) -> None:
        self.down = True
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        if self._site is not None:
            return
        if self._port == 0:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_post("/v1/chat/completions", self._chat)
            app.router.add_get("/v1/models", self._models)
            # Cancelled with their connection, so that a client that hangs up ends a hanging request.
            self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
            await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True, backlog=1024)
        await self._site.start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._site is None:
            return
        site, self._site = self._site, None
        await site.stop()
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            connection.force_close()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        name = hashlib.sha256(raw).hexdigest()
        before = self.attempts[name]
        first, _ = self.spans.setdefault(name, (self._loop.time(), 0.0))
        self.attempts[name] += 1
        self.requests += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self.latency:
                began = self._loop.time()
                await asyncio.sleep(self.latency)
                self.slept += self._loop.time() - began
            if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
                return web.json_response({"error": {"message": "Incorrect API key provided"}}, status=401)
            if self.faults and (self.max_faults is None or before < self.max_faults):
                chance = random.Random(f"fault {self.seed} {name} {before}")
                if chance.random() < self.faults:
                    return await self._fail(request, chance.choice(self.kinds), raw)
            answer = self._answer(json.loads(raw), name)
            if "status" in answer:
                return web.Response(status=answer["status"], text=answer.get("body"), headers=answer.get("headers"))
            if request.transport is not None:
                # Before it is sent: a client that has it may hang up at once, and that cancels what would come after.
                self.complete_replies[name] += 1
            return web.Response(body=json.dumps(answer).encode(), content_type="application/json")
        finally:
            self.in_flight -= 1
            self.spans[name] = (first, self._loop.time())

    def _answer(self, body: Body, name: str) -> Body:
        """What is sent; a mapping with `status` is `reply`'s own."""
        if self.garbage and (chance := random.Random(f"garbage {self.seed} {name}")).random() < self.garbage:
            given: str | Body = {"text": chance.choice(GARBAGE)}
        else:
            given = self.reply(body)
        given = {"text": given} if isinstance(given, str) else given
        if "status" in given:
            return given
        text, reason = given["text"], given.get("finish_reason", "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        if body.get("logprobs") and "logprobs" in given:
            tokens = [given["logprobs"]] if isinstance(given["logprobs"], dict) else given["logprobs"]
            choice["logprobs"] = {"content": [_token(token) for token in tokens]}
        read, written = sum(len(str(m.get("content"))) for m in body["messages"]) // 4, max(1, len(text or "") // 4)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {
            "id": "fake",
            "object": "chat.completion",
            "model": body.get("model"),
            "choices": [choice],
            "usage": usage | given.get("usage", {}),
        }

    async def _fail(self, request: web.Request, kind: str, raw: bytes) -> web.StreamResponse:
        self.faults_given[kind] += 1
        whole = json.dumps(self._answer(json.loads(raw), "")).encode()
        match kind:
            case "429 with Retry-After":
                return web.Response(status=429, headers={"Retry-After": self.retry_after})
            case "429" | "500" | "503":
                return web.json_response({"error": {"message": f"fault {kind}"}}, status=int(kind))
            case "hang":
                await asyncio.sleep(3600)
            case "closed before the reply":
                assert request.transport is not None
                request.transport.close()
            case "closed within the reply":
                return await _break_off(request, whole[: len(whole) // 2], len(whole))
            case "cut-off JSON":
                return web.Response(body=whole[: len(whole) // 2], content_type="application/json")
            case "empty body":
                return web.Response(body=b"", content_type="application/json")
            case "HTML page":
                return web.Response(text="<html><body>502 Bad Gateway</body></html>", content_type="text/html")
            case "no choices":
                return web.json_response({"object": "chat.completion", "choices": []})
            case _:
                raise ValueError(f"no such kind of fault: {kind!r}; known: {', '.join(FAULTS)}")
        return web.Response()


async def _break_off(request: web.Request, data: bytes, length: int) -> web.StreamResponse:
    """Promise `length` bytes, send `data`, and close the connection."""
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(length)})
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        await response.write(data)
    if request.transport is not None:
        request.transport.close()
    return response


def _token(logprobs: dict[str, float]) -> Body:
    """One generated token with its alternatives, as OpenAI and vLLM give them."""
    ranked = sorted(logprobs.items(), key=lambda item: -item[1])
    top = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in ranked]
    return {**top[0], "top_logprobs": top}

"""The client of chat endpoints, against a real HTTP server."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.testing_http import FAULTS, GARBAGE, FakeEndpoint
from judges.llm.client import DOWN, CallFailed, Client
from judges.llm.reply import Reply
from judges.llm.settings import Endpoint
from judges.llm.transport import run_each

ROOT = Path(__file__).parents[4]
KEY = "sk-proj-4mQz81TvXy"
FAST = {"cache": "off", "backoff": 0.005, "max_backoff": 0.01, "timeout": 0.5}


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def echo(body: dict[str, Any]) -> str:
    return f"you said {body['messages'][-1]['content']}"


class Impatient(Client):
    """Notes how long it should wait, and does not."""

    waits: list[float]

    async def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self._check_stage()


def client_of(server: FakeEndpoint, **settings: Any) -> Client:
    return Client(Endpoint(**{"base_url": server.base_url, **FAST, **settings}), model="fake")


def impatient(server: FakeEndpoint, **settings: Any) -> Impatient:
    client = Impatient(Endpoint(**{"base_url": server.base_url, **FAST, **settings}), model="fake")
    client.waits = []
    return client


def call(client: Client, *texts: str, concurrency: int = 32, **body: Any) -> list[Reply | str]:
    """The replies to `texts`, or the reasons why there are none."""

    async def one(text: str) -> Reply | str:
        try:
            return await client.chat(ask(text), **body)
        except CallFailed as error:
            return str(error)

    async def run() -> list[Reply | str]:
        async with client:
            return [r async for r in run_each((functools.partial(one, t) for t in texts), concurrency=concurrency)]

    return asyncio.run(run())


def texts_of(replies: list[Reply | str]) -> list[str]:
    return [r.text if isinstance(r, Reply) else f"failed: {r}" for r in replies]


# Calls and replies


def test_a_call_sends_the_body_and_gives_the_reply_with_what_it_used() -> None:
    bodies = []

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"text": "A", "finish_reason": "length", "usage": {"prompt_tokens": 11, "completion_tokens": 2}}

    with FakeEndpoint(reply) as server:
        client = client_of(server, extra={"temperature": 0.5, "max_tokens": None}, price_in=1.0, price_out=10.0)
        [got] = call(client, "hello", max_tokens=4, temperature=0.0, seed=3)
    assert got == Reply("A", "length", [], 11, 2, False)
    # `extra` wins over the judge's fields, and its null leaves one out.
    assert bodies == [{"messages": ask("hello"), "model": "fake", "temperature": 0.5, "seed": 3}]
    usage = client.usage()
    assert usage.pop("seconds") > 0
    assert usage == {
        "calls": 1, "cached": 0, "retries": 0, "failed": 0, "tokens_in": 11, "tokens_out": 2, "cost_usd": 31e-6,
    }  # fmt: skip


def test_log_probabilities_come_by_token_and_only_when_asked_for() -> None:
    with FakeEndpoint(lambda body: {"text": "A.", "logprobs": [{"A": -0.1, "B": -2.5}, {".": 0.0}]}) as server:
        [asked] = call(client_of(server), "x", logprobs=True, top_logprobs=2)
        [unasked] = call(client_of(server), "x")
    assert isinstance(asked, Reply)
    assert asked.top_logprobs == [{"A": -0.1, "B": -2.5}, {".": 0.0}]
    assert isinstance(unasked, Reply)
    assert unasked.top_logprobs == []


@pytest.mark.parametrize("logprobs", [None, {"content": None}, {"content": [{"token": "A"}]}, {"content": "?"}, 3])
def test_malformed_log_probabilities_are_none(logprobs: Any) -> None:
    choice = {"message": {"content": "A"}, "finish_reason": "stop", "logprobs": logprobs}
    with FakeEndpoint(lambda body: {"status": 200, "body": json.dumps({"choices": [choice]})}) as server:
        [reply] = call(client_of(server), "x", logprobs=True)
    assert isinstance(reply, Reply)
    assert reply.top_logprobs == []
    assert reply.tokens_in > 0  # estimated, where the server reports no usage


@pytest.mark.parametrize("content", [None, "", [], 7])
def test_a_reply_without_content_is_an_empty_text(content: Any) -> None:
    answer = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    with FakeEndpoint(lambda body: {"status": 200, "body": json.dumps(answer)}) as server:
        assert texts_of(call(client_of(server), "x")) == [""]


def test_the_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "Verdict: "}, {"type": "text", "text": "A"}]
    answer = {"choices": [{"message": {"content": parts}}]}
    with FakeEndpoint(lambda body: {"status": 200, "body": json.dumps(answer)}) as server:
        assert texts_of(call(client_of(server), "x")) == ["Verdict: A"]


# Retries


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_tried_again(kind: str) -> None:
    with FakeEndpoint(echo, faults=1.0, kinds=[kind], max_faults=2) as server:
        client = client_of(server, timeout=0.2)
        assert texts_of(call(client, "x")) == ["you said x"]
        assert server.faults_given == {kind: 2}
    assert client.usage()["retries"] == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("429", "HTTP 429 (3 attempts)"),
        ("503", "HTTP 503 (3 attempts)"),
        ("hang", "timed out after 0.1 s (3 attempts)"),
        ("closed before the reply", "connection closed (3 attempts)"),
        ("closed within the reply", "connection closed within the reply (3 attempts)"),
        ("cut-off JSON", "the reply was cut off JSON (3 attempts)"),
        ("empty body", "the reply was empty (3 attempts)"),
        ("HTML page", "the reply was not JSON (3 attempts)"),
        ("no choices", "the reply had no choices (3 attempts)"),
    ],
)
def test_a_fault_that_stays_fails_the_call_for_a_stable_reason(kind: str, reason: str) -> None:
    with FakeEndpoint(echo, faults=1.0, kinds=[kind]) as server:
        client = client_of(server, attempts=3, timeout=0.1)
        assert call(client, "x", "y") == [reason, reason]
        assert server.requests == 6
        assert server.complete_replies == {}
    assert client.usage()["failed"] == 2


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 504, 529])
def test_statuses_that_deserve_it_are_tried_again(status: int) -> None:
    with FakeEndpoint(lambda body: {"status": status}) as server:
        assert call(client_of(server, attempts=2), "x") == [f"HTTP {status} (2 attempts)"]
        assert server.requests == 2


def test_a_refused_connection_fails_with_that_reason() -> None:
    with FakeEndpoint(echo) as server:
        server.down = True
        assert call(client_of(server, attempts=2), "x") == ["connection refused (2 attempts)"]
        server.down = False
        assert texts_of(call(client_of(server), "x")) == ["you said x"]


def test_what_is_not_http_fails_with_that_reason() -> None:
    async def run() -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint(base_url=f"http://127.0.0.1:{port}/v1", **{**FAST, "attempts": 1})
            async with Client(endpoint, model="fake") as client:
                with pytest.raises(CallFailed) as failed:
                    await client.chat(ask("x"))
        return str(failed.value)

    assert asyncio.run(run()) == "the reply was not HTTP (1 attempt)"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(form: str) -> None:
    def reply(body: dict[str, Any]) -> str | dict[str, Any]:
        if server.requests > 1:
            return "A"
        value = "90" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
        return {"status": 429, "headers": {"Retry-After": value}}

    with FakeEndpoint(reply) as server:
        client = impatient(server)
        assert texts_of(call(client, "x")) == ["A"]
    [wait] = client.waits
    assert wait == 90 if form == "seconds" else 60 < wait <= 90  # a date is a time of day, and has whole seconds


@pytest.mark.parametrize("value", ["", "soon", "-5", "inf", "nan", "Mon, 99 Foo 2026", "Tue, 01 Jan 1980 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_overlooked(value: str) -> None:
    with FakeEndpoint(echo, faults=1.0, kinds=["429 with Retry-After"], max_faults=1, retry_after=value) as server:
        assert texts_of(call(client_of(server), "x")) == ["you said x"]


def test_a_retry_after_beyond_the_deadline_fails_at_once() -> None:
    with FakeEndpoint(echo, faults=1.0, kinds=["429 with Retry-After"], retry_after="3600") as server:
        client = impatient(server, deadline=5)
        assert call(client, "x") == ["HTTP 429 (deadline of 5 s)"]
        assert server.requests == 1
    assert client.waits == []


def test_a_call_and_all_its_attempts_end_at_the_deadline() -> None:
    with FakeEndpoint(echo, faults=1.0, kinds=["hang"]) as server:
        [reason] = call(client_of(server, timeout=0.3, deadline=0.7, attempts=50), "x")
        assert reason == "timed out after 0.3 s (deadline of 0.7 s)"
        assert server.requests <= 3


# Mistakes that only the user can mend


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "api_key_env"), (403, "api_key_env"), (404, "model"), (404, "base_url"), (301, "base_url")],
)
def test_a_mistake_in_the_configuration_stops_at_once_with_its_remedy(status: int, remedy: str) -> None:
    body = json.dumps({"error": {"message": "no\x1b[31m \u202ered"}})
    with FakeEndpoint(lambda _: {"status": status, "body": body}) as server:
        with pytest.raises(JudgeError) as error:
            call(client_of(server), *map(str, range(200)), concurrency=4)
        assert server.requests <= 8
    assert f"HTTP {status} (no\\x1b[31m \\u202ered)" in str(error.value)
    assert remedy in str(error.value)


def test_a_refused_request_fails_alone_and_is_not_tried_again() -> None:
    def reply(body: dict[str, Any]) -> str | dict[str, Any]:
        if body["messages"][0]["content"] == "fine":
            return "A"
        message = "This model's maximum context length is 256 tokens. However, you requested 300 tokens."
        return {"status": 400, "body": json.dumps({"error": {"message": message, "type": "BadRequestError"}})}

    with FakeEndpoint(reply) as server:
        client = client_of(server, give_up_after=2)
        replies = call(client, "a", "b", "c", "fine", concurrency=1)
        assert server.requests == 4
    assert replies[:3] == ["HTTP 400: This model's maximum context length is N tokens"] * 3
    assert texts_of(replies[3:]) == ["A"]  # refusals are no sign of an endpoint that is down


def test_a_refusal_that_quotes_the_messages_is_reduced_to_its_type() -> None:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        error = {"message": f"bad input: {body['messages'][0]['content']}", "type": "BadRequestError", "code": 400}
        return {"status": 422, "body": json.dumps({"error": error})}

    with FakeEndpoint(reply) as server:
        assert call(client_of(server), "the secret diary of a prompt") == ["HTTP 422: BadRequestError"]


# Keys


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with FakeEndpoint(echo) as server:
        with pytest.raises(JudgeError, match="environment variable NO_SUCH_KEY is not set"):
            call(client_of(server, api_key_env="NO_SUCH_KEY"), "x")
        assert server.requests == 0


def test_the_key_is_sent_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    settings = {"api_key_env": "JUDGE_KEY", "cache": str(tmp_path / "calls.sqlite")}
    with FakeEndpoint(echo, api_key=KEY) as server:
        client = client_of(server, **settings)
        assert texts_of(call(client, "x")) == ["you said x"]
        seen = [repr(client), repr(vars(client)), repr(client.endpoint), client.endpoint.model_dump_json()]
    quoting = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}, {KEY[:9]}***{KEY[-6:]}."}})
    for status in (401, 400):
        with FakeEndpoint(lambda _: {"status": status, "body": quoting}) as server:  # noqa: B023
            if status == 401:
                with pytest.raises(JudgeError) as error:
                    call(client_of(server, **settings), "y")
                seen.append("".join(traceback.format_exception(error.value)))
                assert error.value.__context__ is None
            else:
                seen.append(str(call(client_of(server, **settings), "y")))
    assert "Incorrect API key provided: ***" in seen[-2]
    assert seen[-1] == "['HTTP 400: Incorrect API key provided: *** ***']"
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"you said x" in files
    for piece in (KEY, KEY[:9], KEY[-6:]):
        assert piece not in "".join(seen) + caplog.text
        assert piece.encode() not in files


# Stages: deadline, endpoint down, budgets


def test_the_stage_ends_at_its_deadline_and_the_rest_fails_at_once() -> None:
    with FakeEndpoint(echo, latency=0.1) as server:
        client = client_of(server, stage_deadline=0.35)
        replies = call(client, *map(str, range(100)), concurrency=2)
        over = "the stage's deadline of 0.35 s is over"
        assert 1 <= sum(isinstance(r, Reply) for r in replies) <= 8
        assert {r for r in replies if isinstance(r, str)} == {over}
        assert call(client, "later") == [over]  # opened again, it is the same stage
        client.begin_stage()
        assert texts_of(call(client, "later")) == ["you said later"]


def test_an_endpoint_that_is_down_fails_the_stage_at_once_and_may_come_back() -> None:
    with FakeEndpoint(echo) as server:
        server.down = True
        client = client_of(server, attempts=2, give_up_after=5)
        replies = call(client, *map(str, range(500)), concurrency=3)
        counts = Counter(str(r) for r in replies)
        assert 5 <= counts["connection refused (2 attempts)"] <= 7
        assert counts[DOWN] == 500 - counts["connection refused (2 attempts)"]
        # Opened again while it is still down: one more failure is enough.
        assert Counter(map(str, call(client, *map(str, range(50)), concurrency=1)))[DOWN] == 49
        server.down = False
        assert texts_of(call(client, "x")) == ["you said x"]


def test_calls_that_wait_are_woken_when_the_endpoint_is_taken_as_down() -> None:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        waits = body["messages"][0]["content"] == "waits"
        return {"status": 503, "headers": {"Retry-After": "30" if waits else "0"}}

    with FakeEndpoint(reply) as server:
        replies = call(client_of(server, attempts=2, give_up_after=1), "waits", "fails")
        assert replies == [DOWN, "HTTP 503 (2 attempts)"]
        assert server.requests == 3  # the one that waited made no second attempt


def test_a_success_between_failures_keeps_the_endpoint_up() -> None:
    def reply(body: dict[str, Any]) -> str | dict[str, Any]:
        return "A" if int(body["messages"][0]["content"]) % 3 == 2 else {"status": 500}

    with FakeEndpoint(reply) as server:
        replies = call(client_of(server, attempts=1, give_up_after=3), *map(str, range(30)), concurrency=1)
    assert texts_of(replies) == (["failed: HTTP 500 (1 attempt)"] * 2 + ["A"]) * 10


@pytest.mark.parametrize("kind", ["tokens", "money"])
def test_a_budget_is_a_hard_stop_that_concurrency_does_not_overshoot(kind: str) -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": 4}  # less than is reserved: a quarter of the bytes, and 8
    budget = {"max_tokens_spent": 2400} if kind == "tokens" else {"max_cost_usd": 0.0048, "price_in": 2, "price_out": 2}
    with FakeEndpoint(lambda body: {"text": "A", "usage": usage}, latency=0.01) as server:
        client = client_of(server, **budget)
        replies = call(client, *map(str, range(300)), max_tokens=8)
        got = sum(isinstance(r, Reply) for r in replies)
        assert server.requests == got
        # 24 tokens a call; a last call is not begun where its estimate, under 48, does not fit.
        assert 98 <= got <= 100
        assert {r for r in replies if isinstance(r, str)} == {f"budget of {kind} spent"}
        assert client.usage()["tokens_in"] + client.usage()["tokens_out"] <= 2400
        assert call(client, "more", max_tokens=8) == [f"budget of {kind} spent"]
        client.begin_stage()
        assert texts_of(call(client, "more", max_tokens=8)) == ["A"]


def test_replies_beyond_their_estimates_overshoot_by_no_more_than_is_in_flight() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 100}
    with FakeEndpoint(lambda body: {"text": "A", "usage": usage}, latency=0.01) as server:
        client = client_of(server, max_tokens_spent=10_000, concurrency=8)
        call(client, *map(str, range(300)), max_tokens=8)
    assert 10_000 - 200 <= client.usage()["tokens_in"] + client.usage()["tokens_out"] <= 10_000 + 8 * 200


# The cache


def test_a_reply_is_paid_once_across_clients_and_addresses(tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "deep" / "calls.sqlite")}
    reply = {"text": "A", "logprobs": {"A": -0.1, "B": -2.5}}
    with FakeEndpoint(lambda body: reply) as server, FakeEndpoint(lambda body: "another") as elsewhere:
        [paid] = call(client_of(server, **cache), "x", logprobs=True)
        again = client_of(elsewhere, **cache, api_key_env="KEY_THAT_IS_NOT_NEEDED")
        [kept] = call(again, "x", logprobs=True)
        assert elsewhere.requests == 0
        assert isinstance(paid, Reply)
        assert kept == paid._replace(cached=True)
        assert again.usage() == {
            "calls": 1, "cached": 1, "retries": 0, "failed": 0, "tokens_in": 0, "tokens_out": 0, "seconds": 0,
            "cost_usd": 0,
        }  # fmt: skip
        call(client_of(server, **cache), "x", logprobs=True, temperature=0.1)  # another body
        call(client_of(server, **cache), "x", logprobs=True, salt="second opinion")
        call(client_of(server, **cache), "y", logprobs=True)
        assert server.requests == 4


def test_failures_and_empty_replies_are_not_kept(tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "calls.sqlite")}
    with FakeEndpoint(lambda body: {"status": 500} if server.requests == 1 else {"text": None}) as server:
        assert texts_of(call(client_of(server, attempts=1, **cache), "x")) == ["failed: HTTP 500 (1 attempt)"]
        assert texts_of(call(client_of(server, **cache), "x")) == [""]
        assert texts_of(call(client_of(server, **cache), "x")) == [""]
        assert server.requests == 3


PAYING = """
import asyncio, sys
from judges.llm.client import Client
from judges.llm.transport import run_each
from judges.llm.settings import Endpoint
client = Client(Endpoint(base_url=sys.argv[1], cache=sys.argv[2], concurrency=4), model="fake")

async def one(n):
    await client.chat([{"role": "user", "content": f"{n}"}])
    print(n, flush=True)

async def main():
    async with client:
        async for _ in run_each(((lambda n=n: one(n)) for n in range(int(sys.argv[3]))), concurrency=4):
            pass
asyncio.run(main())
"""


def test_what_was_paid_outlives_a_killed_process(tmp_path: Path) -> None:
    cache = str(tmp_path / "calls.sqlite")
    with FakeEndpoint(echo, latency=0.02) as server:
        command = [sys.executable, "-c", PAYING, server.base_url, cache, "1000"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert child.stdout is not None
        done = [int(child.stdout.readline()) for _ in range(40)]
        os.kill(child.pid, signal.SIGKILL)
        done += [int(line) for line in child.stdout.read().split()]
        child.wait()
        replies = call(client_of(server, cache=cache), *map(str, range(100)))
        assert texts_of(replies) == [f"you said {n}" for n in range(100)]
        assert all(isinstance(replies[n], Reply) and replies[n].cached for n in done if n < 100)  # type: ignore[union-attr]
        # Only the four that were in flight may have been paid twice.
        assert sum(count - 1 for count in server.complete_replies.values()) <= 4


def test_processes_and_threads_share_a_cache_file(tmp_path: Path) -> None:
    cache = str(tmp_path / "calls.sqlite")
    with FakeEndpoint(echo) as server:
        command = [sys.executable, "-c", PAYING, server.base_url, cache, "150"]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
        replies: list[list[Reply | str]] = []
        threads = [
            threading.Thread(target=lambda: replies.append(call(client_of(server, cache=cache), *map(str, range(150)))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(child.communicate()[0].split()) for child in children] == [150] * 3
        assert [child.returncode for child in children] == [0] * 3
    assert [texts_of(r) for r in replies] == [[f"you said {n}" for n in range(150)]] * 3
    with sqlite3.connect(cache) as database:
        assert database.execute("SELECT count(*) FROM replies").fetchone() == (150,)


@pytest.mark.parametrize("damage", ["text", "torn"])
def test_a_damaged_cache_is_named(tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "calls.sqlite"
    with FakeEndpoint(echo) as server:
        if damage == "text":
            cache.write_text("this was never a database, and it is longer than a header" * 100)
        else:
            call(client_of(server, cache=str(cache)), *map(str, range(200)))
            whole = cache.read_bytes()
            cache.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        with pytest.raises(JudgeError, match=r"calls\.sqlite: cannot be used: .*move the file away"):
            call(client_of(server, cache=str(cache)), "1")


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with FakeEndpoint(echo) as server, pytest.raises(JudgeError, match=r"calls\.sqlite: cannot be used"):
        call(client_of(server, cache=str(tmp_path / "file" / "calls.sqlite")), "1")


def test_the_cache_lies_in_the_users_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FakeEndpoint(echo) as server:
        call(client_of(server, cache=None), "1")
    assert (tmp_path / "iterdpo" / "judge-calls.sqlite").exists()


@pytest.mark.parametrize("cache", ["off", "on"])
def test_identical_calls_at_once_are_paid_once(tmp_path: Path, cache: str) -> None:
    with FakeEndpoint(echo, latency=0.1) as server:
        client = client_of(server, cache="off" if cache == "off" else str(tmp_path / "calls.sqlite"))
        replies = call(client, *["same"] * 20, "other")
        assert server.requests == 2
    assert texts_of(replies) == ["you said same"] * 20 + ["you said other"]
    assert sum(isinstance(r, Reply) and r.cached for r in replies) == 19
    assert client.usage()["cached"] == 19


def test_a_call_that_is_cancelled_leaves_the_work_to_those_who_wait_for_the_same() -> None:
    async def run() -> Reply:
        async with client:
            first = asyncio.create_task(client.chat(ask("x")))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(client.chat(ask("x")))
            third = asyncio.create_task(client.chat(ask("x")))
            await asyncio.sleep(0.05)
            third.cancel()  # waits for another's reply: nobody else is cancelled
            await asyncio.sleep(0)
            assert not first.done()
            first.cancel()
            return await second

    with FakeEndpoint(echo, latency=0.2) as server:
        client = client_of(server)
        assert asyncio.run(run()).text == "you said x"
        assert server.requests == 2
        assert sum(server.complete_replies.values()) == 1


def test_identical_calls_fail_together() -> None:
    with FakeEndpoint(lambda body: {"status": 500}, latency=0.05) as server:
        client = client_of(server, attempts=1)
        assert call(client, *["same"] * 5) == ["HTTP 500 (1 attempt)"] * 5
        assert server.requests == 1
    assert client.usage()["failed"] == 5


# Concurrency and rates


def test_the_concurrency_limit_holds_whoever_calls() -> None:
    with FakeEndpoint(echo, latency=0.02, faults=0.3, kinds=["429", "500"]) as server:
        replies = call(client_of(server, concurrency=5, attempts=20), *map(str, range(60)), concurrency=60)
        assert server.max_in_flight == 5
    assert texts_of(replies) == [f"you said {n}" for n in range(60)]


def test_waiting_for_another_attempt_holds_no_slot() -> None:
    def reply(body: dict[str, Any]) -> str | dict[str, Any]:
        if body["messages"][0]["content"] == "slow" and server.requests == 1:
            return {"status": 429, "headers": {"Retry-After": "3"}}
        return "A"

    async def run() -> None:
        async with client_of(server, concurrency=1) as client:
            slow = asyncio.create_task(client.chat(ask("slow")))
            while not server.requests or server.in_flight:
                await asyncio.sleep(0.01)
            await client.chat(ask("quick"))
            assert not slow.done()
            await slow

    with FakeEndpoint(reply) as server:
        asyncio.run(run())


@pytest.mark.parametrize("limit", ["requests", "tokens"])
def test_rates_are_held(limit: str) -> None:
    # 600 a minute are 10 a second; and 30 tokens for each of them.
    rate = {"requests_per_minute": 600} if limit == "requests" else {"tokens_per_minute": 600 * 30}
    usage = {"prompt_tokens": 26, "completion_tokens": 4}
    with FakeEndpoint(lambda body: {"text": "A", "usage": usage}) as server:
        began = time.monotonic()
        client = impatient(server, **rate, concurrency=1)
        replies = call(client, *map(str, range(13)), max_tokens=4)
        took = time.monotonic() - began
    assert texts_of(replies) == ["A"] * 13
    for n, wait in enumerate(client.waits[-12:], 1):  # request n is due n / 10 s after the first; it waits for the rest
        assert n / 10 - took <= wait <= n / 10


# Everything at once


def test_with_three_in_ten_requests_failing_each_call_gets_its_reply_and_pays_once(tmp_path: Path) -> None:
    with FakeEndpoint(echo, latency=0.002, faults=0.3, max_faults=5, seed=7) as server:
        client = client_of(server, cache=str(tmp_path / "calls.sqlite"), timeout=1.0)
        replies = call(client, *map(str, range(300)))
        assert texts_of(replies) == [f"you said {n}" for n in range(300)]
        assert len(server.complete_replies) == 300
        assert set(server.complete_replies.values()) == {1}
        assert set(server.faults_given) == set(FAULTS)
        assert server.requests == 300 + sum(server.faults_given.values())
        assert client.usage()["retries"] == sum(server.faults_given.values())


def test_garbage_with_status_200_passes_through_to_the_parser() -> None:
    with FakeEndpoint(echo, garbage=0.5, seed=3) as server:
        texts = texts_of(call(client_of(server), *map(str, range(100))))
    garbage = [t for n, t in enumerate(texts) if t != f"you said {n}"]
    assert 30 <= len(garbage) <= 70
    assert set(garbage) == {t or "" for t in GARBAGE}


def test_a_client_can_be_opened_again_in_another_loop_and_thread() -> None:
    with FakeEndpoint(echo, latency=0.01, faults=1.0, kinds=["500"], max_faults=1) as server:
        client = client_of(server, concurrency=1)  # calls wait: for slots, and for another attempt
        assert texts_of(call(client, "1", "2", "3")) == ["you said 1", "you said 2", "you said 3"]
        replies: list[Reply | str] = []
        thread = threading.Thread(target=lambda: replies.extend(call(client, "4", "5")))
        thread.start()
        thread.join()
        client.begin_stage()
        assert texts_of([*replies, *call(client, "6")]) == ["you said 4", "you said 5", "you said 6"]
    assert (client.usage()["calls"], client.usage()["retries"]) == (6, 6)


def test_a_client_needs_an_address_from_somewhere_when_it_is_opened() -> None:
    with pytest.raises(JudgeError, match="missing key 'base_url'"):
        call(Client(Endpoint(**FAST), model="fake"), "x")
    with pytest.raises(JudgeError, match="base_url: is not a valid address"):
        call(Client(Endpoint(**FAST), model="fake", base_url="nowhere"), "x")
    with FakeEndpoint(echo) as server:
        client = Client(Endpoint(**FAST), model="fake")
        client.base_url = f"{server.base_url}/"
        assert texts_of(call(client, "x")) == ["you said x"]

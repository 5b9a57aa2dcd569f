"""Prefect's clients and a server that does not answer: asked once, and then no more."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from prefect.client import orchestration
from prefect.client.orchestration import get_client
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event, Resource
from prefect.events.worker import EventsWorker
from prefect.logging import handlers
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from flows import lost
from flows.lost import is_lost, watch
from iterdpo.errors import ChildFailed, UserError


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prefect's clients, watched for the time of a test, and no server lost yet."""
    for name in ("PrefectHttpxSyncClient", "PrefectHttpxAsyncClient"):
        monkeypatch.setattr(orchestration, name, getattr(orchestration, name))
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(lost, "_paused_until", float("-inf"))
    override = EventsWorker._client_override
    sink = handlers._api_log_sink
    watch.__wrapped__()
    yield
    EventsWorker._client_override = override
    handlers.set_api_log_sink(sink)


class Hung:
    """A server that accepts each connection and never answers; `asked` counts them."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.asked = 0
        self.held: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self.held.append(self.socket.accept()[0])
            except OSError:
                return
            self.asked += 1


@pytest.fixture
def hung() -> Iterator[Hung]:
    server = Hung()
    port = server.socket.getsockname()[1]
    with temporary_settings(
        {
            PREFECT_API_URL: f"http://127.0.0.1:{port}/api",
            PREFECT_API_REQUEST_TIMEOUT: 0.2,
            PREFECT_CLIENT_MAX_RETRIES: 0,
        }
    ):
        yield server
    server.socket.close()
    for connection in server.held:
        connection.close()


def ask() -> None:
    with get_client(sync_client=True) as client:
        client.read_flows(limit=1)


async def ask_async() -> None:
    async with get_client() as client:
        await client.read_flows(limit=1)


def test_a_server_that_hangs_is_not_asked_again_by_any_client(hung: Hung) -> None:
    with pytest.raises(httpx.TransportError) as first:
        ask()
    asked = hung.asked
    assert asked > 0
    with pytest.raises(httpx.ConnectError, match="did not answer before"):
        ask()
    with pytest.raises(httpx.ConnectError, match="did not answer before"):
        asyncio.run(ask_async())
    assert hung.asked == asked
    assert is_lost(first.value)


def test_a_client_without_blocking_notices_too(hung: Hung) -> None:
    with pytest.raises(httpx.TransportError):
        asyncio.run(ask_async())
    asked = hung.asked
    with pytest.raises(httpx.ConnectError, match="did not answer before"):
        ask()
    assert hung.asked == asked


def test_a_server_that_is_gone_is_lost() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}), pytest.raises(httpx.ConnectError) as gone:
        ask()
    assert is_lost(gone.value)
    assert not logging.raiseExceptions


@pytest.mark.parametrize(("status", "paused"), [(500, True), (503, True), (404, False), (422, False)])
def test_a_server_that_fails_is_lost_and_one_that_refuses_is_not(status: int, paused: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    try:
        with (
            temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}),
            pytest.raises(httpx.HTTPStatusError) as failed,
        ):
            ask()
        assert is_lost(failed.value) is paused
    finally:
        server.shutdown()
        server.server_close()


def test_errors_of_ours_and_those_while_the_server_answers_are_not_the_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not is_lost(KeyError("a bug"))
    monkeypatch.setattr(lost, "_paused_until", float("inf"))
    assert not is_lost(UserError("a typo"))
    assert not is_lost(ChildFailed("training failed"))


def test_a_minute_later_the_server_is_asked_again(hung: Hung, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(httpx.TransportError):
        ask()
    asked = hung.asked
    monkeypatch.setattr(lost, "_paused_until", lost._paused_until - lost.PAUSE_SECONDS)
    with pytest.raises(httpx.TransportError):
        ask()
    assert hung.asked > asked


def test_lines_of_the_log_go_to_the_server_while_it_answers_and_nowhere_after_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[dict[str, Any]] = []

    class Worker:
        def send(self, line: dict[str, Any]) -> None:
            sent.append(line)

    monkeypatch.setattr(lost.APILogWorker, "instance", Worker)
    handlers.emit_api_log({"message": "one"})
    monkeypatch.setattr(lost, "_paused_until", float("inf"))
    handlers.emit_api_log({"message": "two"})
    assert sent == [{"message": "one"}]


def test_events_are_dropped_in_silence_if_the_server_hangs(
    hung: Hung, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lost, "EVENT_SECONDS", 0.2)
    event = Event(event="tested", resource=Resource({"prefect.resource.id": "test"}))

    async def emit() -> None:
        assert EventsWorker._client_override is not None
        client: type[PrefectEventsClient] = EventsWorker._client_override[0]  # type: ignore[assignment]
        async with client() as events:
            asked = hung.asked
            await events.emit(event)
            assert hung.asked == asked > 0

    with caplog.at_level(logging.WARNING):
        asyncio.run(emit())
    assert caplog.records == []
    with pytest.raises(httpx.ConnectError, match="did not answer before"):
        ask()

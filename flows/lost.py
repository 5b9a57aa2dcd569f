"""A run goes on, and ends soon, if its Prefect server hangs or is gone.

Prefect's clients try each request three times and learn nothing from one another, so the end of a flow alone would take
minutes. After `watch`, a request that gets no answer makes all others fail at once for a minute. What Prefect sends in
the background (log lines, events) is then dropped, without a message on the screen.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prefect.client import orchestration
from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker, emit_events_to_cloud
from prefect.logging.handlers import APILogWorker, set_api_log_sink

from iterdpo.errors import RunFailed, UserError

PAUSE_SECONDS = 60.0
EVENT_SECONDS = 10.0

_paused_until = -math.inf


def is_lost(error: Exception) -> bool:
    """Whether `error`, raised in a flow run, comes from a Prefect server that does not answer. Then it is asked no more."""
    if isinstance(error, UserError | RunFailed) or not _paused():
        return False
    _pause(math.inf)
    return True


@functools.cache
def watch() -> None:
    """From now on, for all of Prefect's clients in this process: see the module's docstring."""

    class SyncClient(PrefectHttpxSyncClient):
        def send(self, request: httpx.Request, *args: Any, **kwargs: Any) -> httpx.Response:
            with _asking(request):
                return super().send(request, *args, **kwargs)

    class AsyncClient(PrefectHttpxAsyncClient):
        async def send(self, request: httpx.Request, *args: Any, **kwargs: Any) -> httpx.Response:
            with _asking(request):
                return await super().send(request, *args, **kwargs)

    for watched in (SyncClient, AsyncClient):
        setattr(orchestration, watched.__bases__[0].__name__, watched)  # Prefect has no setting for it
    set_api_log_sink(lambda line: None if _paused() else APILogWorker.instance().send(line))
    if not emit_events_to_cloud():
        EventsWorker.set_client_override(_EventsClient)


class _EventsClient(PrefectEventsClient):
    async def __aenter__(self) -> _EventsClient:
        try:
            async with asyncio.timeout(EVENT_SECONDS):
                await super().__aenter__()
        except Exception:
            _pause()
        return self

    async def _emit(self, event: Event) -> None:
        if not _paused():
            try:
                async with asyncio.timeout(EVENT_SECONDS):
                    await super()._emit(event)
            except Exception:
                _pause()


@contextmanager
def _asking(request: httpx.Request) -> Iterator[None]:
    if _paused():
        raise httpx.ConnectError("the Prefect server did not answer before", request=request)
    try:
        yield
    except (httpx.TransportError, httpx.HTTPStatusError) as error:
        if isinstance(error, httpx.TransportError) or error.response.status_code >= 500:
            _pause()
        raise


def _paused() -> bool:
    return time.monotonic() < _paused_until


def _pause(seconds: float = PAUSE_SECONDS) -> None:
    global _paused_until
    _paused_until = max(_paused_until, time.monotonic() + seconds)
    logging.raiseExceptions = False  # of a handler that cannot send a line

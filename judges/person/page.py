"""The page on which a person compares completions: an HTTP server on 127.0.0.1, over the batches of `judges/person/store.py`.

What a model wrote is data: it travels as JSON, the page sets it as text, and the page's policy runs no script but its
own. A request needs the random token of the URL, and a `Host` that is this machine, so that no other web page that is
open in the same browser can read or judge.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from iterdpo.escape import revealed
from iterdpo.run.rundir import digest
from judges.person.store import Reviews, Task

LIMIT = 64 * 1024  # bytes of a request
CONNECTIONS = 64  # a browser opens six
SECONDS = 10.0  # that a request may take to arrive
NOTE_LIMIT = 2_000  # characters
CHOICES = ("left", "right", "tie", "skip")
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("judges.person", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


class Desk:
    """Hands tasks out to tabs, and takes verdicts. `who`: only what is for them; None is everything."""

    def __init__(self, run_dir: Path, *, who: str | None = None) -> None:
        self.reviews = Reviews(run_dir)
        self.who = who
        self._shown: dict[str, tuple[str, float]] = {}  # tab -> the task on its screen, and since when
        self._order = secrets.token_hex(8)
        self._lock = threading.Lock()

    def next(self, tab: str, *, prefer: str | None = None) -> dict[str, Any]:
        """What the tab shows next: `{"task": {...} or None, "done": 3, "total": 20}`.

        Another task than other tabs show, if there is one. Servers hand out in different orders, so that two of
        them seldom ask the same.
        """
        with self._lock:
            taken = {task: since for other, (task, since) in self._shown.items() if other != tab}

            def order(task: Task) -> tuple[bool, float]:
                return task.id != prefer, taken.get(task.id, 0.0)

            batches = self.reviews.pending(self.who)
            shuffled = (sorted(b.unanswered(self.who), key=lambda t: digest([self._order, t.id])) for b in batches)
            waiting = [task for tasks in shuffled for task in tasks]
            task = min(waiting, key=order, default=None)
            self._shown.pop(tab, None)
            if task is not None:
                self._shown[tab] = (task.id, time.monotonic())
                while len(self._shown) > CONNECTIONS:
                    del self._shown[next(iter(self._shown))]  # the tab that asked longest ago
        total = sum(self.who in (None, t.who) for batch in batches for t in batch.tasks())
        return {"task": None if task is None else shown(task), "done": total - len(waiting), "total": total}

    def submit(self, tab: str, task_id: str, choice: str, note: str) -> dict[str, Any]:
        """Take a verdict, and say what is next. A verdict that stands already stays, so sending twice changes nothing."""
        batch = self.reviews.find(task_id)
        if batch is None or choice not in CHOICES:
            return {**self.next(tab), "error": "no such task"}
        accepted = batch.submit(task_id, choice, note[:NOTE_LIMIT].encode(errors="replace").decode())  # type: ignore[arg-type]
        return {**self.next(tab), "accepted": accepted}

    def undo(self, tab: str, task_id: str) -> dict[str, Any]:
        """Take a verdict back and show the task again, unless the run has taken it."""
        batch = self.reviews.find(task_id)
        if batch is None or not batch.undo(task_id):
            return {**self.next(tab), "error": "too late to undo: the run has taken the verdict"}
        return self.next(tab, prefer=task_id)

    def pending(self) -> int:
        return sum(len(batch.unanswered(self.who)) for batch in self.reviews.pending(self.who))


def shown(task: Task) -> dict[str, Any]:
    """A task as the page gets it, with every character visible."""
    content = task.prompt if isinstance(task.prompt, list) else [{"content": task.prompt}]
    prompt = [{key: revealed(str(message.get(key, ""))) for key in ("role", "content")} for message in content]
    texts = {"question": revealed(task.question), "left": revealed(task.left), "right": revealed(task.right)}
    return {"id": task.id, "prompt": prompt, **texts}


@contextmanager
def review_server(desk: Desk, *, port: int = 0, title: str = "") -> Iterator[str]:
    """Serve the page on 127.0.0.1 while the context is open. Gives its URL; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    token = secrets.token_urlsafe(24)
    app = _app(desk, token=token, title=title)
    # The path has the token, so that nothing is logged.
    quiet: dict[str, Any] = {"log_level": "critical", "access_log": False, "server_header": False}
    limits: dict[str, Any] = {"http": _Limited, "ws": "none", "h11_max_incomplete_event_size": LIMIT}
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", **quiet, **limits))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"
        finally:
            server.should_exit = True
            thread.join()


class _Limited(H11Protocol):
    """HTTP for a limited number of connections. One whose request is not whole in time is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._late = self.loop.call_later(SECONDS, self._end_if_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is None:
            self._late = self.loop.call_later(SECONDS, self._end_if_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _end_if_late(self) -> None:
        self._late = None
        nothing = self.cycle is None
        if self.conn.their_state is h11.SEND_BODY or (
            self.conn.their_state is h11.IDLE and (nothing or self.conn.trailing_data[0])
        ):
            self.transport.abort()


def _app(desk: Desk, *, token: str, title: str) -> Starlette:
    async def act(action: str, request: Request) -> Response:
        try:
            length = int(request.headers.get("content-length", ""))
            body: Any = json.loads(await request.body()) if 0 <= length <= LIMIT else None
            tab, task, choice, note = (str(body.get(name, "")) for name in ("tab", "task", "choice", "note"))
            tab = tab[:64]
        except (ValueError, AttributeError):
            return _refusal(400)
        actions = {
            "next": lambda: desk.next(tab),
            "verdict": lambda: desk.submit(tab, task, choice, note),
            "undo": lambda: desk.undo(tab, task),
        }
        if action not in actions:
            return _refusal(404)
        return JSONResponse(await run_in_threadpool(actions[action]), headers=_headers())

    async def answer(request: Request) -> Response:
        host = request.headers.get("host", "").lower()
        # A name that an attacker's DNS points here would reach this server with its own Host.
        own = host.rpartition(":")[0] in ("127.0.0.1", "localhost")
        if not own or request.headers.get("origin") not in (None, f"http://{host}"):
            return _refusal(403)
        given, _, action = request.path_params["path"].partition("/")
        if not hmac.compare_digest(given.encode(), token.encode()):
            return _refusal(404)
        if request.method == "POST":
            return await act(action, request)
        if action:
            return _refusal(404)
        nonce = secrets.token_urlsafe(16)
        page = TEMPLATES.get_template("page.html.j2").render(title=revealed(title), nonce=nonce)
        return HTMLResponse(page, headers=_headers(nonce))

    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


def _refusal(status: int) -> Response:
    return PlainTextResponse("not found\n" if status == 404 else "refused\n", status, _headers())


def _headers(nonce: str | None = None) -> dict[str, str]:
    own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; " if nonce else ""
    return {
        "Content-Security-Policy": f"default-src 'none'; {own}base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

"""The page on which a person compares completions: an HTTP server on 127.0.0.1, over the batches of `judges/person/store.py`.

What a model wrote is data: it travels as JSON, the page sets it as text, and the page's policy runs no script but its
own. A request needs the random token of the URL, and a `Host` that is this machine, so that no other web page that is
open in the same browser can read or judge.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from iterdpo.escape import revealed
from iterdpo.run.rundir import digest
from judges.person.store import Reviews, Task

LIMIT = 64 * 1024  # bytes of a request
NOTE_LIMIT = 2_000  # characters
CHOICES = ("left", "right", "tie", "skip")


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

        Another task than other tabs show, where there is one. Servers hand out in different orders, so that two of
        them seldom ask the same.
        """
        with self._lock:
            taken = {task: since for other, (task, since) in self._shown.items() if other != tab}

            def order(waiting: tuple[int, Task]) -> tuple[bool, float, int, str]:
                number, task = waiting
                return task.id != prefer, taken.get(task.id, 0.0), number, digest([self._order, task.id])

            batches = self.reviews.pending(self.who)
            waiting = [(number, t) for number, batch in enumerate(batches) for t in batch.unanswered(self.who)]
            task = min(waiting, key=order)[1] if waiting else None
            self._shown.pop(tab, None)
            if task is not None:
                self._shown[tab] = (task.id, time.monotonic())
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
    content = task.prompt if isinstance(task.prompt, list) else [{"role": "", "content": task.prompt}]
    return {
        "id": task.id,
        "question": revealed(task.question),
        "prompt": [
            {"role": revealed(m.get("role", "")), "content": revealed(str(m.get("content", "")))} for m in content
        ],
        "left": revealed(task.left),
        "right": revealed(task.right),
    }


@contextmanager
def review_server(desk: Desk, *, port: int = 0, title: str = "") -> Iterator[str]:
    """Serve the page on 127.0.0.1 while the context is open. Gives its URL; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    token = secrets.token_urlsafe(24)

    class Handler(_Handler):
        pass

    Handler.desk, Handler.token, Handler.title = desk, token, title
    with _Server(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{token}/"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a tab that was closed is no error
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    desk: Desk
    token: str
    title: str
    timeout = 30  # seconds that a connection may be silent for

    def do_GET(self) -> None:
        if self._action() == "":
            nonce = secrets.token_urlsafe(16)
            self._reply(200, "text/html; charset=utf-8", _page(self.title, nonce).encode(), nonce)

    def do_POST(self) -> None:
        action = self._action()
        if action is None:
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            body: Any = json.loads(self.rfile.read(length)) if 0 <= length <= LIMIT else None
            tab, task, choice, note = (str(body.get(name, "")) for name in ("tab", "task", "choice", "note"))
        except (ValueError, AttributeError):
            self._refuse(400)
            return
        match action:
            case "next":
                answer = self.desk.next(tab)
            case "verdict":
                answer = self.desk.submit(tab, task, choice, note)
            case "undo":
                answer = self.desk.undo(tab, task)
            case _:
                self._refuse(404)
                return
        self._reply(200, "application/json", json.dumps(answer).encode())

    def _action(self) -> str | None:
        """What the path asks for behind the token; None where the request is refused."""
        host = (self.headers.get("Host") or "").lower()
        origin = self.headers.get("Origin")
        # A name that an attacker's DNS points here would reach this server with its own Host.
        if host.rpartition(":")[0] not in ("127.0.0.1", "localhost") or origin not in (None, f"http://{host}"):
            self._refuse(403)
            return None
        token, _, action = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            self._refuse(404)
            return None
        if action and self.command == "GET":
            self._refuse(404)
            return None
        return action

    def _refuse(self, status: int) -> None:
        self._reply(status, "text/plain; charset=utf-8", b"not found\n" if status == 404 else b"refused\n")

    def _reply(self, status: int, kind: str, body: bytes, nonce: str | None = None) -> None:
        own = (
            f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
            if nonce
            else ""
        )
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"default-src 'none'; {own}base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "iterdpo"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the path has the token."""


def _page(title: str, nonce: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("judges.person", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2").render(title=revealed(title), nonce=nonce)

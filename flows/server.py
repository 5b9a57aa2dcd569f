"""A Prefect API to run on: the configured one, or a server that we start and that ends with this process.

Prefect's ephemeral server outlives a flow that is killed; ours runs under `iterdpo.run.supervise`. Whoever can call
the API of a Prefect server can start rounds, so ours answers only to who has its password, sent by its own page or by
a program, under its own name (`app`).
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iterdpo.errors import ChildFailed, UserError
from iterdpo.escape import printable
from iterdpo.run import disk, supervise
from iterdpo.run.devices import answers, free_port, is_free

if TYPE_CHECKING:
    from starlette.types import ASGIApp

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# A question to a server that hangs would otherwise take seven minutes; see `flows.lost`.
os.environ.setdefault("PREFECT_API_REQUEST_TIMEOUT", "10")
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")

STARTUP_SECONDS = 120.0
CHECK_SECONDS = 10.0
PASSWORD_FILE = "iterdpo-password"  # in PREFECT_HOME
FAILED = "iterdpo: a background service of Prefect failed: "
BUSY = "database is locked"
"""What SQLite says after a wait of seconds, and what may work the next time."""
FAILED_AGAIN_SECONDS = 180.0


class PrefectAPI(NamedTuple):
    """An API, of the user's server or of ours: `PrefectAPI("http://127.0.0.1:4200/api")`."""

    url: str
    password: Path | None = None
    """Our server's password is in this file, and what it logs in `log` from byte `begun` on."""
    log: Path | None = None
    begun: int = 0

    @property
    def page(self) -> str:
        """Its page, and how to sign in there."""
        page = self.url.removesuffix("/api")
        return page if self.password is None else f"{page} (sign in with the password in {self.password})"

    def failures(self) -> list[str]:
        """What our server's background services failed with, such as the scheduler's; see `_Failures`."""
        if self.log is None:
            return []
        with open(self.log, encoding="utf-8", errors="replace") as lines:
            lines.seek(self.begun)
            return [line.removeprefix(FAILED).strip() for line in lines if line.startswith(FAILED)]


def check_api() -> None:
    """Ask the Prefect API that is configured, by PREFECT_API_URL or a profile, one question. Without one there is nothing to ask.

    Raises:
        UserError: it does not answer, or refuses the question.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

    url = get_current_settings().api.url
    if not url:
        return
    remedy = "start that server, or unset PREFECT_API_URL for a server of our own"
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": CHECK_SECONDS}, sync_client=True) as client,
        ):
            client.read_flows(limit=1)
        return
    except Exception as error:  # httpx's, Prefect's, and pydantic's if another kind of server answers
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (
            f"answers HTTP {status}" if status else f"does not answer as a Prefect server does ({type(error).__name__})"
        )
    if status in (401, 403):
        remedy = "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY to its key"
    shown = re.sub(r"//[^/@]*@", "//", url)  # without a password
    raise UserError(f"PREFECT_API_URL = {printable(shown)}: {reason}; {remedy}")


@contextmanager
def only_once(name: str) -> Iterator[int]:
    """Hold the name of a served deployment among this user's processes. Yields the port of its page, the same each time.

    If another process has that port, it is a free one from then on.

    Raises:
        UserError: another process serves this name.
    """
    from prefect.settings import get_current_settings

    path = get_current_settings().home / "iterdpo-served" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            disk.lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, f"PREFECT_HOME {path.parent}")
        except BlockingIOError:
            raise UserError(
                f"--name {name!r}: another process serves it; stop that one, or choose another name"
            ) from None
        file.seek(0)
        kept = file.read().strip()
        port = int(kept) if kept.isdigit() and is_free(int(kept)) else free_port()
        file.truncate(0)
        file.write(str(port))
        file.flush()
        yield port


@contextmanager
def prefect_api(log: Path, *, port: int | None = None) -> Iterator[PrefectAPI]:
    """A Prefect API, set for the code inside and for its child processes. What Prefect logs goes to `log`.

    `port` is that of a server of our own; by default a free one.

    Raises:
        ChildFailed: our own server did not come up.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, get_current_settings, temporary_settings

    log_to_file(log)
    if configured := get_current_settings().api.url:
        yield PrefectAPI(configured)
        return
    with start_server(log, port=port) as api:
        assert api.password is not None
        client = {PREFECT_API_URL: api.url, PREFECT_API_AUTH_STRING: api.password.read_text()}
        previous = {setting.name: os.environ.get(setting.name) for setting in client}
        os.environ.update((setting.name, value) for setting, value in client.items())  # a served flow runs in a child
        try:
            with temporary_settings(client):
                try:
                    yield api
                finally:
                    # What Prefect still holds back goes while the server lives: after it, each line would fail aloud.
                    for worker in (APILogWorker, EventsWorker):
                        worker.drain_all(timeout=10)
        finally:
            for name, value in previous.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def start_server(log: Path, *, port: int | None = None) -> Iterator[PrefectAPI]:
    """A Prefect server with its page, on 127.0.0.1, with its database and its password in PREFECT_HOME."""
    password = password_file()
    port = port or free_port()
    origin = f"http://127.0.0.1:{port}"
    begun = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "uvicorn", "--factory", f"{__name__}:app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    env = {
        **os.environ,
        "PREFECT_API_URL": f"{origin}/api",
        "PREFECT_UI_API_URL": f"{origin}/api",
        "PREFECT_SERVER_API_AUTH_STRING": password.read_text(),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origin,
    }
    with supervise.start(command, log=log, env=env) as server:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not answers(f"{origin}/api/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                why = "it does not answer" if server.poll() is None else printable(server.reason())
                problem = f"the Prefect server did not start: {why} (the whole log: {log})"
                raise ChildFailed(f"{problem}; --no-prefect runs without it")
            time.sleep(0.1)
        if server.poll() is not None:
            raise ChildFailed(f"another process took port {port} while the Prefect server started; try again")
        yield PrefectAPI(f"{origin}/api", password, log, begun)


def app() -> ASGIApp:
    """The server's application, as uvicorn makes it. Refuses a Host that is not 127.0.0.1.

    Around Prefect's application and no part of it: automations ask that one, in this process, under a Host of their own.

    A foreign page whose name an attacker's DNS has pointed at this machine has the same origin as the server, and its
    requests carry that name as Host.
    """
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    logging.getLogger("docket").addHandler(_Failures(logging.ERROR))
    return TrustedHostMiddleware(create_app(), allowed_hosts=["127.0.0.1"])


class _Failures(logging.Handler):
    """Prints a line for a background service that fails when one has failed before: a single failure may pass.

    Prefect goes on without them, and says so in its log alone. A database that is busy is no failure, however often:
    whether it keeps rounds from being planned is seen from the rounds.
    """

    last = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and BUSY in str(record.exc_info[1]):
            return
        before, self.last = self.last, record.created
        if record.exc_info and record.created - before < FAILED_AGAIN_SECONDS:
            error = record.exc_info[1]
            print(f"{FAILED}{record.getMessage()}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)


def password_file() -> Path:
    """The file with the password of this user's servers, which no other user can read. The first call writes it.

    Raises:
        UserError: others may read it.
    """
    from prefect.settings import get_current_settings

    path = get_current_settings().home / PASSWORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        disk.lock(file, fcntl.LOCK_EX, f"PREFECT_HOME {path.parent}")
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise UserError(f"{path}: other users may read this password; delete the file, and a new one is created")
        if not file.read():
            file.write(secrets.token_urlsafe(24))
    return path


def log_to_file(log: Path) -> None:
    """Send what Prefect prints to `log` instead of the screen."""
    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import PrefectConsoleHandler

    setup_logging()
    handler = logging.FileHandler(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = [n for n in logging.Logger.manager.loggerDict if n == "prefect" or n.startswith("prefect.")]
    for logger in (logging.getLogger(), *map(logging.getLogger, names)):
        for old in [h for h in logger.handlers if isinstance(h, PrefectConsoleHandler)]:
            logger.removeHandler(old)
            logger.addHandler(handler)

"""A Prefect API to run on: the one that is set, or one of our own that dies with this process.

Prefect's ephemeral server outlives a flow that is killed; ours runs under `iterdpo.run.supervise`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iterdpo.errors import ChildFailed
from iterdpo.run import supervise
from iterdpo.run.ports import answers, free_port

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

STARTUP_SECONDS = 120.0


@contextmanager
def prefect_api(log: Path) -> Iterator[str]:
    """The URL of a Prefect API, set for the code inside. What Prefect logs goes to `log`.

    Raises:
        ChildFailed: our own server did not come up.
    """
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    log_to_file(log)
    configured = get_current_settings().api.url
    if configured:
        yield configured
        return
    with start_server(log) as (url, _):
        # set for child processes too: a served flow runs in one
        previous = os.environ.get("PREFECT_API_URL")
        os.environ["PREFECT_API_URL"] = url
        try:
            with temporary_settings({PREFECT_API_URL: url}):
                try:
                    yield url
                finally:
                    _deliver()
        finally:
            if previous is None:
                del os.environ["PREFECT_API_URL"]


@contextmanager
def start_server(log: Path, *, port: int | None = None) -> Iterator[tuple[str, supervise.Child]]:
    """A Prefect server, page included, on localhost, with its database in PREFECT_HOME."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    env = {**os.environ, "PREFECT_API_URL": url, "PREFECT_UI_API_URL": url}
    with supervise.start(command, log=log, env=env) as server:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ChildFailed(
                    f"the Prefect server did not start; run without it (--no-prefect), or see {log}\n{server.log_tail()}"
                )
            time.sleep(0.1)
        yield url, server


def log_to_file(log: Path) -> None:
    """Send what Prefect prints to `log` instead of the screen."""
    import logging

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


def _deliver() -> None:
    """Send what Prefect still holds back, while the server lives: after it, each line would wait and fail aloud."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=10)

"""Rounds of `benchmarks.chaos` that `iterdpo serve` runs, each by a trigger, under a Prefect server that is not stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from iterdpo.run import supervise
from iterdpo.run.devices import answers, free_port

UNDER_WAY = ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]
NAME = "chaos"


class Service:
    """`iterdpo serve`, started again whenever it has been stopped."""

    def __init__(self, root: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
        self.server = supervise.start(
            command, log=root / "server.log", env={**os.environ, "PREFECT_HOME": str(root / "prefect-server")}
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0  # of the round under way
        deadline = time.monotonic() + 120
        while not answers(f"{self.url}/health"):
            assert self.server.poll() is None, f"see {root / 'server.log'}"
            assert time.monotonic() < deadline, "the Prefect server does not answer"
            time.sleep(0.2)

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read() or "null")

    def start(self, serve: list[str], log: Path, environment: dict[str, str]) -> None:
        """Serve by the command `serve`, if nothing does, and trigger a round, if none is under way."""
        if self.process is None or self.process.poll() is not None:
            begun = log.stat().st_size if log.exists() else 0
            with open(log, "ab") as output:
                options = ["--name", NAME, "--add", "1"]
                environment = {**environment, "PREFECT_API_URL": self.url}
                self.process = subprocess.Popen(
                    [*serve, *options], env=environment, stdout=output, stderr=output, start_new_session=True
                )
            while b"page:" not in log.read_bytes()[begun:]:
                assert self.process.poll() is None, f"see {log}"
                time.sleep(0.2)
        if not self.under_way():
            deployment = self.call(f"deployments/name/add_rounds/{NAME}")["id"]
            self.call(f"deployments/{deployment}/create_flow_run", {})
        deadline = time.monotonic() + 120
        while not self.found():
            assert time.monotonic() < deadline, f"the trigger starts nothing; see {log}"
            time.sleep(0.1)

    def under_way(self) -> list[str]:
        """Ids of the triggered runs that have not ended."""
        wanted = {"deployments": {"name": {"any_": [NAME]}}, "flow_runs": {"state": {"type": {"any_": UNDER_WAY}}}}
        runs = self.call("flow_runs/filter", wanted)
        return [run["id"] for run in runs]

    def found(self) -> bool:
        """Whether a round's process is there; of several, those that wait for their turn have no children."""
        assert self.process is not None
        rounds = [pid for pid in supervise._descendants(self.process.pid) if "spawn_main" in command(pid)]
        self.pid = next(filter(supervise._descendants, rounds), next(iter(rounds), 0))
        return self.pid != 0

    def poll(self) -> int | None:
        """None while a round is under way; otherwise 0."""
        gone = self.process is None or self.process.poll() is not None
        return None if command(self.pid) or (not gone and (self.found() or self.under_way())) else 0

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.2)
        return 0

    def cancel(self) -> None:
        """As the page's button does."""
        for run in self.under_way():
            self.call(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def kill(self) -> None:
        """End the round under way; the service stays."""
        with suppress(OSError):
            if self.pid:  # 0 would be this process, and all of its group
                os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the service."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def end(self) -> None:
        self.stop()
        self.server.kill()


def command(pid: int) -> str:
    """Its command line; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""

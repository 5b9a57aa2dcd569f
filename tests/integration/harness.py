"""A small run with all the real parts: a random tiny model, a vLLM engine, accelerate, and a user's judge in a file."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from iterdpo.run import supervise
from iterdpo.run.devices import answers, free_port
from iterdpo.run.rundir import read_jsonl
from iterdpo.training.launch import TRAIN_LOG, TrainSpec

JUDGE = '''
"""A user's judge, in a file outside the project."""


def vowels(prompt, completion, topic):
    assert topic in ("sea", "sky")
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))


def length(prompt, completion):
    return float(len(completion))
'''


FAKE = """
import hashlib, sys
from importlib.machinery import PathFinder


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "iterdpo.stages.runs":
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            from iterdpo.testing import FakeSampler

            run(module)
            own = {"__init__": lambda self, **_: FakeSampler.__init__(self, words), "warm_up": lambda self: None}
            module.VLLMSampler = type("VLLMSampler", (FakeSampler,), own)

        spec.loader.exec_module = exec_module
        return spec


def words(ids, k):
    return hashlib.sha256(repr((ids, k)).encode()).hexdigest()[: 4 + k]


sys.meta_path.insert(0, Finder)
"""
"""A `sitecustomize` for the processes of a run, whose sampler is a fake then."""


class Workspace:
    """A directory with prompts, a judge and a configuration, and the command line run in it."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.variables: dict[str, str] = {}  # more of the commands' environment
        self.mark = f"iterdpo-test-{uuid.uuid4().hex}"
        root.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"Tale {i}, of the", "topic": ("sea", "sky")[i % 2]} for i in range(80)]
        (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "judge.py").write_text(JUDGE)
        self.config: dict[str, Any] = {
            "run_dir": str(root / "run"),
            "rounds": 1,
            "model": {"path": str(model)},
            "prompts": {"path": str(root / "prompts.jsonl"), "per_round": 16, "heldout": 8},
            "sampling": {"n": 3, "max_tokens": 12, "shard_size": 4},
            "judge": {"use": f"{root / 'judge.py'}:vowels"},
            "evaluation": {"judge": {"use": f"{root / 'judge.py'}:length"}},
            "dpo": {"learning_rate": 1e-3, "pairs_per_step": 2, "checkpoint_every": 2, "precision": "fp32"},
            "gate": {"minimum": 0.0},
        }

    @property
    def run_dir(self) -> Path:
        return Path(self.config["run_dir"])

    def without_engine(self) -> None:
        """Let the runs of this workspace sample from a fake."""
        site = self.root / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(FAKE)
        self.variables["PYTHONPATH"] = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
        self.config["evaluation"]["max_logp_gap"] = 1e3  # the fake's log-probabilities are no model's

    def write(self, **changes: Any) -> Path:
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump({**self.config, **changes}))
        return path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *arguments]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "ITERDPO_TEST_MARK": self.mark,
            "HF_HUB_OFFLINE": "1",
            "PREFECT_HOME": str(self.root / "prefect"),
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            **self.variables,
        }

    def iterdpo(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, timeout=timeout
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = open(self.root / "output.log", "ab")  # noqa: SIM115  # the process keeps it
        return subprocess.Popen(self.command(*arguments), env=self.environment(), stdout=log, stderr=log)

    def survivors(self) -> list[int]:
        """Processes that descend from a command of this workspace, by a mark in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes() and (path.parent / "cmdline").read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def processes(self, words: bytes) -> list[int]:
        """Those of `survivors` that have these words in their command."""
        found = []
        for pid in self.survivors():
            with suppress(OSError):  # it has just ended
                if words in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def serve_process(self) -> int:
        """The process of this workspace's `iterdpo serve`."""
        [found] = self.processes(b"\0serve\0")
        return found


def train_here(patch: pytest.MonkeyPatch) -> None:
    """Train rounds in this process. One of their own takes ten seconds to start; test_crash.py has them, and others."""

    def launch(spec: TrainSpec, *, on_step: Callable[[dict[str, Any]], None], **_: Any) -> None:
        from iterdpo.training.train import train

        train(spec)
        for row in read_jsonl(spec.output / TRAIN_LOG):
            on_step(row)
        for left in spec.output.glob("checkpoint-*"):
            shutil.rmtree(left)

    patch.setattr("iterdpo.stages.train.launch_training", launch)
    patch.setattr("iterdpo.stages.runs.warm_up", lambda *_, **__: None)


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """What a Prefect API answers, as a client with the password in PREFECT_API_AUTH_STRING gets it."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if "PREFECT_API_AUTH_STRING" in os.environ:
        headers["Authorization"] = f"Basic {base64.b64encode(os.environ['PREFECT_API_AUTH_STRING'].encode()).decode()}"
    request = urllib.request.Request(url, data=data, headers=headers)
    for attempt in range(30):
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempt == 29:  # its SQLite database is busy: Prefect's own client tries again too
                raise
            time.sleep(1)
    raise AssertionError("unreachable")


@contextmanager
def users_server(workspace: Workspace, **settings: str) -> Iterator[str]:
    """The URL of the API of a Prefect server as `prefect server start` has it: without a password."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    environment = {**os.environ, "PREFECT_HOME": str(workspace.root / "prefect"), **settings}
    environment.setdefault("PREFECT_UI_API_URL", f"http://127.0.0.1:{port}/api")
    with supervise.start(command, log=workspace.root / "server.log", env=environment) as server:
        url = f"http://127.0.0.1:{port}/api"
        wait_for(lambda: server.poll() is not None or answers(f"{url}/health"), seconds=120, what="a Prefect server")
        yield url


def process_of(url: str) -> int:
    """The process of a Prefect server: of the user's, or of our own."""
    port = url.rpartition(":")[2].partition("/")[0].encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if b"\0--port\0" + port in command and b"supervise" not in command:
            return int(process.name)
    raise AssertionError(f"no server at {url}")


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a webhook on this machine, and the JSON that is posted to it."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/alarm?key=1", told
        listening.shutdown()

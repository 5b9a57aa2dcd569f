"""The Prefect server of a run is stopped or killed before, in and after its work: the run ends as without one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows import run_rounds
from iterdpo.config import load_config
from iterdpo.testing import FakeSampler
from tests.integration.harness import Workspace, train_here, users_server

pytestmark = pytest.mark.slow

RUNS = '''
"""`argv[3:]` are run directories, each with a line: the run signals its server when it says that line."""

import os, signal, sys

from flows import lost, run_rounds
from iterdpo.config import load_config
from iterdpo.run.progress import Progress
from tests.integration.harness import process_of
from tests.integration.test_lost_server import sampler

number = int(sys.argv[2])


class Signals(Progress):
    def say(self, text):
        super().say(text)
        if text.strip().startswith(self.moment):
            self.server = process_of(os.environ["PREFECT_API_URL"])
            os.kill(self.server, number)


progress = Signals(sys.stdout)
for run_dir, progress.moment in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
    if "server" in vars(progress):
        os.kill(progress.server, signal.SIGCONT)
        lost._paused_until = 0
    run_rounds(load_config(sys.argv[1], overrides=[f"run_dir={run_dir}"]), sampler=sampler(), progress=progress)
'''

LOST = "its server no longer answers; the run goes on without it"


def sampler() -> FakeSampler:
    return FakeSampler(lambda ids, k: "abcdefghij"[: 3 + (k * 2 + ids[-1]) % 7])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workspace:
    """A run of which the evaluation of the initial policy and the decisions are missing."""
    workspace = Workspace(tmp_path_factory.mktemp("begun"), tiny_model)
    workspace.config["evaluation"]["max_logp_gap"] = 1e3  # the fake's log-probabilities are no model's
    workspace.variables = {
        "PREFECT_API_REQUEST_TIMEOUT": "2",
        "PREFECT_CLIENT_MAX_RETRIES": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch)
        run_rounds(load_config(workspace.write()), sampler=sampler(), prefect=False)
    shutil.rmtree(workspace.run_dir / "round-000")
    (workspace.run_dir / "round-001" / "round.json").unlink()
    return workspace


def go_on(begun: Workspace, root: Path, number: signal.Signals, *moments: str) -> str:
    """What copies of the run print, one after the other, if the server gets the signal at these moments."""
    arguments = []
    for name, moment in enumerate(moments):
        shutil.copytree(begun.run_dir, root / str(name), symlinks=True)
        arguments += [str(root / str(name)), moment]
    script = root / "runs.py"
    script.write_text(RUNS)
    command = [sys.executable, str(script), str(begun.root / "config.yaml"), str(int(number)), *arguments]
    done = subprocess.run(command, env=begun.environment(), capture_output=True, text=True, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for name, _ in enumerate(moments):
        assert (root / str(name) / "round-001" / "round.json").exists(), said
        assert (root / str(name) / "report.html").exists(), said
    assert said.count(LOST) == len(moments), said
    assert "rror" not in said, said
    return said


def test_a_server_that_hangs_at_any_time_costs_a_run_neither_rounds_nor_its_exit_status(
    begun: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with users_server(begun) as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        go_on(begun, tmp_path, signal.SIGSTOP, "Prefect:", "evaluate", "round 1:")


def test_a_server_of_our_own_that_is_killed_does_not_either(begun: Workspace, tmp_path: Path) -> None:
    go_on(begun, tmp_path, signal.SIGKILL, "evaluate")
    assert not begun.survivors()

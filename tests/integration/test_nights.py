"""Nights on a real Prefect server that stays: a stop, a missed trigger, alarms."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import Workspace, call, users_server, wait_for, webhook
from tests.integration.test_serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[str, Path]]:
    """The URL of the API of a server that stays when `serve` ends, and its database."""
    workspace = Workspace(tmp_path_factory.mktemp("server"), tiny_model)
    with users_server(workspace) as url:
        yield url, workspace.root / "prefect" / "prefect.db"


def test_a_stop_in_a_round_leaves_nothing_and_the_next_start_adds_one_round(
    server: tuple[str, Path], workspace: Workspace
) -> None:
    url, database = server
    workspace.without_engine()
    workspace.config["prompts"] |= {"per_round": 4, "heldout": 2}
    workspace.variables["PREFECT_API_URL"] = url
    output = workspace.root / "output.log"
    with serving(workspace, "--cron", "0 2 * * *"):
        found = call(f"{url}/deployments/name/add_rounds/nightly")
        call(f"{url}/deployments/{found['id']}/create_flow_run", {})
        wait_for(lambda: bool(workspace.processes(b"iterdpo.training.train")), seconds=200, what="the trainer")
        assert not workspace.processes(b"iterdpo.sampling.worker")  # the sampler is a fake
        os.kill(workspace.serve_process(), signal.SIGTERM)
        wait_for(lambda: not workspace.survivors(), seconds=5, what="the end of the round")
    assert "stopped: the schedule is paused" in output.read_text()
    ours = {"flow_runs": {"deployment_id": {"any_": [found["id"]]}}}
    [stopped] = call(f"{url}/flow_runs/filter", ours)
    assert (stopped["name"], stopped["state_name"]) == ("run", "Stopped")
    rounds = {"flow_runs": {"parent_flow_run_id": {"any_": [stopped["id"]]}}}
    assert sorted(run["state_name"] for run in call(f"{url}/flow_runs/filter", rounds)) == ["Completed", "Stopped"]
    assert call(f"{url}/deployments/{found['id']}")["paused"]

    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:  # eleven days go by
        connection.execute("UPDATE deployment_schedule SET created = datetime(created, '-11 days')")
        times = ", ".join(f"{name} = datetime({name}, '-11 days')" for name in ("start_time", "expected_start_time"))
        connection.execute(f"UPDATE flow_run SET {times}")
    with serving(workspace, "--cron", "0 2 * * *"):
        wait_for(lambda: (workspace.run_dir / "round-001" / "round.json").exists(), seconds=300, what="a round")
        assert "missed:  12 triggers" in output.read_text()  # eleven of the clock, and the one that was stopped
        wait_for(
            lambda: (
                {run["state_name"] for run in call(f"{url}/flow_runs/filter", ours)}
                == {"Cancelled", "Completed", "Scheduled"}
            ),
            seconds=60,
            what="the end of the run",
        )
        states = [run["state_name"] for run in call(f"{url}/flow_runs/filter", ours)]
    assert (states.count("Completed"), states.count("Cancelled")) == (1, 1)
    assert not (workspace.run_dir / "round-002").exists()
    assert not re.search("Traceback|never awaited|Warning", output.read_text())


def test_a_hung_a_crashed_and_a_failed_round_reach_a_webhook(server: tuple[str, Path], workspace: Workspace) -> None:
    url, _ = server
    workspace.variables["PREFECT_API_URL"] = url
    judge = workspace.root / "judge.py"
    with webhook() as (target, told), serving(workspace, "--notify", target, "--hung-after", "0.003"):
        create = f"{url}/deployments/{call(f'{url}/deployments/name/add_rounds/nightly')['id']}/create_flow_run"
        call(create, {})
        wait_for(lambda: bool(told), seconds=200, what="the alarm of a round that takes more than 11 seconds")
        late = {
            "alarm": "hung round",
            "run": "run",
            "round": 0,
            "reason": "it has not ended 0.003 hours after it began",
        }
        assert told.pop() == late
        served = workspace.serve_process()
        for pid in workspace.survivors():
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == served and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: bool(told), seconds=100, what="the alarm of a round whose process was killed")
        crashed = told.pop()
        assert (crashed["alarm"], crashed["run"], crashed["round"]) == ("failed round", "run", 0)
        judge.unlink()
        call(create, {})
        failed = ("failed round", "run", 0)
        wait_for(
            lambda: any((m["alarm"], m["run"], m["round"]) == failed and str(judge) in m["reason"] for m in told),
            seconds=100,
            what="the alarm of a round that fails",
        )
    assert {m["alarm"] for m in told} == {"failed round"}
    status = workspace.iterdpo("status", str(workspace.run_dir)).stdout
    assert re.search(rf"last failure: \d{{4}}-\S+, round 0: .*{re.escape(str(judge))}", status)

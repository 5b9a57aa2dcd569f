"""A work pool on a real Prefect server: a worker's rounds continue one lineage, and the server refuses bad parameters."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from iterdpo.run import supervise
from iterdpo.run.artifacts import read_groups
from iterdpo.run.rundir import RunDir
from tests.integration.harness import Workspace, call, users_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POSTGRES = "ITERDPO_TEST_POSTGRES"
"""The variable with the URL of an empty PostgreSQL database, postgresql+asyncpg://..., for the server."""


class Deployed(NamedTuple):
    workspace: Workspace
    url: str
    create: str


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def deployed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Deployed]:
    """A deployment to a new pool, and a worker of it."""
    database: dict[str, str] = {}
    if request.param == "postgresql":
        if POSTGRES not in os.environ:
            pytest.skip(f"{POSTGRES} names no PostgreSQL database")
        database["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = os.environ[POSTGRES]
    workspace = Workspace(tmp_path_factory.mktemp("pool"), tiny_model)
    workspace.without_engine()
    workspace.config["prompts"] |= {"per_round": 4, "heldout": 2}
    with users_server(workspace, **database) as url:
        workspace.variables |= {"PREFECT_API_URL": url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
        result = workspace.iterdpo("deploy", str(workspace.write()), "--pool", "gpus", "--name", "nightly")
        assert result.returncode == 0, result.stderr
        with worker(workspace):
            found = call(f"{url}/deployments/name/add_rounds/nightly")
            create = f"{url}/deployments/{found['id']}/create_flow_run"
            yield Deployed(workspace, url, create)


@contextmanager
def worker(workspace: Workspace) -> Iterator[supervise.Child]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpus"]
    with supervise.start(command, log=workspace.root / "worker.log", env=workspace.environment()) as child:
        yield child


def ended(url: str, run: str) -> str:
    deadline, state = time.monotonic() + 200, ""
    while state not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and time.monotonic() < deadline:
        time.sleep(0.3)
        state = call(f"{url}/flow_runs/{run}")["state_type"]
    return state


@pytest.mark.extended
def test_three_triggers_add_a_round_each_the_third_from_the_seconds_policy(deployed: Deployed) -> None:
    workspace, url, create = deployed
    for _ in range(3):
        assert ended(url, call(create, {})["id"]) == "COMPLETED", (workspace.root / "worker.log").read_text()
    run_dir = workspace.run_dir
    records = [json.loads((run_dir / f"round-00{t}" / "round.json").read_text()) for t in (1, 2, 3)]
    inputs = [
        json.loads((run_dir / f"round-00{t}" / step / "MANIFEST.json").read_text())["inputs"]["policy"]
        for t in (2, 3)
        for step in ("completions", "policy")
    ]
    digests = [record["policy_digest"] for record in records]
    assert inputs == [digests[0], digests[0], digests[1], digests[1]]
    assert len(set(digests)) == 3
    prompts = [{group.prompt.id for group in read_groups(run_dir / f"round-00{t}" / "completions")} for t in (1, 2, 3)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 12
    assert not (run_dir / "round-004").exists()


def test_a_trigger_that_finds_a_run_at_work_is_dropped_if_it_was_deployed_so(deployed: Deployed) -> None:
    workspace, url, _ = deployed
    options = ("--pool", "gpus", "--name", "dropping", "--if-busy", "drop")
    assert workspace.iterdpo("deploy", str(workspace.root / "config.yaml"), *options).returncode == 0
    create = f"{url}/deployments/{call(f'{url}/deployments/name/add_rounds/dropping')['id']}/create_flow_run"
    with RunDir(workspace.run_dir).lock():
        run = call(create, {})["id"]
        assert ended(url, run) == "CANCELLED"
    assert "in use by process" in call(f"{url}/flow_runs/{run}")["state"]["message"]
    assert workspace.iterdpo("deploy", str(workspace.root / "config.yaml"), *options, "--remove").returncode == 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        call(f"{url}/deployments/name/add_rounds/dropping")


@pytest.mark.parametrize("variables", [{"command": "true"}, {"env": {"PYTHONPATH": "/tmp"}}])
def test_a_trigger_sets_no_command_and_no_environment(deployed: Deployed, variables: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(deployed.create, {"job_variables": variables})
    assert refused.value.code == 422


@pytest.mark.parametrize(
    "parameters",
    [
        {"configuration": "/etc/passwd"},
        {"configuration": "../config.yaml"},
        {"configuration": "config.yaml", "rounds": 0},
        {"configuration": "config.yaml", "rounds": "many"},
        {"configuration": "config.yaml", "overrides": {"use": "judge.py:vowels"}},
        {"configuration": "config.yaml", "overrides": {"max_abstained": 1.5}},
        {"configuration": "config.yaml", "judge": "theirs.py:judge"},
    ],
)
def test_the_server_refuses_a_bad_value_before_anything_starts(deployed: Deployed, parameters: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(deployed.create, {"parameters": parameters})
    assert refused.value.code == 409


def test_the_form_of_prefects_page_refuses_a_bad_value_before_anything_starts(deployed: Deployed, browser: Any) -> None:
    _, url, create = deployed
    deployment = create.split("/")[-2]
    of_it = {"deployments": {"id": {"any_": [deployment]}}}
    before = call(f"{url}/flow_runs/count", of_it)
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.goto(f"{url.removesuffix('/api')}/deployments/deployment/{deployment}/run")
    configuration, rounds = page.locator("textarea").first, page.locator("input[type=number]").first
    rounds.wait_for(timeout=60_000)
    assert (configuration.input_value(), rounds.input_value()) == ("config.yaml", "1")
    for fields, reason in (
        ({rounds: "0"}, "field 'rounds'. Failure reason: 0 is less than the minimum of 1"),
        (
            {rounds: "1", configuration: "../other.yaml"},
            "field 'configuration'. Failure reason: '../other.yaml' does not",
        ),
    ):
        for field, value in fields.items():
            field.fill(value)
        page.get_by_role("button", name="Submit").click()
        page.get_by_text(reason).first.wait_for(timeout=20_000)
    page.close()
    assert call(f"{url}/flow_runs/count", of_it) == before

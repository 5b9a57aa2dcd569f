"""A served deployment on a real Prefect server: a cron and triggers add rounds to one lineage, and its page shows them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows import alarms
from flows.server import prefect_api, start_server
from iterdpo.run.artifacts import read_groups
from iterdpo.testing import build_tiny_checkpoint
from tests.integration.harness import Workspace, call, users_server, wait_for, webhook

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # several engines start, one after the other


@contextmanager
def serving(workspace: Workspace, *options: str) -> Iterator[str]:
    """`iterdpo serve` in a process of its own, and the URL of its Prefect page."""
    log = workspace.root / "output.log"
    process = workspace.start("serve", str(workspace.write()), "--name", "nightly", *options)
    try:
        wait_for(lambda: process.poll() is not None or "page:" in log.read_text(), seconds=120, what="the deployment")
        assert process.poll() is None, log.read_text()
        page = re.search(r"page:\s+(\S+)", log.read_text())
        assert page
        with pytest.MonkeyPatch.context() as patch:
            password = workspace.root / "prefect" / "iterdpo-password"
            if password.exists():
                patch.setenv("PREFECT_API_AUTH_STRING", password.read_text())
            yield page[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)  # Prefect gives a round that is under way 30 s
        except subprocess.TimeoutExpired:
            process.kill()
    wait_for(lambda: not workspace.survivors(), seconds=10, what="the end of what was served")


class Served(NamedTuple):
    workspace: Workspace
    page: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """A deployment that is served with a cron of a minute, which has added a round."""
    workspace = Workspace(tmp_path_factory.mktemp("served"), tiny_model)
    workspace.config["prompts"] |= {"per_round": 8, "heldout": 4}
    workspace.config["gate"] |= {"rules": [{"metric": "length/truncated", "maximum": 1}]}
    with serving(workspace, "--cron", "* * * * *") as page:
        wait_for(lambda: (workspace.run_dir / "round-001" / "round.json").exists(), seconds=900, what="a round")
        wait_for_completion(workspace, page, [first_run(page)["id"]])
        yield Served(workspace, page)


def first_run(page: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = call(f"{page}/api/flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    return found[0]


def wait_for_completion(workspace: Workspace, page: str, runs: list[str]) -> None:
    deadline = time.monotonic() + 900
    states: dict[str, str] = {}
    while time.monotonic() < deadline and set(states.values()) != {"COMPLETED"}:
        time.sleep(1)
        states = {run: call(f"{page}/api/flow_runs/{run}")["state_type"] for run in runs}
        assert not {"FAILED", "CRASHED"} & set(states.values()), (workspace.root / "output.log").read_text()[-3000:]
    assert set(states.values()) == {"COMPLETED"}


def test_a_cron_of_a_minute_adds_a_round_by_itself(served: Served) -> None:
    assert first_run(served.page)["auto_scheduled"] is True
    assert "WARNING" not in (served.workspace.root / "output.log").read_text()


def test_the_page_of_prefect_shows_rounds_table_and_plots(served: Served, tmp_path: Path) -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no Chromium or Chrome found")
    from playwright.sync_api import sync_playwright

    page_url = served.page
    artifacts = call(f"{page_url}/api/artifacts/latest/filter", {})
    keys = {artifact["key"]: artifact for artifact in artifacts}
    table = json.loads(keys["run-rounds"]["data"])
    assert [row["round"] for row in table][:2] == [0, 1]
    assert table[1]["gate/reason"].endswith(", and the other rule holds")
    rules = json.loads(keys["run-rules"]["data"])
    assert [(row["round"], row["rule"].split()[0], row["broken"]) for row in rules][:2] == [
        (1, metric, "") for metric in ("win_rate/vs_previous", "length/truncated")
    ]
    assert {"run-scores", "run-win-rate", "run-pairs", "run-time"} <= keys.keys()

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{page_url}/runs")
        page.locator("input[type=password]").fill(os.environ["PREFECT_API_AUTH_STRING"], timeout=60_000)
        page.keyboard.press("Enter")
        page.get_by_text("run round 1").first.wait_for(timeout=60_000)
        page.goto(f"{page_url}/artifacts/artifact/{keys['run-scores']['latest_id']}")
        picture = page.locator("img[src^='data:image/png']").first
        picture.wait_for(timeout=60_000)
        assert picture.evaluate("image => image.naturalWidth") > 300
        page.screenshot(path=tmp_path / "plot.png")
        page.goto(f"{page_url}/artifacts/artifact/{keys['run-rounds']['latest_id']}")
        page.get_by_text("score/train_judge").first.wait_for(timeout=60_000)
        page.screenshot(path=tmp_path / "table.png")
        browser.close()


def test_a_round_under_way_ends_with_the_process_that_serves_it(served: Served) -> None:
    """The last test of `served`: the round is that of one of the next minutes."""
    workspace = served.workspace
    wait_for(lambda: bool(workspace.processes(b"iterdpo.sampling.worker")), seconds=200, what="the engine")
    os.kill(workspace.serve_process(), signal.SIGKILL)
    wait_for(lambda: not workspace.survivors(), seconds=20, what="the end of the round")


@pytest.mark.extended
def test_two_triggers_at_once_add_a_round_each_the_second_from_the_firsts_policy(workspace: Workspace) -> None:
    workspace.config["prompts"] |= {"per_round": 8, "heldout": 4}
    with serving(workspace, "--cron", "0 2 * * *") as page:
        found = call(f"{page}/api/deployments/name/add_rounds/nightly")
        assert found["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
        runs = [call(f"{page}/api/deployments/{found['id']}/create_flow_run", {})["id"] for _ in range(2)]
        wait_for_completion(workspace, page, runs)
    first = json.loads((workspace.run_dir / "round-001" / "round.json").read_text())
    second = json.loads((workspace.run_dir / "round-002" / "completions" / "MANIFEST.json").read_text())
    assert second["inputs"]["policy"] == first["policy_digest"]
    assert not (workspace.run_dir / "round-003").exists()
    prompts = [
        {group.prompt.id for group in read_groups(workspace.run_dir / f"round-00{t}" / "completions")} for t in (1, 2)
    ]
    assert not prompts[0] & prompts[1]


def test_a_server_whose_scheduler_fails_is_an_error_at_once(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(workspace.root / "prefect"))
    with start_server(workspace.root / "first.log"):
        pass  # it has made its database
    with sqlite3.connect(workspace.root / "prefect" / "prefect.db") as database:
        database.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON flow_run WHEN NEW.auto_scheduled "
            "BEGIN SELECT RAISE(ABORT, 'no run can be planned'); END"
        )
    workspace.variables["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "5"
    result = workspace.iterdpo("serve", str(workspace.write()), "--cron", "* * * * *")
    assert result.returncode == 1
    assert "the scheduler of Prefect's server fails" in result.stderr
    assert "no run can be planned" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_cron_string_that_is_none_is_refused_at_once(workspace: Workspace) -> None:
    result = workspace.iterdpo("serve", str(workspace.write()), "--cron", "every night")
    assert result.returncode == 2
    assert "not a cron string" in result.stderr


def test_a_server_of_our_own_answers_to_its_password_origin_and_host_alone_and_sends_alarms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with prefect_api(tmp_path / "server.log") as api:
        assert api.password is not None
        secret = f"Basic {base64.b64encode(api.password.read_bytes()).decode()}"
        host = api.url.split("/")[2]

        def asked(path: str, **headers: str) -> tuple[int, str | None]:
            request = urllib.request.Request(f"{api.url}{path}", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=20) as reply:
                    return reply.status, reply.headers["Access-Control-Allow-Origin"]
            except urllib.error.HTTPError as error:
                return error.code, error.headers["Access-Control-Allow-Origin"]

        assert asked("/version") == (401, None)
        assert asked("/version", Authorization="Basic d3Jvbmc6cGFzc3dvcmQ=") == (401, None)
        own = asked("/version", Authorization=secret, Origin=f"http://{host}")
        assert own == (200, f"http://{host}")
        assert asked("/version", Authorization=secret, Origin="http://elsewhere.example") == (200, None)
        assert asked("/version", Authorization=secret, Host="elsewhere.example") == (400, None)
        assert asked("/health", Host="elsewhere.example") == (400, None)
        with pytest.raises(urllib.error.HTTPError) as preflight:
            urllib.request.urlopen(
                urllib.request.Request(
                    f"{api.url}/flows/count",
                    method="OPTIONS",
                    headers={"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"},
                )
            )
        assert preflight.value.code == 400
        deployment = uuid.uuid4()
        with webhook() as (target, told):
            alarms.create(deployment, "nightly", [target], hung_after=24)
            alarms.Alarms(deployment, "run").tell(alarms.FAILED, 3, alarm="failed round", reason="why")
            wait_for(lambda: bool(told), seconds=60, what="the alarm")
        assert told == [{"alarm": "failed round", "run": "run", "round": 3, "reason": "why"}]


def test_a_deployment_on_the_users_server_runs_no_configuration_and_no_code_of_a_caller(workspace: Workspace) -> None:
    theirs, ran = workspace.root / "theirs", workspace.root / "RAN"
    build_tiny_checkpoint(theirs)
    settings = json.loads((theirs / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}, "tokenizer_class": "Theirs"}
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    (theirs / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Theirs\n"
    )
    config = {**workspace.config, "run_dir": str(workspace.root / "other")}
    config["model"] = {"path": str(theirs), "trust_remote_code": True}
    refused = [
        {"config": config, "rounds": 1},
        {"config": config, "rounds": 1, "overrides": {}},
        {"overrides": {"model.path": str(theirs), "model.trust_remote_code": True}},
        {"overrides": {"judge.use": 1}},
        {"overrides": {"prompts.per_round": f"8\nmodel: {{path: {theirs}}}"}},
    ]
    with users_server(workspace) as url:
        workspace.variables["PREFECT_API_URL"] = url
        with serving(workspace) as page:
            assert url == f"{page}/api"
            create = f"{url}/deployments/{call(f'{url}/deployments/name/add_rounds/nightly')['id']}/create_flow_run"
            runs = []
            for parameters in refused:
                with contextlib.suppress(urllib.error.HTTPError):  # the parameters do not fit the deployment
                    runs.append(call(create, {"parameters": parameters})["id"])
            assert runs
            ended = ("COMPLETED", "FAILED", "CRASHED")
            states = dict.fromkeys(runs, "")
            deadline = time.monotonic() + 200
            while not set(states.values()) <= set(ended) and time.monotonic() < deadline:
                time.sleep(1)
                states = {run: call(f"{url}/flow_runs/{run}")["state_type"] for run in runs}
    assert set(states.values()) <= {"FAILED", "CRASHED"}
    assert not ran.exists()
    assert not (workspace.root / "other").exists()
    assert not list(workspace.run_dir.glob("round-*"))

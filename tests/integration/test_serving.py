"""A served deployment on a real Prefect server: triggers add rounds to one lineage, and its page shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iterdpo.run.artifacts import read_groups
from tests.integration.harness import Workspace, wait_for

pytestmark = pytest.mark.slow


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    for attempt in range(30):
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempt == 29:  # its SQLite database is busy: Prefect's own client tries again too
                raise
            time.sleep(1)
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[Workspace, str]]:
    """A workspace whose deployment is served, and the URL of its Prefect page."""
    workspace = Workspace(tmp_path_factory.mktemp("served"), tiny_model)
    log = workspace.root / "output.log"
    process = workspace.start("serve", str(workspace.write()), "--name", "nightly", "--cron", "0 2 * * *")
    try:
        wait_for(lambda: process.poll() is not None or "page:" in log.read_text(), seconds=120, what="the deployment")
        assert process.poll() is None, log.read_text()
        page = re.search(r"page:\s+(\S+)", log.read_text())
        assert page
        yield workspace, page[1]
    finally:
        os.kill(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    wait_for(lambda: not workspace.survivors(), seconds=10, what="the end of what was served")


def test_two_triggers_at_once_add_a_round_each_the_second_from_the_firsts_policy(served: tuple[Workspace, str]) -> None:
    workspace, page = served
    wait_for(lambda: deployment(page) is not None, seconds=60, what="the deployment")
    found = deployment(page)
    assert found is not None
    assert found["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    runs = [call(f"{page}/api/deployments/{found['id']}/create_flow_run", {})["id"] for _ in range(2)]
    deadline = time.monotonic() + 400
    states: dict[str, str] = {}
    while time.monotonic() < deadline and set(states.values()) != {"COMPLETED"}:
        time.sleep(1)
        states = {run: call(f"{page}/api/flow_runs/{run}")["state_type"] for run in runs}
        assert not {"FAILED", "CRASHED"} & set(states.values()), (workspace.root / "output.log").read_text()[-3000:]
    assert set(states.values()) == {"COMPLETED"}

    first = json.loads((workspace.run_dir / "round-001" / "round.json").read_text())
    second = json.loads((workspace.run_dir / "round-002" / "completions" / "MANIFEST.json").read_text())
    assert second["inputs"]["policy"] == first["policy_digest"]
    assert not (workspace.run_dir / "round-003").exists()
    prompts = [
        {group.prompt.id for group in read_groups(workspace.run_dir / f"round-00{t}" / "completions")} for t in (1, 2)
    ]
    assert not prompts[0] & prompts[1]


def test_the_page_of_prefect_shows_rounds_table_and_plots(served: tuple[Workspace, str], tmp_path: Path) -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no Chromium or Chrome found")
    from playwright.sync_api import sync_playwright

    workspace, page_url = served
    if not (workspace.run_dir / "round-002" / "round.json").exists():
        pytest.skip("needs the rounds of the test before")
    artifacts = call(f"{page_url}/api/artifacts/latest/filter", {})
    keys = {artifact["key"]: artifact for artifact in artifacts}
    table = json.loads(keys["run-rounds"]["data"])
    assert [row["round"] for row in table] == [0, 1, 2]
    assert {"run-scores", "run-win-rate", "run-pairs", "run-time"} <= keys.keys()

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{page_url}/runs")
        page.get_by_text("run round 2").first.wait_for(timeout=60_000)
        page.goto(f"{page_url}/artifacts/artifact/{keys['run-scores']['latest_id']}")
        picture = page.locator("img[src^='data:image/png']").first
        picture.wait_for(timeout=60_000)
        assert picture.evaluate("image => image.naturalWidth") > 300
        page.screenshot(path=tmp_path / "plot.png")
        page.goto(f"{page_url}/artifacts/artifact/{keys['run-rounds']['latest_id']}")
        page.get_by_text("score/train_judge").first.wait_for(timeout=60_000)
        page.screenshot(path=tmp_path / "table.png")
        browser.close()


def deployment(page: str) -> dict[str, Any] | None:
    try:
        return call(f"{page}/api/deployments/name/add_rounds/nightly")
    except urllib.error.HTTPError:
        return None


def test_a_cron_string_that_is_none_is_refused_at_once(workspace: Workspace) -> None:
    result = workspace.iterdpo("serve", str(workspace.write()), "--cron", "every night")
    assert result.returncode == 2
    assert "not a cron string" in result.stderr

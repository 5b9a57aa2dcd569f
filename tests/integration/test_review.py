"""A person judges in a real headless browser, while a run on a real Prefect server waits for the verdicts, paused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from iterdpo.run.artifacts import read_groups, read_judgments
from iterdpo.run.rundir import read_json
from iterdpo.testing import make_group
from judges.person.judge import plan
from judges.person.store import Reviews
from tests.integration.harness import Workspace, call, wait_for

HOSTILE = (
    "<script>window.pwned=1;alert(1)</script><img src=x onerror='window.pwned=1'>",
    "</script><script>window.pwned=1</script>{{ 7 * 7 }} ${window.pwned=1}",
    "<a href='javascript:window.pwned=1'>good</a> <iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "\u202egnp.doog\u202c \x1b[31m good",
)
RUN = """
import sys
import pytest
from flows import run_rounds
from iterdpo.config import load_config
from iterdpo.run.progress import Progress
from iterdpo.testing import FakeSampler
from tests.integration.harness import train_here

train_here(pytest.MonkeyPatch())
texts = ("bad tale", "good tale", "bad <script>window.pwned=1</script>", "<img src=x onerror='window.pwned=1'> good")
sampler = FakeSampler(lambda ids, k: texts[k + 2 * (sum(ids) % 2)])
progress = Progress(sys.stdout)
run_rounds(load_config(sys.argv[1]), sampler=sampler, progress=progress)
"""
FLOW = """
import sys
from pathlib import Path
import flows.server
from prefect import flow, task
from flows.review import waiting
from iterdpo.testing import make_group
from judges.person.judge import Person

@task
def judge():
    person = Person()
    person.attach(Path(sys.argv[1]), waiting)
    groups = [make_group(f"Question {i}?", [f"bad {i}", f"good {i}"]) for i in range(3)]
    return [j.scores for j in person.judge(groups)]

@task
def pair(judged):
    return judged

@flow(name="round")
def one_round():
    return pair(judge())

@flow(name="outer")
def outer():
    return one_round()

print("judged", outer(), flush=True)
"""


class Reviewing:
    """A browser tab on the review page, and a person with a taste for completions that say "good"."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.wait(lambda task: task != "")

    def task(self) -> str:
        return self.page.evaluate("document.body.dataset.task ?? ''")

    def wait(self, condition: Any, *, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition(self.task()):
            assert time.monotonic() < deadline, f"{self.page.inner_text('body')}\n{self.complaints}"
            self.page.wait_for_timeout(20)

    def press(self, key: str) -> None:
        before = self.task()
        self.page.wait_for_timeout(180)  # keys that come sooner are taken for those of the pair before
        self.page.keyboard.press(key)
        self.wait(lambda task: task != before)

    def judge(self) -> None:
        left = "good" in self.page.inner_text("#left")
        assert left != ("good" in self.page.inner_text("#right"))
        self.press(("ArrowLeft", "1")[self.count() % 2] if left else ("ArrowRight", "2")[self.count() % 2])

    def count(self) -> int:
        shown = re.match(r"(\d+) of", self.page.inner_text("#count"))
        return int(shown[1]) if shown else 0


@contextmanager
def review_command(run_dir: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`iterdpo judge review` in a process of its own, and its page's URL."""
    command = [sys.executable, "-m", "flows.cli", "judge", "review", str(run_dir), "--no-open", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        yield process, next(m[1] for line in lines if (m := re.match(r"review: (\S+)", line)))
    finally:
        process.kill()
        process.wait(10)


def test_twenty_pairs_by_keyboard_survive_a_kill_an_undo_and_hostile_completions(tmp_path: Path, browser: Any) -> None:
    groups = [
        make_group(f"{HOSTILE[i % 4]} {i}?", [f"bad {i} {HOSTILE[i % 2]}", f"{HOSTILE[2 + i % 2]} {i}"])
        for i in range(20)
    ]
    asked = [plan(g, comparisons=1, question="Which is <b>better</b>?", who="", seed=0).tasks[0] for g in groups]
    _, [batch] = Reviews(tmp_path).ask(asked)
    tab = Reviewing(browser.new_page())
    with review_command(tmp_path) as (process, url):
        tab.open(url)
        for number in range(1, 8):
            assert tab.page.inner_text("#count") == f"{number} of 20"
            tab.judge()
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        tab.page.wait_for_timeout(180)
        tab.page.keyboard.press("ArrowLeft")
        tab.page.get_by_text("does not answer").wait_for()
    assert len(batch.verdicts()) == 7
    tab.complaints.clear()  # of the server that was away

    with review_command(tmp_path, "--once") as (process, url):
        origin = url[: url.index("/", 7)]
        tab.requests.clear()
        tab.open(url)
        assert tab.count() == 8
        wrong = tab.task()
        tab.press("ArrowLeft" if "bad" in tab.page.inner_text("#left") else "ArrowRight")
        tab.press("u")
        assert tab.task() == wrong
        assert tab.count() == 8
        while tab.count() < 19:
            tab.judge()
        tab.press("Space")
        tab.page.keyboard.press("n")
        tab.page.keyboard.type("1 s u: too alike")
        tab.page.keyboard.press("Enter")
        tab.press("s")
        assert tab.page.get_by_text("Nothing left to judge").is_visible()
        assert process.wait(10) == 0
        assert tab.complaints == []
        assert tab.page.evaluate("window.pwned") is None
        assert {r[: len(origin)] for r in tab.requests if not r.startswith("data:")} == {origin}
        assert tab.page.locator("iframe, img, #work a, #work script").count() == 0
    verdicts = batch.verdicts()
    tasks = {t.id: t for t in batch.tasks()}
    said = [(v.choice, "good" in getattr(tasks[v.task], v.choice, "")) for v in verdicts.values()]
    assert len(verdicts) == 20
    assert sum(liked for _, liked in said) == 18
    assert [choice for choice, _ in said][-2:] == ["tie", "skip"]
    assert verdicts[list(verdicts)[-1]].note == "1 s u: too alike"
    tab.page.close()


def test_hidden_characters_are_shown_and_a_phone_has_no_sideways_scrolling(tmp_path: Path, browser: Any) -> None:
    groups = [make_group("Which?", [f"bad {HOSTILE[3]}", "w" * 3000])]
    Reviews(tmp_path).ask(plan(groups[0], comparisons=1, question="?", who="", seed=0).tasks)
    tab = Reviewing(browser.new_page(viewport={"width": 360, "height": 700}))
    with review_command(tmp_path) as (_, url):
        tab.open(url)
        assert "‹U+202E›gnp.doog‹U+202C› ␛[31m" in tab.page.inner_text("#work")
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.page.close()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect server's API."""
    from flows.server import start_server

    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with start_server(home / "server.log") as api:
            assert api.password is not None
            patch.setenv("PREFECT_API_URL", api.url)
            patch.setenv("PREFECT_API_AUTH_STRING", api.password.read_text())
            yield api.url


def flow_runs(url: str) -> dict[str, dict[str, Any]]:
    """The newest run of each flow, by the flow's name."""
    flows = {f["id"]: f["name"] for f in call(f"{url}/flows/filter", {})}
    runs = call(f"{url}/flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    return {flows[run["flow_id"]]: run for run in runs}


def states(url: str) -> dict[str, str]:
    return {name: run["state_type"] for name, run in flow_runs(url).items()}


@contextmanager
def waiting_flow(url: str, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`FLOW` in a process of its own, once both of its flow runs are paused."""
    before = {run["id"] for run in flow_runs(url).values()}
    process = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(run_dir)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def paused() -> bool:
        runs = [run for run in flow_runs(url).values() if run["id"] not in before]
        assert process.poll() is None, process.communicate()[0]
        return [run["state_type"] for run in runs] == ["PAUSED"] * 2

    try:
        wait_for(paused, seconds=60, what="a paused flow run")
        yield process
    finally:
        process.kill()
        process.wait(10)


def answer(run_dir: Path) -> None:
    for batch in Reviews(run_dir).pending():
        for task in batch.unanswered():
            assert batch.submit(task.id, "left" if "good" in task.left else "right")


@pytest.mark.slow
def test_a_flow_that_waits_is_paused_and_resuming_it_by_hand_does_no_harm(prefect: str, tmp_path: Path) -> None:
    with waiting_flow(prefect, tmp_path) as process:
        run = flow_runs(prefect)["outer"]
        assert "3 pairs for a person: iterdpo judge review" in run["state"]["message"]
        call(f"{prefect}/flow_runs/{run['id']}/resume", {})
        assert states(prefect)["outer"] == "RUNNING"
        time.sleep(3)
        assert process.poll() is None  # it still waits
        answer(tmp_path)
        output, _ = process.communicate(timeout=60)
        assert "judged [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]" in output, output
    assert states(prefect) == {"outer": "COMPLETED", "round": "COMPLETED"}


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_cancelling_in_prefect_ends_the_wait_and_the_next_start_goes_on(
    prefect: str, tmp_path: Path, resumed: bool
) -> None:
    with waiting_flow(prefect, tmp_path) as process:
        [batch] = Reviews(tmp_path).pending()
        batch.submit(batch.tasks()[0].id, "left" if "good" in batch.tasks()[0].left else "right")
        run = flow_runs(prefect)["outer"]
        if resumed:
            call(f"{prefect}/flow_runs/{run['id']}/resume", {})
        # Unforced, Prefect refuses to cancel a paused run; its newer page forces, and its older one must resume first.
        cancelling = {"state": {"type": "CANCELLING"}, "force": not resumed}
        assert call(f"{prefect}/flow_runs/{run['id']}/set_state", cancelling)["status"] == "ACCEPT"
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "cancelled in Prefect" in output
    assert states(prefect) == {"outer": "CANCELLED", "round": "CANCELLED"}
    with waiting_flow(prefect, tmp_path) as process:
        assert "2 pairs" in flow_runs(prefect)["outer"]["state"]["message"]
        answer(tmp_path)
        assert "judged [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]" in process.communicate(timeout=60)[0]
    assert states(prefect) == {"outer": "COMPLETED", "round": "COMPLETED"}


@pytest.mark.slow
def test_a_run_waits_paused_for_twenty_pairs_and_then_trains_by_itself(
    prefect: str, workspace: Workspace, browser: Any
) -> None:
    workspace.config |= {
        "prompts": {**workspace.config["prompts"], "per_round": 20},
        "sampling": {"n": 2, "max_tokens": 64, "shard_size": 20},
        "judge": {"use": "person"},
        "evaluation": {**workspace.config["evaluation"], "max_logp_gap": 1e3},
    }
    config = workspace.write()
    assert yaml.safe_load(config.read_text())["judge"] == {"use": "person"}
    log = open(workspace.root / "output.log", "ab")  # noqa: SIM115  # the process keeps it
    environment = {**workspace.environment(), "PREFECT_API_URL": prefect}
    process = subprocess.Popen([sys.executable, "-c", RUN, str(config)], env=environment, stdout=log, stderr=log)
    try:

        def asked() -> bool:
            assert process.poll() is None, (workspace.root / "output.log").read_text()
            return bool(Reviews(workspace.run_dir).pending())

        wait_for(asked, seconds=300, what="pairs to judge")
        paused = {"iterative_dpo": "PAUSED", "round": "PAUSED"}
        wait_for(lambda: states(prefect).items() >= paused.items(), seconds=20, what="a paused run")
        tab = Reviewing(browser.new_page())
        with review_command(workspace.run_dir, "--once") as (_, url):
            tab.open(url)
            for number in range(1, 21):
                assert tab.page.inner_text("#count") == f"{number} of 20"
                tab.judge()
        assert tab.complaints == []
        assert tab.page.evaluate("window.pwned") is None
        tab.page.close()
        wait_for(lambda: process.poll() is not None, seconds=200, what="the end of the run")
        assert process.returncode == 0, (workspace.root / "output.log").read_text()
    finally:
        process.kill()
        process.wait(10)
    completed = {"iterative_dpo": "COMPLETED", "round": "COMPLETED"}
    assert states(prefect).items() >= completed.items()
    first = workspace.run_dir / "round-001"
    for group, judgment in zip(read_groups(first / "completions"), read_judgments(first / "judgments"), strict=True):
        assert judgment.scores == [float("good" in c.text) for c in group.completions]
    assert read_json(first / "pairs" / "MANIFEST.json")["counts"]["kept"] == 20
    assert json.loads((first / "round.json").read_text())["decision"] in ("promote", "keep")

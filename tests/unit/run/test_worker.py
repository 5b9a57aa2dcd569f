"""The JSON-lines worker, with real child processes; this file is the child's module too."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import ChildFailed
from iterdpo.run import supervise
from iterdpo.run.worker import Done, JsonLinesWorker, beat, import_heavy, serve


@dataclass(frozen=True)
class Point:
    x: float


@dataclass(frozen=True)
class Double:
    text: str
    points: list[Point]


@dataclass(frozen=True)
class Doubled:
    text: str
    points: list[dict[str, Any]]


@dataclass(frozen=True)
class Die:
    how: str


@dataclass(frozen=True)
class Work:
    seconds: float
    beats: bool


def double(request: Double) -> Doubled:
    print("a library prints this")
    points: Any = [Point(2 * point.x) for point in request.points]
    return Doubled(2 * request.text, points)


def die(request: Die) -> Done:
    if request.how == "at once":
        os._exit(3)
    raise RuntimeError(request.how)


def work(request: Work) -> Done:
    until = time.monotonic() + request.seconds
    while time.monotonic() < until:
        time.sleep(0.01)
        if request.beats:
            beat()
    return Done()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], JsonLinesWorker]]:
    (tmp_path / "child.py").symlink_to(__file__)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    started: list[JsonLinesWorker] = []

    def start() -> JsonLinesWorker:
        env = {**os.environ, "PYTHONPATH": path}
        started.append(JsonLinesWorker("child", name="doubler", log=tmp_path / "child.log", env=env))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def test_a_reply_comes_with_its_fields_and_what_is_printed_goes_to_the_log(start: Any, tmp_path: Path) -> None:
    worker = start()
    for text in ("é\ud800\n", "again"):
        doubled = worker.call(Double(text, [Point(0.1), Point(float("inf"))]), Doubled)
        assert doubled == Doubled(2 * text, [{"x": 0.2}, {"x": float("inf")}])
    assert (tmp_path / "child.log").read_text() == "a library prints this\n" * 2


@pytest.mark.parametrize("how", ["of thirst", "of\n  thirst"])
def test_an_error_of_the_child_is_raised_here_on_one_line_with_its_log(start: Any, tmp_path: Path, how: str) -> None:
    worker = start()
    with pytest.raises(ChildFailed) as failed:
        worker.call(Die(how), Done)
    assert str(failed.value) == f"doubler, die: RuntimeError: of thirst (the whole log: {tmp_path / 'child.log'})"


def test_the_death_of_the_child_is_an_error_too_and_it_stays_dead(start: Any) -> None:
    worker = start()
    with pytest.raises(ChildFailed, match="doubler, die: the process died: it ended with status 3 and said nothing"):
        worker.call(Die("at once"), Done)
    worker.close()
    assert worker._child.poll() is not None


def test_closing_ends_a_child_that_waits(start: Any) -> None:
    worker = start()
    worker.call(Double("", []), Doubled)
    worker.close()
    assert worker._child.poll() is not None


def test_a_child_that_shows_no_sign_of_work_is_ended(start: Any) -> None:
    worker = start()
    with pytest.raises(ChildFailed, match=r"doubler, work: .*no sign of work for 1 seconds, so it was ended"):
        worker.call(Work(1000, beats=False), Done, silence=1)
    assert worker._child.poll() is not None


def test_a_child_that_is_stopped_is_ended_even_before_it_reads_its_request(start: Any) -> None:
    worker = start()
    worker.call(Double("", []), Doubled)
    for pid in supervise._descendants(worker._child.process.pid):
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ChildFailed, match="no sign of work"):
        worker.call(Double("x" * 10_000_000, []), Doubled, silence=0.5)  # more than the pipe holds
    assert worker._child.poll() is not None


def test_a_child_that_works_long_and_says_so_is_waited_for(start: Any) -> None:
    worker = start()
    assert worker.call(Work(5, beats=True), Done, silence=4) == Done()
    assert worker.call(Double("a", []), Doubled) == Doubled("aa", [])


if __name__ == "__main__":
    serve({Double: double, Die: die, Work: work}, prepare=lambda: time.sleep(0.01))


def test_a_heavy_import_does_without_some_packages_and_leaves_them_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_one.py").write_text(
        "from importlib.util import find_spec\nfound = [find_spec('sklearn'), find_spec('scipy'), find_spec('json')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    import_heavy("heavy_one", without=("sklearn", "scipy", "json"))
    sklearn, scipy, there = sys.modules["heavy_one"].found
    assert sklearn is scipy is None
    assert there is not None  # it was imported before
    assert {"sklearn", "scipy"}.isdisjoint(sys.modules)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_heavy("no_such_module")
    assert "sklearn" not in sys.modules

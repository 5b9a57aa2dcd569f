"""Which GPUs are visible, and their reservation among processes: real locks, in a directory of the test's own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iterdpo.run import devices, supervise

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_tests_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def wait_for(condition: Callable[[], bool], event: str) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {event}"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("chosen", "seen"), [("0,1", ["0", "1"]), ("", []), ("-1", []), (" GPU-a , GPU-b", ["GPU-a", "GPU-b"])]
)
def test_the_gpus_that_are_visible_are_those_that_were_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert devices.visible_gpus() == seen


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock files are, away from those of runs on this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def held(file: Path) -> bool:
    if not file.exists():
        return False
    with open(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def reserve(locks: Path) -> Iterator[Callable[..., list[int]]]:
    """`devices.reserve`; what is still held at the end is released."""
    taken: list[int] = []

    def reserve(*names: str, **options: object) -> list[int]:
        descriptors = devices.reserve(names, **options)  # type: ignore[arg-type]
        taken.extend(descriptors)
        return descriptors

    yield reserve
    for descriptor in taken:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_a_reserved_gpu_is_held_until_it_is_released(locks: Path, reserve: Callable[..., list[int]]) -> None:
    descriptors = reserve("3", "0", "3")
    files = [locks / "iterdpo-gpu-0.lock", locks / "iterdpo-gpu-3.lock"]
    assert len(descriptors) == 2
    assert [held(file) for file in files] == [True, True]
    os.close(descriptors[0])
    assert [held(file) for file in files] == [False, True]


def test_a_reservation_lasts_until_the_last_child_that_has_it_is_gone(
    locks: Path, reserve: Callable[..., list[int]]
) -> None:
    (descriptor,) = reserve("GPU-8f2e/1")
    (file,) = locks.glob("iterdpo-gpu-*.lock")
    with supervise.start(["sleep", "1000"], log=Path("log"), reserved=[descriptor]):
        with supervise.start(["sleep", "1000"], log=Path("log"), reserved=[descriptor]):
            os.close(descriptor)
            assert held(file)
        assert held(file)
    assert not held(file)


def test_a_reservation_ends_with_a_process_that_is_killed(locks: Path) -> None:
    code = f"""
import os, signal, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from iterdpo.run import devices, supervise
tempfile.tempdir = {str(locks)!r}
supervise.start(["sh", "-c", "echo $$ > pid.txt; exec sleep 1000"], log=Path("log"), reserved=devices.reserve(["3"]))
while not Path("pid.txt").exists():
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    wait_for(lambda: not held(locks / "iterdpo-gpu-3.lock"), "the release")


def test_who_wants_a_gpu_in_use_says_so_and_waits_until_it_is_free(
    locks: Path, reserve: Callable[..., list[int]]
) -> None:
    (first,) = reserve("3")
    said: list[str] = []
    second = threading.Thread(target=reserve, args=["3", "4"], kwargs={"on_wait": said.append}, daemon=True)
    second.start()
    wait_for(lambda: said == ["3"], "that it waits")
    second.join(0.1)
    assert second.is_alive()
    os.close(first)
    second.join(2)
    assert not second.is_alive()
    assert said == ["3"]  # 4 was free
    assert held(locks / "iterdpo-gpu-3.lock")


def test_the_first_gpus_are_reserved_while_the_context_is_open(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    files = [locks / f"iterdpo-gpu-{number}.lock" for number in range(3)]
    with devices.reserved_gpus(2, say=print) as descriptors:
        assert len(descriptors) == 2
        assert [held(file) for file in files] == [True, True, False]
    assert not any(held(file) for file in files)

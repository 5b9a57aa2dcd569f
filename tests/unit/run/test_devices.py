"""Which GPUs are visible and reserved, and which ports are free: real locks and sockets, in the test's own directory."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from iterdpo.errors import ConfigError
from iterdpo.run import devices, supervise
from iterdpo.run.devices import answers, free_port
from iterdpo.run.folder import own_folder

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
    ("chosen", "seen"),
    [("0,1", ["0", "1"]), ("", []), ("-1", []), ("NoDevFiles", []), (" GPU-a , GPU-b", ["GPU-a", "GPU-b"])],
)
def test_the_gpus_that_are_visible_are_those_that_were_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert devices.visible_gpus() == seen


def test_more_devices_than_there_are_are_refused_by_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_installed", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.check_devices(2, "dpo.processes")
    with pytest.raises(ConfigError, match=r"dpo\.processes = 3: more than the 2 GPUs of this machine"):
        devices.check_devices(3, "dpo.processes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError, match="more than the 1 GPU of"):
        devices.check_devices(2, "dpo.processes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2e")  # not known by number
    devices.check_devices(1, "dpo.processes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES names GPU 2, but this machine has 2"):
        devices.check_devices(1, "dpo.processes")
    monkeypatch.setattr(devices, "_installed", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2e")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES names GPU GPU-8f2e, but this machine has 0"):
        devices.check_devices(1, "dpo.processes")


def test_without_a_gpu_the_cores_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    devices.check_devices(4, "dpo.processes")
    with pytest.raises(ConfigError, match=r"dpo\.processes = 5: more than the 4 cores"):
        devices.check_devices(5, "dpo.processes")


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock files are, away from those of runs on this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return own_folder()


def held(file: Path) -> bool:
    if not file.exists():
        return False
    with open(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def turns(count: int) -> contextlib.closing[devices.Turns]:
    return contextlib.closing(devices.Turns(count, say=print))


def test_the_first_gpus_are_locked_during_a_turn(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0,3,1")
    files = [locks / f"gpu-{number}.lock" for number in (0, 3, 1)]
    seen: list[bool] = []

    def between() -> None:
        with ours.between():
            seen.append(held(files[0]))

    with turns(3) as ours:
        assert len(ours.descriptors) == 2
        assert not any(held(file) for file in files)
        with ours.turn():
            with ours.turn():  # of a judge that works beside the sampler
                pass
            assert [held(file) for file in files] == [True, True, False]
            with ours.between():
                assert not any(held(file) for file in files)
            assert held(files[0])
            beside = threading.Thread(target=between)  # a judge that waits beside the sampler
            beside.start()
            beside.join()
            assert seen == [True]
        with ours.between():
            pass
        assert not any(held(file) for file in files)


def test_a_turn_that_another_thread_takes_between_has_the_gpu(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen: list[bool] = []
    inside, ending = threading.Event(), threading.Event()

    def beside() -> None:
        with ours.turn():
            seen.append(held(locks / "gpu-0.lock"))
            inside.set()
            ending.wait(20)

    with turns(1) as ours:
        with ours.turn(), ours.turn():
            with ours.between():
                other = threading.Thread(target=beside)
                other.start()
                assert inside.wait(20)
            ending.set()
            other.join()
            assert held(locks / "gpu-0.lock")
        assert seen == [True]
        assert not held(locks / "gpu-0.lock")


def test_an_interruption_of_the_wait_after_a_pause_is_what_ends_the_turn(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    with (
        contextlib.closing(devices.Turns(1, say=interrupted)) as ours,
        open(locks / "gpu-0.lock") as another,
        pytest.raises(KeyboardInterrupt),
        ours.turn(),
        ours.between(),
    ):
        fcntl.flock(another, fcntl.LOCK_EX)


def test_without_gpus_a_turn_locks_nothing(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with turns(1) as ours, ours.turn(), ours.between():
        assert ours.descriptors == []
    assert list(locks.iterdir()) == []


def test_a_turn_lasts_until_the_last_child_of_a_process_that_is_killed_has_ended(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2e/1")
    with contextlib.ExitStack() as run, contextlib.ExitStack() as children:
        ours = devices.Turns(1, say=print)
        run.enter_context(ours.turn())
        (file,) = locks.glob("gpu-*.lock")
        children.enter_context(supervise.start(["sleep", "1000"], log=Path("log"), reserved=ours.descriptors))
        with supervise.start(["sleep", "1000"], log=Path("log"), reserved=ours.descriptors):
            ours.close()  # as the end of the process does
            assert held(file)
        assert held(file)
        children.close()
        assert not held(file)


def test_a_turn_ends_with_a_process_that_is_killed(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    code = f"""
import os, signal, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from iterdpo.run import devices, supervise
tempfile.tempdir = {str(locks.parent)!r}
turns = devices.Turns(1, say=print)
with turns.turn():
    supervise.start(["sh", "-c", "echo $$ > pid.txt; exec sleep 1000"], log=Path("log"), reserved=turns.descriptors)
    while not Path("pid.txt").exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    wait_for(lambda: not held(locks / "gpu-3.lock"), "the release")


def test_a_turn_ends_though_a_child_that_sleeps_lives_on(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with turns(1) as ours, supervise.start(["sleep", "1000"], log=Path("log"), reserved=ours.descriptors):
        for _ in range(2):
            with ours.turn():
                assert held(locks / "gpu-3.lock")
            assert not held(locks / "gpu-3.lock")


def test_a_run_that_needs_a_gpu_in_use_says_so_and_waits_until_it_is_free(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    has_it, done = threading.Event(), threading.Event()

    def second() -> None:
        with contextlib.closing(devices.Turns(2, say=said.append)) as theirs, theirs.turn():
            has_it.set()
            done.wait(20)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with turns(1) as ours, ours.turn():
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        wait_for(lambda: bool(said), "the message")
        assert not has_it.wait(0.1)
    assert has_it.wait(20)
    assert said == ["waiting for GPU 3, which another run is using"]  # 4 was free
    assert held(locks / "gpu-3.lock")
    done.set()
    thread.join(20)


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()


@pytest.mark.parametrize(("status", "expected"), [(200, True), (404, False), (503, False)])
def test_a_server_answers_if_its_status_is_200(status: int, expected: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert answers(f"http://127.0.0.1:{server.server_port}/health") is expected
        thread.join()


def test_a_port_that_nothing_listens_on_does_not_answer() -> None:
    assert not answers(f"http://127.0.0.1:{free_port()}/health")

"""Children die with their parent: real processes, really killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iterdpo.run import supervise

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).parents[3]
# A command and what it started, each with its process id on a line of pids.txt.
FAMILY = "sleep 1000 & echo $$ > pids.txt; echo $! >> pids.txt; exec sleep 1000"


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody waits for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def pids(directory: Path, count: int = 2) -> list[int]:
    """The ids that a command wrote, once they are there."""
    file = directory / "pids.txt"
    wait_for(lambda: file.exists() and file.read_text().count("\n") == count, "the children's start")
    return [int(line) for line in file.read_text().split()]


def gone(processes: list[int]) -> None:
    wait_for(lambda: not any(map(alive, processes)), f"the end of {processes}")


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in the test's directory; what a failed test leaves there is ended."""
    monkeypatch.chdir(tmp_path)
    yield
    for file in tmp_path.glob("pids*.txt"):
        for pid in map(int, file.read_text().split()):
            if alive(pid) and Path(f"/proc/{pid}/cwd").resolve() == tmp_path:
                os.kill(pid, signal.SIGKILL)


def start(script: str, **options: object) -> supervise.Child:
    return supervise.start(["sh", "-c", script], log=Path("log"), **options)  # type: ignore[arg-type]


PARENT = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from iterdpo.run import supervise
child = supervise.start(["sh", "-c", {FAMILY!r}], log=Path("log"))
print("ready", flush=True)
sys.stdin.readline()
ENDING
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("sys.exit(0)", 0),
        ("os._exit(7)", 7),
        ("raise RuntimeError('crash')", 1),
        ("os.kill(child.process.pid, signal.SIGSTOP); os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_however_the_parent_ends_child_and_grandchild_are_gone(tmp_path: Path, ending: str, status: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("ENDING", ending)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    family = pids(tmp_path)
    assert all(map(alive, family))
    parent.stdin.write(b"\n")
    parent.stdin.flush()
    assert parent.wait(5) == status
    gone(family)


def test_a_parent_killed_right_after_the_start_leaves_nothing(tmp_path: Path) -> None:
    # Mostly before the guard is up: it reads the end of file when it gets there, before or after it starts the command.
    ending = "print(child.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    code = PARENT.replace('print("ready", flush=True)', ending)
    parent = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.PIPE)
    assert parent.returncode == -signal.SIGKILL
    gone([int(parent.stdout)])  # the guard, which ends last
    started = tmp_path / "pids.txt"
    gone([int(line) for line in started.read_text().split()] if started.exists() else [])


def test_kill_ends_child_and_grandchild_and_may_be_called_twice(tmp_path: Path) -> None:
    child = start(FAMILY)
    family = pids(tmp_path)
    assert child.poll() is None
    child.kill()
    gone(family)
    child.kill()
    assert child.poll() is not None


def test_leaving_the_block_ends_the_child_an_error_too(tmp_path: Path) -> None:
    family: list[int] = []

    def work() -> None:
        with start(FAMILY):
            family.extend(pids(tmp_path))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    gone(family)


def test_the_command_dies_with_its_guard(tmp_path: Path) -> None:
    with start("echo $$ > pids.txt; exec sleep 1000") as child:
        family = pids(tmp_path, 1)
        os.kill(child.process.pid, signal.SIGKILL)
        gone(family)


def test_one_child_dies_alone(tmp_path: Path) -> None:
    # did the second hold the first's pipe open, the first would not notice
    with (
        start("echo $$ > pids-1.txt; exec sleep 1000") as first,
        start("echo $$ > pids-2.txt; exec sleep 1000") as second,
    ):
        files = [tmp_path / "pids-1.txt", tmp_path / "pids-2.txt"]
        wait_for(lambda: all(f.exists() and f.read_text().endswith("\n") for f in files), "the children's start")
        one, two = (int(file.read_text()) for file in files)
        first.kill()
        gone([one])
        assert alive(two)
        assert second.poll() is None


def test_what_a_command_leaves_behind_goes_when_the_command_ends(tmp_path: Path) -> None:
    with start("sleep 1000 & echo $! > pids.txt; exit 3") as child:
        assert child.wait(5) == 3
        left = pids(tmp_path, 1)
    gone(left)


def test_kill_reaches_a_grandchild_in_a_session_of_its_own(tmp_path: Path) -> None:
    with start("setsid sleep 1000 & echo $! > pids.txt; exec sleep 1000"):
        left = pids(tmp_path, 1)
        # setsid has to have happened
        wait_for(lambda: Path(f"/proc/{left[0]}/comm").read_text() == "sleep\n", "setsid")
    gone(left)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 128 + 9)])
def test_the_exit_status_is_the_commands_and_for_a_signal_the_shells(script: str, status: int) -> None:
    with start(script) as child:
        assert child.wait(5) == status
        assert child.poll() == status


def test_output_and_errors_are_appended_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    with start("echo out; echo err >&2") as child:
        child.wait(5)
    assert (tmp_path / "log").read_text() == "before\nout\nerr\n"
    assert child.said() == ["out", "err"]  # of this start only
    (tmp_path / "log").unlink()
    assert child.said() == []


def test_a_command_that_does_not_exist_is_in_the_log() -> None:
    with supervise.start(["no-such-command"], log=Path("log")) as child:
        assert child.wait(5) == 1
    assert child.reason() == "FileNotFoundError: [Errno 2] No such file or directory: 'no-such-command'"


def test_pipes_go_both_ways_and_errors_still_to_the_log() -> None:
    with start("echo starting >&2; exec cat", pipes=True) as child:
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        for line in (b"one\n", b"two\n"):
            child.process.stdin.write(line)
            child.process.stdin.flush()
            assert child.process.stdout.readline() == line
        child.process.stdin.close()  # and its end reaches the command
        assert child.wait(5) == 0
        assert child.process.stdout.read() == b""
    assert child.said() == ["starting"]


def test_who_reads_from_a_child_that_dies_reads_the_end_of_file() -> None:
    with start("read line; echo got $line; kill -KILL $$", pipes=True) as child:
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        child.process.stdin.write(b"this\n")
        child.process.stdin.flush()
        assert child.process.stdout.readline() == b"got this\n"
        assert child.process.stdout.readline() == b""


def test_only_the_command_holds_its_ends_of_the_pipes() -> None:
    # were they held by the guard too, neither side would notice that the other is gone
    with start("exec <&- >&-; exec sleep 1000", pipes=True) as child:
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        ready, _, _ = select.select([child.process.stdout], [], [], 2.0)
        assert ready
        assert child.process.stdout.read() == b""
        assert child.poll() is None
        with pytest.raises(BrokenPipeError):
            os.write(child.process.stdin.fileno(), b"anybody?")


def test_without_pipes_the_command_has_no_input() -> None:
    with start("read line || echo none") as child:
        assert child.wait(5) == 0
    assert child.said() == ["none"]


def test_the_environment_is_the_one_given() -> None:
    with start("echo $GREETING", env={**os.environ, "GREETING": "hello"}) as child:
        child.wait(5)
    assert child.said() == ["hello"]


SURROUNDING = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR"),
    *("MASTER_PORT", "SLURM_JOB_ID", "SLURM_NTASKS", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "PMI_RANK"),
    *("FSDP_VERSION", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PET_NPROC_PER_NODE", "VLLM_API_KEY"),
)


@pytest.mark.parametrize("given", [True, False])
def test_the_variables_of_a_launcher_around_this_process_reach_no_child(
    monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    for name in SURROUNDING:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("RANKING", "kept")
    with start("env", env=dict(os.environ) if given else None) as child:
        child.wait(5)
    names = {line.partition("=")[0] for line in child.said()}
    assert "RANKING" in names
    assert not names & set(SURROUNDING)


def test_a_withheld_variable_reaches_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_withheld", set())
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-secret")
    supervise.withhold("MY_JUDGE_KEY")
    with start("env; sh -c env") as child:
        child.wait(5)
    assert "sk-secret" not in "".join(child.said())


@pytest.mark.parametrize("path", [None, "", ":/nowhere", "/nowhere:"])
def test_a_module_of_the_working_directory_is_not_imported_by_any_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("print('mine')\n")
    monkeypatch.chdir(tmp_path)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    module = f"{sys.executable} -c 'import json; print(json.dumps(1))'"
    with start(
        f'{module}; {sys.executable} -m json.tool --help | head -1; sh -c "{sys.executable} -m json.tool -h"'
    ) as c:
        c.wait(20)
    assert "1" in c.said()
    assert "mine" not in c.said()


REASONS = [
    ("echo 'old news' >&2; exit 3", "old news"),
    ("exit 3", "it ended with status 3 and said nothing"),
    ("echo 'Traceback:'; echo 'ValueError: no'; echo 'and then'; exit 1", "ValueError: no"),
    ("echo 'a.b.OutOfMemoryError: CUDA out of memory.'; exit 1", "a.b.OutOfMemoryError: CUDA out of memory."),
    ("echo '[rank1]: RuntimeError: peer'; exit 1", "RuntimeError: peer"),
    ("echo '(Core pid=3) ERROR 11-26 [core.py:9] ValueError: why'; exit 1", "ValueError: why"),
    ("echo AssertionError; exit 1", "AssertionError"),
    (
        "echo 'a.ValidationError: 1 validation error for M'; echo '  Value error, too long [type=x, input]'; exit 1",
        "a.ValidationError: 1 validation error for M: Value error, too long",
    ),
    (
        "echo 'a.ValidationError: 2 validation errors for M'; echo seed; echo '  Not a number [type=x]'; exit 1",
        "a.ValidationError: 2 validation errors for M: seed: Not a number",
    ),
    (
        "echo 'a.ValidationError: 1 validation error for M'; echo 'and then'; exit 1",
        "a.ValidationError: 1 validation error for M",
    ),
    ("echo 'KeyError: 1'; echo 'subprocess.CalledProcessError: Command returned 1'; exit 1", "KeyError: 1"),
    ("echo 'ValueError: root'; echo 'RuntimeError: failed. See root cause above.'; exit 1", "ValueError: root"),
    ("echo 'iterdpo: failed: RuntimeError: first'; echo 'OSError: second'; exit 1", "RuntimeError: first"),
    ("echo 'handled: ValueError: x'; kill -KILL $$", "it was ended by SIGKILL, as Linux does if memory is short"),
    ("kill -SEGV $$", "it was ended by SIGSEGV"),
    ("echo 'CalledProcessError: died with <Signals.SIGTERM: 15>.'; exit 1", "it was ended by SIGTERM"),
]


@pytest.mark.parametrize(("script", "reason"), REASONS)
def test_the_reason_is_one_line_of_this_start(tmp_path: Path, script: str, reason: str) -> None:
    (tmp_path / "log").write_text("RuntimeError: of an earlier start\niterdpo: failed: of an earlier start\n")
    with start(script) as child:
        child.wait(5)
        assert child.reason() == reason


def test_a_reason_is_cut_where_a_screen_would_be_full(tmp_path: Path) -> None:
    with start("echo ValueError: $(seq 1000); exit 1") as child:
        child.wait(5)
    assert len(child.reason()) == 500


# GPUs


def test_a_child_that_was_not_seen_in_time_is_ended_and_says_why() -> None:
    with start("sleep 1000") as child:
        assert not child.lost
        with child.watched(0.2):
            assert child.wait(10) != 0
        assert child.lost
        assert child.reason() == "no sign of work for 0.2 seconds, so it was ended"


def test_a_child_that_is_seen_is_left_alone() -> None:
    with start("sleep 1000") as child:
        with child.watched(2) as seen:
            for _ in range(40):
                time.sleep(0.1)
                seen()
        with child.watched(None) as seen:
            seen()
        time.sleep(0.1)
        assert child.poll() is None


@pytest.mark.parametrize(
    ("script", "lost"),
    [
        ("kill -KILL $$", True),
        ("exit 1", False),
        ("exit 0", False),
        ("echo 'Signal 15 (SIGTERM) received by PID 7'; exit 1", True),
        # the others of a process that failed are ended by their launcher
        ("echo 'iterdpo: failed: RuntimeError: nan'; echo 'Signal 15 (SIGTERM) received by PID 7'; exit 1", False),
        # a process that loses its peer fails as well
        ("echo 'iterdpo: failed: RuntimeError: peer'; echo 'Signal 9 (SIGKILL) received by PID 7'; exit 1", True),
    ],
)
def test_a_child_that_a_signal_ended_is_lost(script: str, lost: bool) -> None:
    with start(script) as child:
        child.wait(10)
        assert child.lost is lost


def test_a_guard_that_is_killed_or_stopped_leaves_nothing(tmp_path: Path) -> None:
    with start("echo $$ > pids.txt; echo >> pids.txt; exec sleep 1000") as child:
        found = pids(tmp_path)
        os.kill(child.process.pid, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert child.lost
        assert child.reason() == "it was ended by SIGKILL, as Linux does if memory is short"
        gone(found)
    (tmp_path / "pids.txt").unlink()
    with start(FAMILY) as child:
        found = pids(tmp_path)
        os.kill(child.process.pid, signal.SIGSTOP)
        child.kill()
        gone(found)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_whose_handler_hangs_ends_all_the_same(number: int, status: int) -> None:
    script = (
        "import signal, time; from iterdpo.run.supervise import end_soon; end_soon(0.2)\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda *_: time.sleep(1000))\n"
        "print('ready', flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(10) == status

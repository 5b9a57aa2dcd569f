"""Programs that try to get out of the sandbox, or to hurt the machine, each in a real one, in both of its kinds."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify import sandbox
from judges.verify.sandbox import Mode, Outcome, SandboxError, run_python, sandbox_mode, sandbox_problems

REPOSITORY = Path(__file__).parents[4]


def modes() -> list[Mode]:
    found: list[Mode] = []
    for mode in sandbox.MODES:
        with contextlib.suppress(SandboxError):
            sandbox._run("", mode, "", 10, 512, 1024, 16)
            found.append(mode)
    return found


pytestmark = pytest.mark.skipif(not modes(), reason="this machine has no sandbox")


@pytest.fixture(params=modes())
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert not list((tmp_path / "scratch").iterdir())
    assert not launchers(os.getpid())


def launchers(*parents: int) -> list[int]:
    """The launchers that are children of `parents`, and not of another test run beside this one."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path("/proc", pid, "cmdline").read_bytes()
            state, parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[:2]
            if b"jail.py" in command and state != "Z" and (int(parent) in parents or int(pid) in parents):
                found.append(int(pid))
    return found


def runs(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(code: str, mode: Mode, **limits: Any) -> Outcome:
    settings = {"stdin": "", "timeout": 2.0, "memory_mb": 512, "max_output": 65536, "max_processes": 16, **limits}
    return sandbox._run(textwrap.dedent(code), mode, **settings)


class TestOrdinaryPrograms:
    def test_a_program_reads_its_input_and_prints(self, mode: Mode) -> None:
        outcome = run("import sys\nprint(input()[::-1]); print('é', file=sys.stderr)", mode, stdin="abc\n")
        assert outcome == Outcome(True, 0, "cba\n", "é\n", "", None)

    def test_it_runs_as_main_with_exit_and_a_traceback_of_its_own(self, mode: Mode) -> None:
        assert run("if __name__ == '__main__':\n    exit(3)", mode).exit == 3
        outcome = run("x = 1\n1 / 0", mode)
        assert (outcome.ok, outcome.exit, outcome.reason) == (False, 1, "exit status 1")
        assert "ZeroDivisionError" in outcome.stderr
        assert "jail.py" not in outcome.stderr
        assert "SyntaxError" in run("def f(:", mode).stderr

    def test_classes_dataclasses_threads_and_the_standard_library_work(self, mode: Mode) -> None:
        code = """
            import asyncio, collections, dataclasses, json, pickle, random, re, ssl, sqlite3, tempfile, threading
            @dataclasses.dataclass
            class Point:
                x: int
            assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
            with tempfile.NamedTemporaryFile("w+") as file:
                file.write("1"); file.seek(0); assert file.read() == "1"
            t = threading.Thread(target=lambda: print("thread")); t.start(); t.join()
            async def main(): await asyncio.sleep(0); print("async")
            asyncio.run(main())
        """
        outcome = run(code, mode)
        assert (outcome.stdout, outcome.reason) == ("thread\nasync\n", None), outcome.stderr

    def test_its_sets_are_in_the_same_order_each_time(self, mode: Mode) -> None:
        assert len({run("print({str(i) for i in range(20)})", mode).stdout for _ in range(3)}) == 1

    def test_several_at_once_do_not_mix(self, mode: Mode) -> None:
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda i: run(f"import time; time.sleep(.1); print({i})", mode), range(24)))
        assert [o.stdout for o in outcomes] == [f"{i}\n" for i in range(24)]

    def test_a_large_program_and_input_arrive_whole(self, mode: Mode) -> None:
        code = "import sys\nx = '" + "a" * 3_000_000 + "'\nprint(len(x), len(sys.stdin.read()))"
        assert run(code, mode, stdin="b" * 2_000_000).stdout == "3000000 2000000\n"

    def test_a_subprocess_of_a_namespace_works(self) -> None:
        if "namespaces" not in modes():
            pytest.skip("no namespaces here")
        code = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', 'print(5)']).decode())"
        assert run(code, "namespaces").stdout.strip() == "5"


class TestTime:
    def test_an_endless_loop_ends_at_the_timeout(self, mode: Mode) -> None:
        outcome = run("print('on', flush=True)\nwhile True: pass", mode, timeout=1)
        assert (outcome.ok, outcome.reason, outcome.stdout) == (False, "timed out", "on\n")

    def test_signals_that_are_ignored_and_closed_descriptors_change_nothing(self, mode: Mode) -> None:
        code = """
            import os, signal, time
            for n in range(1, 64):
                try: signal.signal(n, signal.SIG_IGN)
                except (OSError, ValueError): pass
            os.closerange(0, 100)
            while True: time.sleep(1)
        """
        assert run(code, mode, timeout=1).reason == "timed out"


class TestProcesses:
    @pytest.mark.parametrize(
        "bomb",
        [
            "while True: os.fork()",
            "while True:\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)",
            "while True:\n    try: os.fork()\n    except OSError: pass",
        ],
        ids=["plain", "daemons", "stubborn"],
    )
    def test_a_fork_bomb_is_held_and_swept_away(self, bomb: str, mode: Mode) -> None:
        outcome = run(f"import os\n{bomb}", mode, timeout=1)
        assert not outcome.ok
        subprocess.run(["true"], check=True)  # this user can still start processes

    def test_a_daemon_dies_with_the_program(self, mode: Mode) -> None:
        code = """
            import os, time
            if os.fork() == 0:
                os.setsid()
                if os.fork(): os._exit(0)
                while True: time.sleep(0.1)
            print("done")
        """
        outcome = run(code, mode, timeout=5)
        assert outcome.ok == (mode in ("bubblewrap", "namespaces"))  # elsewhere the fork fails

    @pytest.mark.parametrize("target", ["os.getppid()", "-1", "0", "1"])
    def test_killing_others_fails_and_the_program_learns_it(self, target: str, mode: Mode) -> None:
        outcome = run(f"import os\nos.kill({target}, 9)", mode)
        assert outcome.exit in (1, -9)  # an exception; or itself, as its own process group
        assert not outcome.ok

    def test_killing_by_number_reaches_nobody(self, mode: Mode) -> None:
        with subprocess.Popen(["sleep", "60"]) as bystander:
            run(
                f"import os\nfor n in ({bystander.pid}, {os.getpid()}):\n    try: os.kill(n, 9)\n    except OSError: pass",
                mode,
            )
            assert bystander.poll() is None
            bystander.kill()

    def test_a_program_may_abort_itself(self, mode: Mode) -> None:
        assert run("import os; os.abort()", mode).exit == -signal.SIGABRT

    def test_it_dies_with_the_process_that_runs_it(self, mode: Mode, tmp_path: Path) -> None:
        code = f"""
            import sys; sys.path.insert(0, {str(REPOSITORY)!r})
            from judges.verify import sandbox
            sandbox._run("while True: pass", {mode!r}, "", 60, 512, 1000, 4)
        """
        parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
        depth = {"bubblewrap": 4, "namespaces": 3, "landlock": 2}[mode]  # launcher, bubblewrap, init, program
        wait_for(lambda: len(tree_below(parent.pid)) == depth)
        tree = tree_below(parent.pid)
        parent.kill()
        parent.wait()
        wait_for(lambda: not any(map(runs, tree)))
        wait_for(lambda: not os.listdir(tempfile.gettempdir()))


def tree_below(pid: int) -> set[int]:
    below = set(launchers(pid))
    while more := set(launchers(*below)) - below:
        below |= more
    return below


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestFiles:
    @pytest.mark.parametrize("place", ["/tmp", "/var/tmp", "/dev/shm", str(Path.home()), str(REPOSITORY), "/usr", "/"])
    def test_nothing_is_written_outside(self, place: str, mode: Mode) -> None:
        target = Path(place, "iterdpo-escape")
        outcome = run(f"open({str(target)!r}, 'w').write('x')", mode)
        assert not target.exists()
        assert outcome.ok == (
            place == "/dev/shm" and mode in ("bubblewrap", "namespaces")
        )  # which is the scratch folder there

    def test_links_out_of_the_folder_lead_nowhere(self, mode: Mode, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("token")
        code = f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nprint(open('link/secret').read())"
        outcome = run(code, mode)
        assert not outcome.ok
        assert "token" not in outcome.stdout
        assert not run(f"import os\nos.truncate({str(tmp_path / 'secret')!r}, 0)", mode).ok
        assert not run(f"import os\nos.chmod({str(tmp_path / 'secret')!r}, 0)", mode).ok
        assert not run(f"import os\nos.remove({str(tmp_path / 'secret')!r})", mode).ok
        assert (tmp_path / "secret").read_text() == "token"

    def test_the_home_directory_and_other_processes_cannot_be_read(self, mode: Mode) -> None:
        paths = [str(Path.home()), str(REPOSITORY / "pyproject.toml"), "/proc/1/environ", "/proc/self/environ"]
        for path in [*paths, "/etc/shadow", "/etc/passwd"]:
            read = f"import os\nprint(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read())"
            outcome = run(read, mode)
            # Folders on the way to the Python installation may be there; they show that way alone.
            assert not outcome.ok or outcome.stdout.count("'") <= 2, (path, outcome)

    def test_the_environment_is_empty(self, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("API_KEY", "hunter2")
        assert "hunter2" not in run("import os; print(os.environ, os.environb)", mode).stdout

    def test_only_its_four_descriptors_are_open(self, mode: Mode, tmp_path: Path) -> None:
        with open(tmp_path / "open", "w") as file:
            os.set_inheritable(file.fileno(), True)
            code = """
                import os
                for n in range(1000):
                    try: os.fstat(n); print(n)
                    except OSError: pass
            """
            assert run(code, mode).stdout.split() == ["0", "1", "2", "3"]

    def test_a_large_file_stops_at_the_limit_and_is_gone_afterwards(self, mode: Mode) -> None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        outcome = run("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", mode, timeout=5)
        assert "File too large" in outcome.stderr or "No space left" in outcome.stderr
        assert free - shutil.disk_usage(tempfile.gettempdir()).free < 256 << 20

    def test_a_name_that_is_too_deep_to_walk_is_removed(self, mode: Mode) -> None:
        """The fixture `_nothing_is_left` has the assertion."""
        run("import os\nfor _ in range(1200):\n    os.mkdir('d'); os.chdir('d')", mode)


class TestOutput:
    def test_endless_output_is_cut_and_the_program_killed(self, mode: Mode) -> None:
        outcome = run("import sys\nwhile True: sys.stdout.write('x' * 65536)", mode, timeout=20, max_output=1000)
        assert outcome.reason == "more than 1000 bytes of stdout"
        assert outcome.stdout == "x" * 1000

    def test_the_other_streams_are_held_to_it_too(self, mode: Mode) -> None:
        assert run("import os\nwhile True: os.write(2, b'x' * 9999)", mode).reason == "more than 65536 bytes of stderr"
        assert run("import os\nwhile True: os.write(3, b'x' * 9999)", mode).reason == "more than 65536 bytes of report"

    def test_output_right_before_the_end_is_not_lost(self, mode: Mode) -> None:
        assert {len(run("print('x' * 60000, end='')", mode).stdout) for _ in range(10)} == {60000}


class TestMemory:
    def test_a_hog_gets_an_error(self, mode: Mode) -> None:
        outcome = run("x = []\nwhile True: x.append(bytearray(1 << 20))", mode, timeout=10, memory_mb=200)
        assert "MemoryError" in outcome.stderr or outcome.reason == "more than 200 MB of memory and files"

    def test_processes_of_a_sandbox_share_one_limit(self, mode: Mode) -> None:
        if mode == "landlock":
            pytest.skip("one process there")
        code = "import os, time\nfor _ in range(6):\n    if not os.fork():\n        x = bytearray(60 << 20)\n        time.sleep(9)\ntime.sleep(9)"
        outcome = run(code, mode, timeout=8, memory_mb=200)
        assert outcome.reason == "more than 200 MB of memory and files"

    def test_files_of_a_sandbox_share_it_too(self, mode: Mode) -> None:
        code = "import time\nfor i in range(9):\n    open(str(i), 'wb').write(bytes(30 << 20))\ntime.sleep(9)"
        outcome = run(code, mode, timeout=8, memory_mb=200)
        assert outcome.reason == "more than 200 MB of memory and files" or "No space left" in outcome.stderr

    def test_memory_that_no_process_shows_is_not_to_be_had(self, mode: Mode) -> None:
        for way in ("os.memfd_create('x')", "mmap.mmap(-1, 1 << 20)"):
            assert "PermissionError" in run(f"import mmap, os\n{way}", mode).stderr
        assert "Error" in run("open('/dev/zero', 'rb')", mode).stderr
        files = "import mmap\nf = open('x', 'w+b')\nf.truncate(4096)\nmmap.mmap(f.fileno(), 4096)[0] = 1\nmmap.mmap(-1, 4096, mmap.MAP_PRIVATE)"
        assert run(files, mode).ok

    def test_threads_are_counted_too(self, mode: Mode) -> None:
        code = "import threading, time\nfor _ in range(60): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\ntime.sleep(9)"
        outcome = run(code, mode, timeout=8)
        assert "can't start new thread" in outcome.stderr or outcome.reason == "more than 16 processes and threads"


class TestNetwork:
    def test_no_connection_arrives_over_tcp_udp_or_unix_sockets(self, mode: Mode, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as abstract:
                unix.bind(str(tmp_path / "socket"))
                abstract.bind("\0iterdpo-test")
                for server in (unix, abstract):
                    server.listen()
                code = f"""
                    import socket
                    def attempt(f):
                        try: print("reached", f())
                        except OSError as error: print("refused", error)
                    attempt(lambda: socket.create_connection(("127.0.0.1", {tcp.getsockname()[1]}), 1))
                    attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", {udp.getsockname()}))
                    attempt(lambda: socket.socket(socket.AF_UNIX).connect({str(tmp_path / "socket")!r}))
                    attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0iterdpo-test"))
                    attempt(lambda: socket.getaddrinfo("example.org", 80))
                """
                outcome = run(code, mode, timeout=8)
                # Under bubblewrap its own loopback takes the datagram; the servers receive nothing.
                assert outcome.stdout.count("refused [") == (4 if mode == "bubblewrap" else 5), outcome
                for server in (tcp, udp, unix, abstract):
                    server.settimeout(0.05)
                    with pytest.raises(TimeoutError):
                        server.recv(1) if server is udp else server.accept()

    @pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK])
    def test_no_datagram_leaves_from_one_of_a_pair_of_sockets(self, kind: int, mode: Mode, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(str(tmp_path / "socket"))
            (tmp_path / "socket").chmod(0o777)
            server.setblocking(False)
            pair = f"import socket\nsocket.socketpair(socket.AF_UNIX, {kind:d})[0]"
            assert not run(f"{pair}.sendto(b'x', {str(tmp_path / 'socket')!r})", mode).ok
            with pytest.raises(BlockingIOError):
                server.recv(1)


class TestKernel:
    def test_a_program_stays_visible_and_ends_with_its_launcher(self, mode: Mode) -> None:
        code = "import ctypes\nprctl = ctypes.CDLL(None).prctl\nprint(prctl(1, 0), prctl(4, 0), prctl(15, b'name'))"
        assert run(code, mode).stdout == "-1 -1 0\n"

    @pytest.mark.parametrize(
        "call", ["fcntl.fcntl(0, 8, 1)", "fcntl.fcntl(0, 10, 9)", "fcntl.ioctl(s, 0x8901, b'1234')"]
    )
    def test_no_file_signals_a_process_of_its_choice(self, call: str) -> None:
        if "landlock" not in modes():
            pytest.skip("no Landlock here")
        code = f"import fcntl, socket\ns, other = socket.socketpair()\n{call}"
        assert "PermissionError" in run(code, "landlock").stderr

    def test_no_namespace_mount_or_trace_within(self, mode: Mode) -> None:
        code = """
            import ctypes, os
            libc = ctypes.CDLL(None, use_errno=True)
            print(libc.unshare(0x10000000), libc.mount(b"none", b"/", b"tmpfs", 0, 0), libc.ptrace(16, 1, 0, 0),
                  libc.syscall(425, 1, 0), libc.syscall(321, 0, 0, 0))
        """
        assert run(code, mode).stdout.split() == ["-1"] * 5

    def test_memory_of_the_kernel_is_not_to_be_had(self, mode: Mode) -> None:
        code = """
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            for number in (444, 445, 446, 467):
                print(libc.syscall(number, 0, 0, 0), ctypes.get_errno())
        """
        assert run(code, mode).stdout.splitlines() == ["-1 1"] * 4

    def test_calls_that_are_newer_than_the_filter_do_not_exist(self) -> None:
        if sandbox_mode()[0] is None:
            pytest.skip("no sandbox here")
        code = """
            import ctypes
            from judges.verify import jail
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(38, 1, 0, 0, 0)  # no new privileges
            jail.NEWEST = 438
            print(libc.syscall(439, -100, b"/", 0, 0))  # faccessat2
            jail._filter_calls(alone=False)
            print(libc.syscall(439, -100, b"/", 0, 0), ctypes.get_errno())
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4])
        assert done.stdout == "0\n-1 38\n", done.stderr

    @pytest.mark.parametrize("number", [30, 31, 65, 66, 69, 70, 71, 253, 294, 463, 466, 469])
    def test_what_landlock_leaves_open_of_others_is_denied(self, number: int) -> None:
        if "landlock" not in modes() or os.uname().machine != "x86_64":
            pytest.skip("no Landlock here, or other numbers")
        code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.syscall({number}, 0, 0, 0), ctypes.get_errno())"
        assert run(code, "landlock").stdout == "-1 1\n"

    def test_a_folder_without_permissions_is_removed_too(self) -> None:
        if "landlock" not in modes():
            pytest.skip("no Landlock here")
        made = run("import os\nos.umask(0o477)\nos.mkdir('x')\nprint(os.getcwd())", "landlock").stdout.strip()
        assert made
        assert not Path(made).exists()


def test_bubblewrap_is_used_if_it_works() -> None:
    bwrap = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "/bin/true"]
    if not shutil.which("bwrap") or subprocess.run(bwrap, capture_output=True).returncode:
        pytest.skip("no bubblewrap here")
    assert sandbox_mode()[0] == "bubblewrap"


class TestRefusal:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        sandbox_mode.cache_clear()
        yield
        sandbox_mode.cache_clear()

    def test_this_machine_has_no_problems(self) -> None:
        assert sandbox_problems() == []
        assert run_python("print(1)").stdout == "1\n"

    def test_a_machine_without_a_sandbox_is_refused_unless_accepted_by_name(self, monkeypatch: Any) -> None:
        real = sandbox._run

        def fail(code: str, mode: Mode, *args: Any) -> Outcome:
            if mode != "none":
                raise SandboxError("unshare: Operation not permitted")
            return real(code, mode, *args)

        monkeypatch.setattr(sandbox, "_run", fail)
        assert sandbox_problems() == [f"{m}: unshare: Operation not permitted" for m in sandbox.MODES]
        with pytest.raises(JudgeError, match="allow_unsandboxed: true"):
            run_python("print(1)")
        assert run_python("print(1)", allow_unsandboxed=True).stdout == "1\n"
        daemon = (
            "import os, time\npid = os.fork()\nif pid: print(pid)\nelse: os.setsid()\nwhile not pid: time.sleep(0.1)"
        )
        outcome = run_python(daemon, allow_unsandboxed=True)
        assert outcome.ok
        wait_for(lambda: not runs(int(outcome.stdout)))

    def test_a_launcher_that_cannot_start_is_the_sandboxs_failure(self, monkeypatch: Any, mode: Mode) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(SandboxError, match="ended immediately"):
            run("print(1)", mode)

    @pytest.mark.skipif(os.geteuid() != 0 or not os.access("/usr/bin/python3.11", os.X_OK), reason="needs root")
    def test_an_ordinary_user_has_both_kinds_too(self) -> None:
        code = """
            import contextlib, sys; sys.path.insert(0, sys.argv[1])
            from judges.verify import sandbox
            fork = "import os\\nwhile True: os.fork()"
            hidden = "import ctypes\\nwhile True: ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"
            for mode in sandbox.MODES:
                with contextlib.suppress(sandbox.SandboxError):
                    print(mode, sandbox._run("print(6 * 7)", mode, "", 5, 512, 1000, 4).stdout.strip())
                    print(sandbox._run(fork, mode, "", 1, 512, 1000, 4).ok)
                    print(sandbox._run(hidden, mode, "", 1, 512, 1000, 4).reason)
                    print(sandbox._run("import os; os.kill(os.getppid(), 9)", mode, "", 1, 512, 1000, 4).exit)
        """
        # Outside the repository's virtual environment, which this user may not be able to reach.
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3.11", "-c"]
        copy = Path(tempfile.mkdtemp(prefix="iterdpo-user-", dir="/tmp"))
        try:
            for package in ("judges", "judges/verify", "iterdpo"):
                (copy / package).mkdir()
                (copy / package / "__init__.py").touch()
            for file in ("judges/verify/sandbox.py", "judges/verify/jail.py", "iterdpo/errors.py"):
                shutil.copy(REPOSITORY / file, copy / file)
            copy.chmod(0o755)
            (copy / "tmp").mkdir()
            (copy / "tmp").chmod(0o777)
            command = [*user, textwrap.dedent(code), str(copy)]
            environment = {**os.environ, "TMPDIR": str(copy / "tmp")}
            done = subprocess.run(command, stdout=-1, text=True, timeout=60, check=True, env=environment)
        finally:
            shutil.rmtree(copy)
        assert done.stdout.split() == [word for mode in modes() for word in (mode, "42", "False", "timed", "out", "1")]


def test_threads_of_the_caller_may_end_without_harm(mode: Mode) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run("print(1)", mode)))
    thread.start()
    thread.join()
    assert outcomes[0].stdout == "1\n"

"""Runs untrusted Python programs so that this machine and this process go on unharmed, whatever the programs do.

`run_python(code)` runs a program as `python program.py` would, with the standard library alone, and returns what it
printed and how it ended. On Linux each program is limited in:

- files: it sees the Python installation, /usr and /lib, read-only, and a scratch folder (its working directory, HOME
  and TMPDIR) that is deleted afterwards. There is no other file: no home directory, no /tmp, no /proc.
- network: none; with bubblewrap, a loopback that it shares with nothing.
- processes: it neither sees nor can signal any but its own. When it ends, or its time does, or this process does,
  everything that it started is killed.
- environment: empty. No descriptor but stdin, stdout, stderr, and REPORT is open.
- limits: wall time, CPU time, memory of all of its processes and files together, number of processes and of files, and
  what it may print.

Bubblewrap does this if it is installed and works. Otherwise `judges.verify.jail` makes the namespaces itself. If a
container forbids them, Landlock (Linux 6.2) and a system call filter are used: then a program cannot start processes,
nor change modes of files, and it may know that other processes exist. If nothing works, `run_python` refuses, unless
`allow_unsandboxed`. docs/sandbox.md has the threat model.

The kernel enforces this, not a virtual machine: a program that exploits a bug of the kernel gets through.

The jail is written by hand because bubblewrap is not installed everywhere and needs namespaces, which many containers
forbid.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import math
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from iterdpo.errors import JudgeError

Mode = Literal["bubblewrap", "namespaces", "landlock", "none"]
MODES: tuple[Mode, ...] = ("bubblewrap", "namespaces", "landlock")  # the strongest first

REPORT = 3
"""The descriptor that a program's test harness may write `Outcome.report` to."""

PEER_READING, PEER_WRITING = 4, 5
"""The descriptors by which the two programs of `run_pair` reach each other."""

TIMED_OUT = "timed out"
START_SECONDS = 60.0  # for the launcher, on a machine with much else to do; the program's own time starts after it


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `Outcome(ok=False, exit=-9, stdout="", stderr="", report="", reason="timed out")`.

    `exit` is its status, or -N if signal N ended it. `ok` is an exit with status 0 within the limits; `reason` says
    what else happened. What it printed is cut at `max_output` bytes.
    """

    ok: bool
    exit: int
    stdout: str
    stderr: str
    report: str
    reason: str | None


class SandboxError(RuntimeError):
    """The sandbox itself failed, so that nothing is known about the program."""


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout: float = 10.0,
    memory_mb: int = 512,
    max_output: int = 64 * 1024,
    max_processes: int = 16,
    allow_unsandboxed: bool = False,
) -> Outcome:
    """Run `code` in the sandbox. Blocks; call it from several threads to run several at once.

    Args:
        code: the program.
        stdin: what it reads from its standard input.
        timeout: seconds of wall time, from the moment it starts.
        memory_mb: memory of all of its processes and files together, and address space of each process.
        max_output: bytes of stdout, of stderr and of the report each; it is killed if it writes more.
        max_processes: processes and threads at once, its own included.
        allow_unsandboxed: run it even if there is no sandbox, as a child process of this user with limits alone.

    Raises:
        JudgeError: this machine offers no sandbox.
        SandboxError: the sandbox could not be set up, this once.
    """
    mode = sandbox_mode()[0]
    if mode is None and not allow_unsandboxed:
        require_sandbox()
    return _run(code, mode or "none", stdin, timeout, memory_mb, max_output, max_processes)


def run_pair(
    program: str,
    tests: str,
    *,
    timeout: float = 10.0,
    memory_mb: int = 512,
    max_output: int = 64 * 1024,
    max_report: int = 64 * 1024,
    max_processes: int = 16,
    allow_unsandboxed: bool = False,
) -> Outcome:
    """Run two programs at once, each in a sandbox of its own, with nothing in common but a pair of pipes.

    The outcome is that of `tests`, with its report, and is ok only if both ended well. `tests` has the limits of
    `run_python`; its report may have `max_report` bytes.

    Raises:
        as `run_python` does.
    """
    mode = sandbox_mode()[0]
    if mode is None and not allow_unsandboxed:
        require_sandbox()
    to_program, from_program = os.pipe(), os.pipe()
    ends = (to_program[0], from_program[1]), (from_program[0], to_program[1])

    def run(code: str, own: tuple[int, int], output: int) -> Outcome:
        return _run(code, mode or "none", "", timeout, memory_mb, output, max_processes, peer=own)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, program, ends[0], max_output)
        outcome = run(tests, ends[1], max_report)
        other = running.result()
    return outcome if other.ok else replace(outcome, ok=False, exit=other.exit, reason=other.reason)


def require_sandbox() -> None:
    """Refuse a machine without a sandbox.

    Raises:
        JudgeError: naming what it lacks, and what to change.
    """
    if problems := sandbox_problems():
        container = "in a container: --cap-add SYS_ADMIN with --security-opt seccomp=unconfined"
        remedy = f"Allow user namespaces ({container}), or run on Linux 6.2 or newer with Landlock"
        last = "Or let completions run as this user, with all its permissions: allow_unsandboxed: true"
        wrong = f"this machine cannot confine an untrusted program ({'; '.join(problems)})"
        raise JudgeError(f"{wrong}. {remedy}. {last}")


def sandbox_problems() -> list[str]:
    """Why there is no sandbox on this machine, layer by layer; empty if there is one."""
    mode, problems = sandbox_mode()
    return [] if mode else problems


@functools.cache
def sandbox_mode() -> tuple[Mode | None, list[str]]:
    """The strongest sandbox that runs a program here, found by running one, and why each stronger one does not."""
    if sys.platform != "linux":
        return None, ["the sandbox needs Linux"]
    problems: list[str] = []
    for mode in MODES:
        try:
            outcome = _run("import json; print(6 * 7)", mode, "", START_SECONDS, 512, 1024, 16)
            if outcome.stdout == "42\n":
                return mode, problems
            problems.append(f"{mode}: {outcome.reason}: {outcome.stderr[-300:]}")
        except SandboxError as error:
            problems.append(f"{mode}: {error}")
    return None, problems


def _run(
    code: str,
    mode: Mode,
    stdin: str,
    timeout: float,
    memory_mb: int,
    max_output: int,
    max_processes: int,
    *,
    peer: tuple[()] | tuple[int, int] = (),
) -> Outcome:
    """Closes its copies of the descriptors `peer`, which the program has as PEER_READING and PEER_WRITING."""
    if mode == "bubblewrap" and not shutil.which("bwrap"):
        raise SandboxError("bwrap is not installed")
    installation = (sys.base_prefix, sys.base_exec_prefix, str(Path(os.__file__).parent))
    request: dict[str, Any] = {
        "code": code,
        "mode": mode,
        "stdin": stdin.encode(errors="replace"),
        "timeout": math.ceil(timeout),
        "memory": memory_mb << 20,
        "processes": max_processes,
        "readable": sorted({os.path.realpath(path) for path in installation}, key=len),
        "scratch": None if mode in ("bubblewrap", "namespaces") else tempfile.mkdtemp(prefix="iterdpo-sandbox-"),
        "bubblewrap": shutil.which("bwrap"),
    }
    # The real interpreter, not a virtual environment's link to it, which the program could not see. Its hashes are
    # seeded so that a program has the same sets, and a completion the same score, each time.
    interpreter = [os.path.realpath(sys.executable), "-s", "-P", "-S", "-X", "utf8"]
    (status, status_end), (report, report_end) = os.pipe(), os.pipe()
    with contextlib.ExitStack() as opened:
        for descriptor in (status, report):
            opened.callback(os.close, descriptor)
        try:
            launcher = subprocess.Popen(
                [*interpreter, str(Path(__file__).with_name("jail.py")), *map(str, (status_end, report_end, *peer))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(status_end, report_end, *peer),
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        finally:
            for descriptor in (status_end, report_end, *peer):
                os.close(descriptor)
        pipes = (launcher.stdin, launcher.stdout, launcher.stderr)
        lifeline, out, err = (opened.enter_context(pipe) for pipe in pipes if pipe)
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended at once; its stderr says why
                rest = memoryview(marshal.dumps(request))
                while rest:
                    rest = rest[lifeline.write(rest) :]
            names = {status: "status", report: "report", out.fileno(): "stdout", err.fileno(): "stderr"}
            streams, reason = _follow(names, timeout, max_output)
        finally:
            lifeline.close()  # the launcher kills what still runs, and ends
            try:
                launcher.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
            if request["scratch"]:  # if the launcher did not get to it
                shutil.rmtree(request["scratch"], ignore_errors=True)
    return _outcome(streams, reason, max_output)


def _follow(names: dict[int, str], timeout: float, max_output: int) -> tuple[dict[str, bytearray], str | None]:
    """What the descriptors bring until the status ends, and why reading stopped earlier, if it did."""
    streams = {name: bytearray() for name in names.values()}
    deadline, started, ended = time.monotonic() + START_SECONDS, False, False
    with selectors.DefaultSelector() as selector:
        for descriptor in names:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while not ended:
            left = deadline - time.monotonic()
            if left <= 0:
                return streams, TIMED_OUT if started else "the sandbox did not start in time"
            for key, _ in selector.select(left):
                stream = streams[names[key.fd]]
                data = _read(key.fd)
                if data == b"":
                    selector.unregister(key.fd)
                    ended = ended or names[key.fd] == "status"
                stream += data or b""
                if len(stream) > max_output and names[key.fd] != "status":
                    return streams, f"more than {max_output} bytes of {names[key.fd]}"
            if not started and streams["status"].startswith(b"started"):
                deadline, started = time.monotonic() + timeout, True
    for descriptor, name in names.items():  # what was written before the end, and has not been read
        while (name == "status" or len(streams[name]) <= max_output) and (data := _read(descriptor)):
            streams[name] += data
        if len(streams[name]) > max_output and name != "status":
            return streams, f"more than {max_output} bytes of {name}"
    return streams, None


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return None


def _outcome(streams: dict[str, bytearray], reason: str | None, max_output: int) -> Outcome:
    kept = (bytes(streams[name][:max_output]) for name in ("stdout", "stderr", "report"))
    stdout, stderr, report = (data.decode(errors="replace") for data in kept)
    first, *rest = streams["status"].decode(errors="replace").splitlines() or [""]
    if first.startswith("problem "):
        raise SandboxError(first.removeprefix("problem "))
    if first != "started":
        raise SandboxError(reason or f"the launcher ended immediately: {stderr[-300:].strip() or 'it printed nothing'}")
    if reason:
        return Outcome(False, -9, stdout, stderr, report, reason)
    if not rest or rest[0].startswith("problem "):
        raise SandboxError("the sandbox was killed from outside")
    if rest[0].startswith("limit "):
        return Outcome(False, -9, stdout, stderr, report, rest[0].removeprefix("limit "))
    code = int(rest[0].removeprefix("exit "))
    reason = None if code == 0 else f"exit status {code}" if code > 0 else f"signal {-code}"
    return Outcome(code == 0, code, stdout, stderr, report, reason)

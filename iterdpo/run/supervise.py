"""Child processes that die with their parent, whatever happens to it.

`start(command)` runs `command` under a small guard process in a separate session:

    parent --(pipe)--> guard --> command --> whatever it starts

Only the parent holds the pipe's writing end. When the parent ends, by SIGKILL too, the guard reads end-of-file and
kills everything below it, and itself. Processes that the command leaves running when it ends are killed too. By hand, since no library does this.

Run as `python -m iterdpo.run.supervise FD -- COMMAND ...`; imports only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


class Child:
    """A supervised process. `process.stdin` and `process.stdout` are its pipes if they were asked for."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, log: Path) -> None:
        self.process, self.log = process, log
        self._lifeline: int | None = lifeline

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; 128 + N if signal N ended the command, negative if `kill` did."""
        return self.process.wait(timeout)

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        """End it and everything it started, and wait until it is gone. Safe to call twice."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        self.process.wait()

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log, for an error message."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def start(
    command: Sequence[str],
    *,
    log: Path,
    env: dict[str, str] | None = None,
    pipes: bool = False,
    reserved: Sequence[int] = (),
) -> Child:
    """Start `command` under guard. Its stderr (and its stdout, unless `pipes`) is appended to `log`.

    `pipes`: its stdin and stdout are pipes to the caller. `reserved`: descriptors from `devices.reserved_gpus`, held while it lives.
    """
    read_end, write_end = os.pipe()
    guard = [sys.executable, "-S", "-E", "-P", str(Path(__file__)), str(read_end), "--", *command]
    with open(log, "ab") as handle:
        process = subprocess.Popen(
            guard,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else handle,
            stderr=handle,
            env=env,
            pass_fds=(read_end, *reserved),
            start_new_session=True,
        )
    os.close(read_end)
    return Child(process, write_end, log)


def end_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which started it by other means than `start`, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _guard(arguments: list[str]) -> int:
    lifeline, command = int(arguments[0]), arguments[2:]
    os.set_inheritable(lifeline, False)
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent below becomes the guard's child, in whatever session

    def watch() -> None:
        os.read(lifeline, 1)  # nobody writes: this returns when the parent is gone or lets go
        _kill_descendants()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    child = subprocess.Popen(command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    # The command owns the pipes now. Held here too, its reader would not see the end of file when it dies.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    status = child.wait()
    _kill_descendants()
    return status if status >= 0 else 128 - status


def _kill_descendants() -> None:
    """Kill what is below this process. Gives up after five seconds: a process that waits for a hung device stays."""
    deadline = time.monotonic() + 5
    while (running := _descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in running:
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _descendants(root: int) -> list[int]:
    """Processes below `root` that still run; zombies do not."""
    parents, zombies = {}, set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        parents[int(entry)] = int(parent)
        if state in (b"Z", b"X"):
            zombies.add(int(entry))
    below = {root}
    while found := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= found
    return sorted(below - zombies - {root})


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))

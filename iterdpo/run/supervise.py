"""Child processes that die with their parent, whatever happens to it.

`start(command)` runs `command` under a small guard process in a separate session:

    parent --(pipe)--> guard --> command --> whatever it starts

Only the parent holds the pipe's writing end. When the parent ends, by SIGKILL too, the guard reads end-of-file and
kills everything below it, and itself. Processes that the command leaves running when it ends are killed too. By hand,
since no library does this.

Every child is kept from what is not its own: the variables of a launcher around this process (a Slurm job, torchrun,
accelerate), which would make it wait for processes that are not there; the modules of the working directory; and the
variables that `withhold` names.

Run as `python -m iterdpo.run.supervise FD -- COMMAND ...`; imports only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>

LAUNCHERS = re.compile(
    r"((LOCAL|GLOBAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|"
    r"(MASTER|SLURM|SLURMD|SRUN|ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|TORCHELASTIC|PET|PMI|PMIX|OMPI|MPI|MV2)_\w+|"
    r"VLLM_(API_KEY|DP_\w+)"
)
"""Variables that a launcher sets for its own processes, and those that would do the same to a vLLM server."""

REASON = "iterdpo: failed: "
"""How a child begins the line of its log that says why it ends; see `Child.reason`."""

RAISED = re.compile(r"(?:^|[\]:)] )((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failed|NotFound)(?:: .*)?)$")
SECOND_HAND = re.compile(r"CalledProcessError|ChildFailedError|See root cause above|SystemExit")
SIGNALLED = re.compile(r"\b(?:Signals\.|Signal \d+ \()(SIG[A-Z]+)")

VALIDATION = re.compile(r"\d+ validation errors? for [^:]*$")

_withheld: set[str] = set()


def withhold(*names: str) -> None:
    """Keep these environment variables from every child that is started from now on, such as a judge's key."""
    _withheld.update(names)


class Child:
    """A supervised process. `process.stdin` and `process.stdout` are its pipes if they were asked for."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, log: Path, begun: int) -> None:
        self.process, self.log, self._begun = process, log, begun
        self._lifeline: int | None = lifeline
        self._silent: float | None = None  # seconds, if it was ended because of them
        self._ending = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; 128 + N if signal N ended the command, negative if `kill` did."""
        return self.process.wait(timeout)

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        """End it and everything it started, and wait until it is gone. Safe to call twice, by two threads at once too."""
        with self._ending:  # closed twice, the descriptor would be another file's by then
            lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)  # a guard that was stopped goes on, and does its work
        self.process.wait()

    @property
    def lost(self) -> bool:
        """Whether it hung, or was ended by a signal. If one of its processes failed, SIGTERM ended only the others."""
        signals = set(self._signals())
        if any(line.startswith(REASON) for line in self.said()):
            signals.discard("SIGTERM")
        return self._silent is not None or bool(signals)

    @contextlib.contextmanager
    def watched(self, seconds: float | None) -> Iterator[Callable[[], None]]:
        """End it if the function that this yields is not called for so many seconds; None: wait for ever."""
        if seconds is None:
            yield lambda: None
            return
        over, last = threading.Event(), time.monotonic()

        def seen() -> None:
            nonlocal last
            last = time.monotonic()

        def watch() -> None:
            while not over.wait(max(0.0, last + seconds - time.monotonic())):
                if time.monotonic() >= last + seconds:
                    self.end_silent(seconds)
                    return

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            over.set()

    def end_silent(self, seconds: float) -> None:
        """End it because it has shown no sign of work for so long."""
        self._silent = seconds
        self.kill()

    def _signals(self) -> list[str]:
        """Names of the signals that ended it, or what it had started, by its log and its status."""
        status = self.poll()
        found = [m[1] for line in self.said() if (m := SIGNALLED.search(line))]
        if status is not None and (status < 0 or 128 < status < 160):
            found.append(signal.Signals(-status if status < 0 else status - 128).name)
        return found

    def said(self) -> list[str]:
        """The lines of its log since it was started, the last of many."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(self._begun, log.seek(0, os.SEEK_END) - (4 << 20)))
                return log.read().decode(errors="replace").splitlines()
        except OSError:
            return []

    def reason(self, longest: int = 500) -> str:
        """Why it ended, on one line, from its log and its exit status: `RuntimeError: step 3: the loss is not finite`."""
        if self._silent is not None:
            return f"no sign of work for {self._silent:g} seconds, so it was ended"
        lines, status = [line.strip() for line in self.said() if line.strip()], self.poll()
        own = [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]
        raised = [
            (number, m[1])
            for number, line in enumerate(lines, 1)
            if (m := RAISED.search(line)) and not SECOND_HAND.search(line)
        ]
        signals = self._signals()
        if own or (raised and not signals):
            reason = own[0] if own else raised[-1][1] + _details(raised[-1][1], lines[raised[-1][0] :])
        elif signals:
            short = ", as Linux does if memory is short" if signals[-1] == "SIGKILL" else ""
            reason = f"it was ended by {signals[-1]}{short}"
        else:
            reason = lines[-1] if lines else f"it ended with status {status} and said nothing"
        return reason if len(reason) <= longest else reason[: longest - 1] + "…"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def _details(raised: str, following: Sequence[str]) -> str:
    """The first message of an error of pydantic, which is on the lines after it, the place of the value first."""
    if VALIDATION.search(raised):
        for number, line in enumerate(following[:3], 1):
            if " [type=" in line:
                return ": " + ": ".join([*following[: number - 1], line.partition(" [type=")[0]])
    return ""


def start(
    command: Sequence[str],
    *,
    log: Path,
    env: dict[str, str] | None = None,
    pipes: bool = False,
    reserved: Sequence[int] = (),
) -> Child:
    """Start `command` under guard. Its stderr (and its stdout, unless `pipes`) is appended to `log`.

    `env`: its environment, by default this process's; what `environment` leaves out is left out of either. `pipes`: its
    stdin and stdout are pipes to the caller. `reserved`: descriptors of
    `devices.Turns`, open while it lives.
    """
    read_end, write_end = os.pipe()
    guard = [sys.executable, "-S", "-E", "-P", str(Path(__file__)), str(read_end), "--", *command]
    with open(log, "ab") as handle:
        begun = handle.tell()
        process = subprocess.Popen(
            guard,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else handle,
            stderr=handle,
            env=environment(os.environ if env is None else env),
            pass_fds=(read_end, *reserved),
            start_new_session=True,
        )
    os.close(read_end)
    return Child(process, write_end, log, begun)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` as a child gets them: see the module's docstring."""
    kept = {k: v for k, v in variables.items() if k not in _withheld and not LAUNCHERS.fullmatch(k)}
    if path := kept.pop("PYTHONPATH", None):  # an empty entry, as a colon too many leaves, is the working directory
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, path.split(os.pathsep)))
    return kept | {"PYTHONSAFEPATH": "1"}


def end_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which started it by other means than `start`, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), signal.SIGKILL)


@functools.cache  # once a process
def end_soon(seconds: float = 4.0) -> None:
    """Let SIGINT and SIGTERM end this process after `seconds` at the latest, whatever their handlers wait for.

    They may have interrupted code that held a lock, or wait for threads that wait for a server. The guards of its children
    notice the end. Does nothing outside the main thread, where Python lets nobody ask for signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Python writes the number of each signal here

    def watch() -> None:
        while (number := os.read(reader, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
            pass
        time.sleep(seconds)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def _guard(arguments: list[str]) -> int:
    lifeline, command = int(arguments[0]), arguments[2:]
    os.set_inheritable(lifeline, False)
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # a guard that was stopped goes on when its parent ends
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

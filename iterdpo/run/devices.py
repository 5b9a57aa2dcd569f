"""The GPUs of this machine, visible and shared in turns by a user's runs, and its ports for servers.

A run has its GPUs for the time of a stage, by an flock for each. Each guard of `iterdpo.run.supervise` inherits it, so
that if the run is killed, a GPU stays locked until the last process that may use it has ended.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from iterdpo.errors import ConfigError
from iterdpo.run import disk
from iterdpo.run.folder import own_folder


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that a child will see (`["0", "1"]`, or UUIDs), without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1", "NoDevFiles")]
    return [str(number) for number in range(_installed())]


def check_devices(wanted: int, key: str) -> None:
    """Refuse a setting `key` that wants more devices than there are: GPUs, or without one the machine's cores.

    Raises:
        ConfigError: naming the key, and how many there are.
    """
    chosen, installed = visible_gpus(), _installed()
    missing = [name for name in chosen if (int(name) >= installed if name.isdecimal() else not installed)]
    if missing and not Path("/dev/dxg").exists():  # WSL's GPUs are found nowhere
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES names GPU {missing[0]}, but this machine has {installed}, numbered from 0; correct or "
            "unset it"
        )
    there, kind = (len(set(chosen)), "GPU") if chosen else (os.cpu_count() or 1, "core")
    if wanted > there:
        kinds = f"{there} {kind}{'s' * (there != 1)}"
        raise ConfigError(f"{key} = {wanted}: more than the {kinds} of this machine; lower it")


def _installed() -> int:
    """NVIDIA GPUs of this machine, visible or not."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))


class Turns:
    """The first `count` visible GPUs, or as many as there are, which runs of this user take turns on.

    `descriptors` go to `supervise.start(reserved=...)`: a child that has them has the turn too. `say` gets a line if a GPU
    has to be waited for.
    """

    def __init__(self, count: int, *, say: Callable[[str], None]) -> None:
        self._say = say
        self._locks: list[tuple[str, Path, int]] = []
        self._holders: list[int] = []  # threads
        self._lock = threading.RLock()
        for device in sorted(set(visible_gpus()[:count])):
            name = "".join(c if c.isalnum() else "-" for c in device)
            path = own_folder() / f"gpu-{name}.lock"
            self._locks.append((device, path, os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)))

    @property
    def descriptors(self) -> list[int]:
        return [descriptor for _, _, descriptor in self._locks]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context in which the GPUs are this run's. They may be asked for again within it, in any thread."""
        with self._lock:
            if not self._holders:
                self._take()
            self._holders.append(threading.get_ident())
        try:
            yield
        finally:
            with self._lock:
                self._holders.remove(threading.get_ident())
                if not self._holders:
                    self._give()

    @contextmanager
    def between(self) -> Iterator[None]:
        """A context in which others may have the GPUs, though a turn of this thread has not ended: it goes on afterwards.

        Without effect while another thread has a turn.
        """
        with self._lock:
            own = [holder for holder in self._holders if holder == threading.get_ident()]
            self._holders = [holder for holder in self._holders if holder != threading.get_ident()]
            if own and not self._holders:
                self._give()
        try:
            yield
        finally:
            with self._lock:
                try:
                    if own and not self._holders:
                        self._take()
                finally:
                    self._holders += own

    def close(self) -> None:
        """Safe to call twice. Children that have the descriptors keep them, and their turn."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self._locks = []

    def _take(self) -> None:
        for device, path, descriptor in self._locks:  # in order, so that no two runs wait for each other
            try:
                disk.lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, str(path))
            except BlockingIOError:
                self._say(f"waiting for GPU {device}, which another run is using")
                fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _give(self) -> None:
        for descriptor in self.descriptors:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        if self._locks:  # the next stage asks at once: who has waited for longer comes first
            time.sleep(0.05)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of this address of the machine that nothing listens on now; "": of all its addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nothing listens on this TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
        return True


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with status 200 within five seconds."""
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:  # URLError and HTTPError are OSErrors
        return False

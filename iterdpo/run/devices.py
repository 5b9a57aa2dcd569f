"""The GPUs of this machine, visible and reserved among a user's runs, and its ports for servers.

A reservation is an flock for each GPU. The sampler and the trainer of a run share it and take turns on the GPU. Each
guard of `iterdpo.run.supervise` inherits it, so that a GPU stays reserved until the last process that may use it ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def reserved_gpus(count: int, *, say: Callable[[str], None]) -> Iterator[list[int]]:
    """The first `count` visible GPUs, or as many as there are, reserved among the user's iterdpo runs while the context is open.

    Yields the descriptors that `supervise.start(reserved=...)` takes. They are taken in order, so that no two runs wait
    for each other; `say` gets a line if a GPU has to be waited for.
    """
    descriptors: list[int] = []
    with ExitStack() as opened:
        for device in sorted(set(visible_gpus()[:count])):
            name = "".join(c if c.isalnum() else "-" for c in device)
            path = own_folder() / f"gpu-{name}.lock"
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
            opened.callback(os.close, descriptor)
            try:
                disk.lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, str(path))
            except BlockingIOError:
                say(f"waiting for GPU {device}, which another run is using")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            descriptors.append(descriptor)
        yield descriptors


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
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

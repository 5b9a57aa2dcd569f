"""How the first node of a training calls the others, by a file in the run directory, which all of them share.

    first node     iterdpo run CONFIG               writes training.json, and a new time on it each second
    each other     iterdpo join RUN_DIR --rank N    waits for it, and starts its share of the processes

If the file goes, is another, or has the same time for `SILENCE` seconds, the first node has ended, was lost or starts again:
the others end their processes. Only changes of the time count, so that the nodes' clocks need not agree.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from iterdpo.run.devices import free_port
from iterdpo.run.rundir import write_json

CALL = "training.json"
SILENCE = 30.0  # seconds; a shared file system may show a change late


class Node(NamedTuple):
    """A node's number in a training, and the address at which the first one's processes meet the others'."""

    rank: int
    host: str
    port: int


class Call(NamedTuple):
    """A training that is under way: `Call("0f3a…", "/runs/a/round-001/policy.partial/train.json", "node1", 41235)`."""

    id: str
    spec: str
    host: str
    port: int


class Caller:
    """The first node's side: `beat` gives the file a new time, at most once a second."""

    def __init__(self, file: Path) -> None:
        self._file, self._last = file, 0.0

    def beat(self) -> None:
        if time.monotonic() > self._last + 1:
            self._last = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(self._file)


@contextmanager
def calling(file: Path, spec: Path, settings: dict[str, Any]) -> Iterator[tuple[Node, Caller]]:
    """Call the others, while inside. `settings` are accelerate's: its file may name the address."""
    host = settings.get("main_process_ip") or socket.getfqdn()
    port = int(settings.get("main_process_port") or free_port(""))
    write_json(file, Call(uuid4().hex, str(spec), host, port)._asdict())
    try:
        yield Node(0, host, port), Caller(file)
    finally:
        file.unlink(missing_ok=True)


class Calls:
    """The other nodes' side."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp: int | None = None  # the time that the file had, as last seen
        self._since = -SILENCE  # when that was new; not if it was the first, which a killed run may have left

    def current(self) -> Call | None:
        """The training that the first node calls to now; None if there is none, or it is silent."""
        try:
            with open(self._file, "rb") as handle:  # NFS asks the server for the time when a file is opened
                stamp = os.fstat(handle.fileno()).st_mtime_ns
                call = Call(**json.load(handle))
        except (OSError, ValueError, TypeError):  # it is gone, or is being replaced
            self._stamp = None
            return None
        if stamp != self._stamp:
            self._since = -SILENCE if self._stamp is None else time.monotonic()
            self._stamp = stamp
        return call if time.monotonic() < self._since + SILENCE else None

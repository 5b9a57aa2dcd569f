"""A child process that answers requests, one at a time, over its pipes.

`JsonLinesWorker` is the parent's end and `serve` the child's. While the child works on a request, an empty line from it
says that it gets on. A message is a dataclass: a request crosses as one line of
JSON, `{"request": "Load", "fields": {"policy": "/runs/1/policy", "reload": true}}`, and so does its reply. Whatever
libraries in the child print goes to its log.

Written by hand because multiprocessing and concurrent.futures import the parent's main module in the child, share its
standard output, and leave a grandchild alive when the parent is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from iterdpo.errors import ChildFailed
from iterdpo.escape import printable
from iterdpo.run import supervise

R = TypeVar("R")


def import_heavy(module: str, *, without: Sequence[str] = ("sklearn",)) -> None:
    """Import a module that imports transformers, without packages that it takes, if they are installed, for what no child
    calls, and that take seconds: scikit-learn for assisted decoding; SciPy and torchvision for images.
    """
    hidden = [name for name in without if name not in sys.modules]
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # Python takes them for missing
    try:
        importlib.import_module(module)
    finally:
        for name in hidden:
            del sys.modules[name]


@dataclass(frozen=True)
class Done:
    """A reply that says no more than that the request was carried out."""


class JsonLinesWorker:
    """Runs `python -m module`, which calls `serve`, until `close`, its first error, or the end of this process.

    Args:
        name: what error messages call it, such as "sampler".
        log: file that its output is appended to; by default nothing is kept.
        env: its environment; by default this process's.
        reserved: descriptors of `devices.Turns`, open while it lives.
    """

    def __init__(
        self,
        module: str,
        *,
        name: str,
        log: Path = Path(os.devnull),
        env: dict[str, str] | None = None,
        reserved: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._child = supervise.start([sys.executable, "-m", module], log=log, env=env, pipes=True, reserved=reserved)

    def call(self, request: Any, read: Callable[..., R], *, silence: float | None = None) -> R:
        """The reply to `request`, a dataclass: `read` is called with the reply's fields.

        After `silence` seconds in which neither the reply nor a sign of work comes, the child is ended.

        Raises:
            ChildFailed: the child reported an error, died or hung. It is closed then; the message says why, and has its log.
        """
        process, kind = self._child.process, type(request).__name__
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with (
            contextlib.suppress(BrokenPipeError, ValueError),
            self._child.watched(silence) as seen,
        ):  # ValueError: closed
            given = TypeAdapter(type(request)).dump_python(request, mode="json")
            process.stdin.write(json.dumps({"request": kind, "fields": given}).encode() + b"\n")
            process.stdin.flush()
            while (line := process.stdout.readline()) == b"\n":
                seen()
        answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"error": None}
        if "error" in answer:
            said, why = answer["error"], ""
            if said is None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its pipe; its status comes at once
                    self._child.wait(5)
                why = f"the process died: {self._child.reason()}"
            elif supervise.SECOND_HAND.search(said):
                why = self._child.reason()
            self.close()
            reason = printable(why or " ".join(said.split()))[:500]
            raise ChildFailed(f"{self.name}, {kind.lower()}: {reason} (the whole log: {self._child.log})")
        return read(**answer["reply"])

    def close(self) -> None:
        """End the process and everything it started. Safe to call twice."""
        self._child.kill()
        for pipe in (self._child.process.stdin, self._child.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a request that it did not read
                if pipe is not None:
                    pipe.close()


_beats: list[Callable[[], None]] = []  # that of `serve`


def beat() -> None:
    """Tell the parent that the request which is worked on gets on. Cheap: it hears of it once a second."""
    for tell in _beats:
        tell()


def _fields(message: Any) -> dict[str, Any]:
    """Of a dataclass. `asdict` would copy each number of each list, which takes four times as long as writing them."""
    return {field.name: getattr(message, field.name) for field in fields(message)}


def serve(handlers: Mapping[type, Callable[[Any], Any]], *, prepare: Callable[[], object] = lambda: None) -> None:
    """Answer the parent's requests until it closes the pipe.

    Args:
        handlers: by the dataclass of a request, the function that takes one and returns the reply, a dataclass too.
        prepare: called first, once standard output goes to the log.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock, last = threading.Lock(), 0.0

    def say(line: str) -> None:
        nonlocal last
        last = time.monotonic()
        with lock:
            replies.write(line + "\n")
            replies.flush()

    def beat_once() -> None:
        if time.monotonic() > last + 1:
            say("")

    _beats.append(beat_once)
    prepare()
    handler_of: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        kind.__name__: (TypeAdapter(kind).validate_python, handle) for kind, handle in handlers.items()
    }
    for line in sys.stdin:
        message = json.loads(line)
        typed, handle = handler_of[message["request"]]
        try:
            answer = json.dumps({"reply": handle(typed(message["fields"]))}, default=_fields)
        except Exception as error:
            traceback.print_exc()
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        say(answer)

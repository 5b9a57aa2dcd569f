"""What the benchmarks share: a command line made of a function's parameters, and processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from cyclopts import App, Parameter


def command_line(main: Callable[..., None], help: str | None) -> None:
    """Call `main` with the options that its parameters name: `--prompts 1000 10000`."""
    app = App(help=help, help_format="plaintext", default_parameter=Parameter(negative=(), consume_multiple=True))
    app.default(main)
    app()


def fresh(work: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """`work(*arguments)` in a process whose imports and peak memory are its own. It prints to stderr."""
    with (
        mock.patch.dict(os.environ, environment or {}),
        ProcessPoolExecutor(1, get_context("spawn"), initializer=os.dup2, initargs=(2, 1)) as pool,
    ):
        return pool.submit(work, *arguments).result()


def peak_mib() -> float:
    """This process's highest resident memory so far, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10

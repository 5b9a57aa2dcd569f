"""What the benchmarks share: a command line made of a function's parameters, and processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
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
    with process(environment) as pool:
        return pool.submit(work, *arguments).result()


@contextmanager
def process(environment: Mapping[str, str] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A process for one work after another. It starts with the first, and prints to stderr."""
    with (
        mock.patch.dict(os.environ, environment or {}),
        ProcessPoolExecutor(1, get_context("spawn"), initializer=os.dup2, initargs=(2, 1)) as pool,
    ):
        yield pool


def in_turn(
    work: Callable[[Any], Any], jobs: Sequence[Any], prepare: Callable[[Any], None]
) -> Iterator[tuple[Any, Future[Any]]]:
    """Each job with the future of `work(job)` in a process of its own, one after the other.

    `prepare(job)` is called in that process before, while the one before works: imports, nothing that would disturb it.
    """
    pools: list[ProcessPoolExecutor] = []
    with ExitStack() as stack:

        def start(job: Any) -> None:
            pools.append(stack.enter_context(process()))
            pools[-1].submit(prepare, job)

        start(jobs[0])
        for number, job in enumerate(jobs):
            done = pools[number].submit(work, job)
            if number + 1 < len(jobs):
                start(jobs[number + 1])
            done.exception()  # waits
            pools[number].shutdown()  # and gives its memory back
            yield job, done


@contextmanager
def others() -> Iterator[Callable[[], float]]:
    """What other programs, and other machines on the same processors, take of them meanwhile: a share, 0 to 1."""

    def seconds() -> tuple[float, float]:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4]), time.perf_counter()

    begun = seconds()

    def share() -> float:
        taken, now = (b - a for a, b in zip(begun, seconds(), strict=True))
        return max(0.0, taken / (now * (os.cpu_count() or 1)))

    yield share


def process_age() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """This process's highest resident memory so far, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10

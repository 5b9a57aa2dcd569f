"""One line a stage: counts, rate, time left. A live bar on a terminal, plain lines elsewhere, nothing by default."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO


class Stage:
    """Work under way: say how far it is with `to` or `advance`, and set `remark` for its last line.

    The rate in that line is of the work after `begin`: neither the start-up nor the work of an earlier start counts.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started = self.begun = clock()
        self.done = self.before = 0
        self.remark = ""
        self.draw: Callable[[int], None] = lambda done: None

    def begin(self) -> None:
        self.begun, self.before = self.clock(), self.done

    def to(self, done: int) -> None:
        self.done = done
        self.draw(done)

    def advance(self, count: int) -> None:
        self.to(self.done + count)


class Progress:
    """Where progress goes: a stream, or nowhere. `every`: seconds of `clock` between a stage's plain lines."""

    def __init__(
        self, stream: IO[str] | None = None, *, every: float = 20.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.stream, self.every, self.clock = stream, every, clock

    def say(self, text: str) -> None:
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        """Around a stage's work; prints its line when it ends, also when it fails. A total of 0 means unknown."""
        stage = Stage(self.clock)
        if self.stream is None:
            yield stage
            return
        outcome = " (stopped)"
        try:
            with self._drawing(name, total, unit, stage.started) as stage.draw:
                yield stage
            outcome = ""
        finally:  # when the bar is gone from the screen
            now, count, waited = self.clock(), stage.done - stage.before, stage.begun - stage.started
            start_up = f", {waited:.1f} s to start" if waited >= 1 else ""
            rate = f", {count / (now - stage.begun):,.1f} {unit}/s" if count and now > stage.begun else ""
            remark = f" · {stage.remark}" if stage.remark else ""
            done = f"  {name:<9} {stage.done:>6,} {unit:<12} {now - stage.started:6.1f} s"
            self.say(f"{done}{start_up}{rate}{remark}{outcome}")

    @contextmanager
    def _drawing(self, name: str, total: int, unit: str, started: float) -> Iterator[Callable[[int], None]]:
        assert self.stream is not None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn(f"  {name:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            with Bars(*columns, TimeRemainingColumn(), console=Console(file=self.stream), transient=True) as bars:
                task = bars.add_task(name, total=total or None)
                yield lambda done: bars.update(task, completed=done)
            return
        shown, first = started, (started, 0)

        def line(done: int) -> None:
            nonlocal shown, first
            now = self.clock()
            if first[1] == 0:
                first = (now, done)  # the start-up of a process says nothing of the rate
            elif now - shown >= self.every and (not total or first[1] < done < total):
                shown = now
                left = (now - first[0]) / (done - first[1]) * (total - done) if total else 0
                how_far = f"of {total:,} {unit}, about {left:,.0f} s left" if total else f"{unit} so far"
                self.say(f"  {name:<9} {done:>6,} {how_far}")

        yield line

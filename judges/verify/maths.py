"""Whether a completion has an expression that equals the gold one, by math-verify in processes that may be killed.

math-verify's own timeouts are Python signal handlers, which work in the main thread alone and wait for C code (sympy
raising integers to powers). Here the kernel ends the process instead, by the default action of a timer's signal.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import re
import resource
import signal
from dataclasses import dataclass
from typing import Any

from iterdpo.errors import ChildFailed, JudgeError
from iterdpo.run.worker import Done, JsonLinesWorker, serve
from judges.base import Abstention
from judges.verify.base import Score, Verifier, check_positive, texts_of


@dataclass(frozen=True)
class WarmUp:
    """Do what takes seconds once, before any clock starts: the imports and the grammar."""


@dataclass(frozen=True)
class Compare:
    """`Compare(golds=["1/2"], completion="It is $0.5$.", seconds=5)`"""

    golds: list[str]
    completion: str
    seconds: float


@dataclass(frozen=True)
class Compared:
    """`Compared(score=1.0)`; without a score, the reason why there is nothing to compare with."""

    score: float | None = None
    reason: str = ""


@dataclass(eq=False, repr=False, kw_only=True)
class Math(Verifier):
    """1 if the completion's expression equals the gold one, by math-verify: LaTeX, boxed or not, plain expressions.

    A completion without an expression scores 0. Abstentions: a gold text that does not parse, and a comparison that
    takes too long. Comparisons run in child processes, which are killed at the timeout.
    """

    name = "math"
    SPEED_ONLY = frozenset({"concurrency"})
    column: str = "gold"
    """The prompt's column with the gold expression, or a list of them."""
    timeout: float = 10.0
    """Seconds for one comparison."""
    concurrency: int = 2
    """Comparisons at once; each is a process of some 100 MB."""

    def __post_init__(self) -> None:
        check_positive("math", timeout=self.timeout, concurrency=self.concurrency)
        if importlib.util.find_spec("math_verify") is None:
            raise JudgeError("judge 'math' needs the package math-verify: pip install 'math-verify'")
        self._workers: queue.LifoQueue[JsonLinesWorker | None] = queue.LifoQueue()  # None: to be started
        for _ in range(self.concurrency):
            self._workers.put(None)

    def score(self, completion: str, gold: Any) -> Score:
        worker = self._workers.get()
        try:
            worker = worker or _started_worker()
            compared = worker.call(Compare(texts_of(gold), completion, self.timeout), Compared)
        except ChildFailed:
            worker = None
            return Abstention(f"the comparison did not end within {self.timeout:g} s, or ran out of memory")
        finally:
            self._workers.put(worker)
        return Abstention(compared.reason) if compared.score is None else compared.score

    def close(self) -> None:
        """End the processes. The next comparison starts them again."""
        for worker in [self._workers.get() for _ in range(self.concurrency)]:
            if worker is not None:
                worker.close()
            self._workers.put(None)


def _started_worker() -> JsonLinesWorker:
    worker = JsonLinesWorker("judges.verify.maths", name="math")
    try:
        worker.call(WarmUp(), Done)
    except ChildFailed:
        raise JudgeError("judge 'math': math-verify cannot be imported; see `python -c 'import math_verify'`") from None
    return worker


def warm_up(request: WarmUp) -> Done:
    compare([r"\frac{1}{2}"], r"$\frac{1}{2}$")
    return Done()


def compare_in_time(request: Compare) -> Compared:
    signal.setitimer(signal.ITIMER_REAL, request.seconds)
    try:
        return compare(request.golds, request.completion)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def compare(golds: list[str], completion: str) -> Compared:
    """1 if the completion's expression equals one of the gold ones, else 0."""
    from math_verify import parse, verify

    parsed = [p for p in (_parse_gold(gold) for gold in golds) if p]
    if not parsed:
        return Compared(reason="the gold expression cannot be parsed")
    candidate: list[Any] = []
    with contextlib.suppress(Exception):  # what parses it is a grammar's runtime, and sympy, on any text at all
        candidate = parse(completion, parsing_timeout=None)
    for gold in parsed if candidate else []:
        with contextlib.suppress(Exception):
            if verify(gold, candidate, timeout_seconds=None):
                return Compared(1.0)
    return Compared(0.0)


def _parse_gold(gold: str) -> list[Any]:
    """A gold expression, whose LaTeX may lack dollars around it. Prose gives an empty list."""
    from math_verify import parse

    marked = any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\["))
    prose = re.search("[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", gold))
    for text in [gold] if marked or prose else [f"${gold}$", gold]:
        with contextlib.suppress(Exception):
            # The other modes return the text itself if nothing in it parses.
            parsed: list[Any] = parse(text, parsing_timeout=None, fallback_mode="no_fallback")
            if parsed:
                return parsed
    return []


if __name__ == "__main__":
    # Resource limits of last resort: a tower of powers may ask for all memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)  # that its timeouts are off; that an expression does not parse
    serve({WarmUp: warm_up, Compare: compare_in_time})

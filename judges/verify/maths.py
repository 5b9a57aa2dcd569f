"""Whether a completion has an expression that equals the gold one, by math-verify in processes of `math_worker`."""

from __future__ import annotations

import importlib.util
import queue
from typing import Any, ClassVar

from iterdpo.errors import ChildFailed, JudgeError
from iterdpo.run.worker import Done, JsonLinesWorker
from judges.base import Abstention
from judges.verify.base import Score, Verifier, check_positive, texts_of
from judges.verify.math_worker import Compare, Compared, WarmUp


class Math(Verifier):
    """1 if the completion's expression equals the gold one, by math-verify: LaTeX, boxed or not, plain expressions.

    A completion without an expression scores 0. Abstentions: a gold text that does not parse, and a comparison that
    takes too long. Comparisons run in child processes, which are killed at the timeout.

    Args:
        column: the prompt's column with the gold expression, or a list of them.
        timeout: seconds for one comparison.
        concurrency: comparisons at once; each is a process of some 100 MB.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"concurrency"})

    def __init__(self, *, column: str = "gold", timeout: float = 10.0, concurrency: int = 2) -> None:
        check_positive("math", timeout=timeout, concurrency=concurrency)
        if importlib.util.find_spec("math_verify") is None:
            raise JudgeError("judge 'math' needs the package math-verify: pip install 'math-verify'")
        self.name, self.column, self.timeout, self.concurrency = "math", column, timeout, concurrency
        self._workers: queue.LifoQueue[JsonLinesWorker | None] = queue.LifoQueue()  # None: to be started
        for _ in range(concurrency):
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
    worker = JsonLinesWorker("judges.verify.math_worker", name="math")
    try:
        worker.call(WarmUp(), Done)
    except ChildFailed:
        raise JudgeError("judge 'math': math-verify cannot be imported; see `python -c 'import math_verify'`") from None
    return worker

"""`map` by several processes, in order and without reading ahead.

By hand, since `multiprocessing.Pool.imap` and (before Python 3.14) `Executor.map` read all of their input at once,
`datasets.map` writes all of it to disk first, and none of them ends its processes if this one is killed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

from iterdpo.run.supervise import PR_SET_PDEATHSIG

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`map(work, items)` in this many processes. They are at most a few items ahead of the consumer.

    Forked, since a spawned process would import a user's script a second time; the tokenizer has not been used in this
    one, so that none of its threads is lost.
    """
    if processes == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=_become_worker, initargs=(work,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_worker, item))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of a worker


def _become_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads in each of as many processes as cores


def _worker(item: Any) -> Any:
    return _work(item)

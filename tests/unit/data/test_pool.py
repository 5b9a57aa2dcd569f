from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from iterdpo.data.pool import map_in_order


def squared(number: int) -> tuple[int, int]:
    if number == 13:
        raise ValueError("thirteen")
    return number**2, os.getpid()


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_items(processes: int) -> None:
    results = list(map_in_order(squared, range(12), processes))
    assert [square for square, _ in results] == [n**2 for n in range(12)]
    assert (os.getpid() in {process for _, process in results}) == (processes == 1)


def test_no_more_than_a_few_items_are_taken_ahead_of_the_results() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 101):  # noqa: B007  # read below
            yield 2

    results = map_in_order(squared, items(), 2)
    for given in range(1, 11):
        next(results)
        assert taken <= given + 4
    results.close()


def test_an_error_in_a_process_is_raised_here_after_the_results_before_it() -> None:
    results = map_in_order(squared, range(20), 2)
    assert [next(results)[0] for _ in range(13)] == [n**2 for n in range(13)]
    with pytest.raises(ValueError, match="thirteen"):
        next(results)


def test_the_processes_end_with_the_one_that_started_them() -> None:
    program = """
        import os, sys, time
        from iterdpo.data.pool import map_in_order

        def work(item):
            print(os.getpid(), flush=True)
            time.sleep(100)

        pid = os.getpid()
        def items():
            yield 0
            yield 1
            time.sleep(1)
            os.kill(pid, 9)

        list(map_in_order(work, items(), 2))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # its pipes close when all have ended
    assert done.returncode == -9
    assert done.stdout.split()

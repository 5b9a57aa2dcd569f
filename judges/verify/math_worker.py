"""Compares mathematical expressions with math-verify, in a process of its own. Started by `judges.verify.verifiers.Math`.

Reads and writes lines of JSON: `{"gold": ["1/2"], "completion": "It is $0.5$.", "seconds": 5}` is answered
with `{"score": 1.0}`, or with `{"reason": "..."}` where there is nothing to compare with.

math-verify's own timeouts are Python signal handlers, which work in the main thread alone and wait for C code (sympy
raising integers to powers). Here the kernel ends the process instead, by the default action of a timer's signal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    # Resource limits of last resort: a tower of powers may ask for all memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)  # that its timeouts are off; that an expression does not parse
    compare([r"\frac{1}{2}"], r"$\frac{1}{2}$")  # the imports and the grammar take seconds, before any clock starts

    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        answer = compare(request["gold"], request["completion"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compare(golds: list[str], completion: str) -> dict[str, Any]:
    """1 where the completion's expression equals one of the gold ones."""
    from math_verify import parse, verify

    parsed = [p for p in (_parse_gold(gold) for gold in golds) if p]
    if not parsed:
        return {"reason": "the gold expression cannot be parsed"}
    candidate: list[Any] = []
    with contextlib.suppress(Exception):  # what parses it is a grammar's runtime, and sympy, on any text at all
        candidate = parse(completion, parsing_timeout=None)
    for gold in parsed if candidate else []:
        with contextlib.suppress(Exception):
            if verify(gold, candidate, timeout_seconds=None):
                return {"score": 1.0}
    return {"score": 0.0}


def _parse_gold(gold: str) -> list[Any]:
    """A gold expression, whose LaTeX may come bare, without dollars around it. Prose is none."""
    from math_verify import parse

    marked = any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\["))
    prose = re.search("[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", gold))
    for text in [gold] if marked or prose else [f"${gold}$", gold]:
        with contextlib.suppress(Exception):
            # Otherwise the text itself comes back as its own value where nothing in it parses.
            if parsed := parse(text, parsing_timeout=None, fallback_mode="no_fallback"):
                return parsed
    return []


if __name__ == "__main__":
    main()

"""Whether a program passes its tests, run in the sandbox."""

from __future__ import annotations

import ast
import itertools
import secrets
from dataclasses import dataclass
from typing import Any

from iterdpo.errors import JudgeError
from judges.base import Abstention
from judges.verify.base import Score, Verifier, check_positive, fenced_blocks
from judges.verify.sandbox import REPORT, TIMED_OUT, SandboxError, require_sandbox, run_python


@dataclass(eq=False, repr=False, kw_only=True)
class CodeTests(Verifier):
    """The share of its tests that a program passes; or, without `partial`, 1 if it passes all, else 0.

    The program is the completion's last fenced block of Python, else its last fenced block without a language, else
    the whole completion. It runs in `judges.verify.sandbox`, with the standard library alone. The prompt's column has

    - a text of Python: each `assert` at its top level is a test, with the statements before it; without any, all of it
      is one test;
    - or a list of such texts, each of them a test;
    - or a list of `{"input": stdin, "output": stdout}`: the program runs once for each, and must exit with status 0
      and print that, white space at the ends of lines aside.

    In the first two the tests run in the program's own process and namespace, after it, with `__name__` set to
    `"solution"`; a run that does not end by itself, and well, within the limits passes none. Each passed test is
    reported under a random mark over a descriptor, so that neither printing nor exiting early looks like success. A
    program that is written to search its own process for those marks could still report them, and one that compares
    equal to everything passes any assertion: only tests of stdin and stdout cannot be reached from within.

    A completion abstains only if the sandbox itself fails, or if the tests are not valid Python.
    """

    name = "code_tests"
    SPEED_ONLY = frozenset({"concurrency", "allow_unsandboxed"})
    column: str = "tests"
    """The prompt's column with the tests."""
    language: str = "python"
    """`python`, the only one."""
    timeout: float = 10.0
    """Seconds for a run. After a run that timed out, the tests that remain count as failed."""
    memory_mb: int = 512
    """Memory of each process."""
    partial: bool = True
    """Give a share of the tests, instead of 1 or 0."""
    concurrency: int = 4
    """Programs at once."""
    allow_unsandboxed: bool = False
    """Run the programs even if this machine has no sandbox."""

    def __post_init__(self) -> None:
        if self.language != "python":
            raise JudgeError(f"judge 'code_tests': language {self.language!r} is not supported; only 'python' is")
        self._limits: dict[str, Any] = {"timeout": self.timeout, "memory_mb": self.memory_mb}
        check_positive("code_tests", **self._limits, concurrency=self.concurrency)
        if not self.allow_unsandboxed:
            require_sandbox()
        self._limits["allow_unsandboxed"] = self.allow_unsandboxed

    def score(self, completion: str, gold: Any) -> Score:
        program = program_of(completion)
        tests: list[Any]
        try:
            match gold:
                case str():
                    tests = _split_tests(gold)
                    passed = self._assertions(program, tests)
                case [*tests] if all(isinstance(test, str) for test in tests):
                    for test in tests:
                        ast.parse(test)
                    passed = self._assertions(program, tests)
                case [*tests] if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
                    passed = self._runs(program, tests)
                case _:
                    kinds = "a text of tests, nor a list of texts, nor a list of objects with `input` and `output`"
                    return Abstention(f"the column {self.column!r} is neither {kinds}")
        except (SyntaxError, ValueError):
            return Abstention(f"the tests of column {self.column!r} are not valid Python")
        except SandboxError as error:
            return Abstention(f"the sandbox failed: {error}")
        return passed / len(tests) if self.partial else float(passed == len(tests))

    def _assertions(self, program: str, tests: list[str]) -> int:
        marks = [secrets.token_hex(16) for _ in tests]
        checked = f"{HARNESS}\ncheck({program!r}, {tests!r}, {marks!r}, {REPORT})\n"
        outcome = run_python(checked, max_output=max(1 << 16, 40 * len(tests)), **self._limits)
        return len(set(marks) & set(outcome.report.split())) if outcome.ok else 0

    def _runs(self, program: str, tests: list[dict[str, Any]]) -> int:
        passed = 0
        for test in tests:
            given, wanted = str(test["input"]), str(test["output"])
            outcome = run_python(program, stdin=given, max_output=max(1 << 16, 8 * len(wanted)), **self._limits)
            passed += outcome.ok and _lines(outcome.stdout) == _lines(wanted)
            if outcome.reason == TIMED_OUT:
                break
        return passed


HARNESS = """
def check(program, tests, marks, report):
    import os, sys, traceback, types
    # Taken before the program can replace them.
    run, write, show, failure = exec, os.write, traceback.print_exc, BaseException
    todo = [(compile(test, "tests", "exec"), mark.encode()) for test, mark in zip(tests, marks)]
    module = sys.modules["solution"] = types.ModuleType("solution")
    run(compile(program, "solution.py", "exec"), module.__dict__)
    for test, mark in todo:
        try:
            run(test, module.__dict__)
        except failure:
            show()
        else:
            write(report, mark + b" ")
"""


def program_of(completion: str) -> str:
    """The completion's last fenced block of Python; else its last one without a language; else all of it."""
    blocks = fenced_blocks(completion)
    for languages in (("python", "py", "python3"), ("",)):
        if found := [text for language, text in blocks if language in languages]:
            return found[-1]
    return completion


def _split_tests(text: str) -> list[str]:
    """Each top-level `assert` with the statements since the one before; what follows the last goes with it."""
    body = ast.parse(text).body
    ends = [i for i, node in enumerate(body) if isinstance(node, ast.Assert)][:-1]
    parts = [body[start:end] for start, end in itertools.pairwise([0, *(i + 1 for i in ends), len(body)])]
    return ["\n".join(map(ast.unparse, part)) for part in parts]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]

"""Whether a program passes its tests, run in the sandbox."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError
from iterdpo.types import CompletionGroup
from judges.base import Abstention
from judges.verify.base import Score, Verifier, check_positive, fenced_blocks
from judges.verify.sandbox import (
    PEER_READING,
    PEER_WRITING,
    REPORT,
    TIMED_OUT,
    SandboxError,
    require_sandbox,
    run_pair,
    run_python,
)
from judges.verify.suites import BadTests, Suite, entry_point, given_by, read_suite


@dataclass(eq=False, repr=False, kw_only=True)
class CodeTests(Verifier):
    """The share of its tests that a program passes; or, without `partial`, 1 if it passes all, else 0.

    The program is the completion's last fenced block of Python that defines something that the tests call, else its last
    one, else its last fenced block without a language, else the whole completion. It runs in `judges.verify.sandbox`, with
    the standard library alone, and has what the prompt imports and defines besides. The prompt's column has

    - a text of Python: each `assert` at its top level is a test, with the statements before it; so is each function
      `test_*` (with pytest's `raises`, `approx`, `fixture` and `parametrize`), each test of a `TestCase`, and
      HumanEval's `check(candidate)`. Without any, all of it is one test;
    - or a list of such texts, each of them a test;
    - or a list of `{"input": stdin, "output": stdout}`: the program runs once for each, and must exit with status 0
      and print that, white space at the ends of lines aside;
    - or APPS's object with `inputs` and `outputs`, and perhaps `fn_name`, as it is or as JSON text.

    In the first two the tests run in a sandbox of their own, which never holds the program. They call it in its
    sandbox and get plain data back (see `judges.verify.tester`). Those that pass so are run again beside the program, in
    one process, and have to pass there too. A run of the program that does not end by itself, and well, within the limits
    passes none.

    A test that an empty program passes is no test, and does not count; nor is one that passes whatever the program's
    functions return. A completion abstains if there are no others, if all of them call several functions and pass if
    these return True, or their first argument; if the tests are not valid Python or need what the sandbox lacks; and if
    the sandbox itself fails.
    """

    name = "code_tests"
    SPEED_ONLY = frozenset({"concurrency", "allow_unsandboxed"})
    REVISION = 10
    column: str = "tests"
    """The prompt's column with the tests."""
    entry_point: str = "entry_point"
    """The prompt's column with the name of the function that `check(candidate)` tests. If there is none, it is the last
    function that the prompt defines, else the last of the program."""
    language: str = "python"
    """`python`, the only one."""
    timeout: float = 10.0
    """Seconds for a run. After a run that timed out, the tests that remain count as failed."""
    memory_mb: int = 512
    """Memory of a run, all of its processes and files together."""
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
        self._real: dict[str, Future[set[int] | str]] = {}
        self._lock = threading.Lock()
        self._limits["allow_unsandboxed"] = self.allow_unsandboxed

    def _score(self, completion: str, group: CompletionGroup) -> Score:
        column = str(self.column)
        gold = group.prompt.columns.get(column)
        if gold is None or gold == [] or gold == "":
            return super()._score(completion, group)
        entry = group.prompt.columns.get(self.entry_point)
        prompt = "\n".join(str(message["content"]) for message in group.prompt.messages)
        try:
            suite = read_suite(gold, column, prompt=prompt)
            asked = entry_point("", prompt, entry and str(entry))
            program = program_of(completion, suite.asked | ({asked} if asked else set()))
            entry = entry_point(program, prompt, entry and str(entry))
            if suite.wants_entry:
                suite = read_suite(gold, column, entry, prompt)
            if suite.runs:
                passed, count = self._runs(program, suite.runs)
            else:
                given = given_by(prompt, program, suite, entry)
                passed, count = self._tests(f"{given}\n{program}" if given else program, suite)
        except BadTests as error:
            return Abstention(str(error))
        except (SandboxError, OSError) as error:  # OSError: no process, pipe or folder is to be had
            return Abstention(f"the sandbox failed: {error}")
        return passed / count if self.partial else float(passed == count)

    def _tests(self, program: str, suite: Suite) -> tuple[int, int]:
        """How many tests the program passes, of those that an empty program does not."""
        real, most = self._real_tests(suite), max(1 << 16, 40 * len(suite.tests))
        outcome = run_pair(
            _child("callee", program, PEER_READING, PEER_WRITING),
            _tester(suite, PEER_READING, PEER_WRITING, REPORT),
            max_report=most,
            **self._limits,
        )
        passed = _passed(outcome.report) & real if outcome.ok else set()
        if passed:
            together = _tester(suite, None, None, REPORT, program)
            passed &= _passed(run_python(together, max_output=most, **self._limits).report)
        return len(passed), len(real)

    def _real_tests(self, suite: Suite) -> set[int]:
        """The numbers of the tests that an empty program fails, found by running them without a program, once.

        Raises:
            BadTests: there are none, or they need what the sandbox lacks.
        """
        key = hashlib.sha256(json.dumps([suite.tests, suite.names]).encode()).hexdigest()
        with self._lock:
            first = key not in self._real
            future = self._real.setdefault(key, Future())
        if first:
            try:
                future.set_result(self._run_without_program(suite))
            except BaseException as error:
                with self._lock:
                    del self._real[key]
                future.set_exception(error)
        real = future.result()
        if isinstance(real, str):
            raise BadTests(real)
        return real

    def _run_without_program(self, suite: Suite) -> set[int] | str:
        outcome = run_python(
            _tester(suite, None, None, REPORT), max_output=max(1 << 16, 400 * len(suite.tests)), **self._limits
        )
        if unsupported := re.search("^unsupported (.*)", outcome.report, re.MULTILINE):
            return f"the tests of column {self.column!r} need what the sandbox lacks: {unsupported[1]}"
        if not re.search("^ended$", outcome.report, re.MULTILINE):
            return f"the tests of column {self.column!r} do not end without a program: {outcome.reason}"
        nothing = f"the tests of column {self.column!r} test nothing"
        real = set(range(len(suite.tests))) - _passed(outcome.report)
        if not real:
            return f"{nothing}: an empty program passes them"
        real -= _passed(outcome.report, "all") & _passed(outcome.report, "other") & _passed(outcome.report, "none")
        if not real:
            return f"{nothing}: a program passes them whatever its functions return"
        called = dict(re.findall(r"^called (\w+) (\d+)$", outcome.report, re.MULTILINE))
        for kind, result in (("true", "True"), ("argument", "their first argument")):
            if real <= _passed(outcome.report, kind) and int(called.get(kind, 0)) > 1:
                return f"{nothing}: functions that return {result} pass them together"
        return real

    def _runs(self, program: str, runs: list[tuple[str, str]]) -> tuple[int, int]:
        real = [(given, wanted) for given, wanted in runs if wanted.strip()]  # an empty program prints nothing
        if not real:
            raise BadTests(f"the tests of column {self.column!r} test nothing: no output is expected")
        passed = 0
        for given, wanted in real:
            outcome = run_python(program, stdin=given, max_output=max(1 << 16, 8 * len(wanted)), **self._limits)
            passed += outcome.ok and _lines(outcome.stdout) == _lines(wanted)
            if outcome.reason == TIMED_OUT:
                break
        return passed, len(real)


def _passed(report: str, passed: str = "passed") -> set[int]:
    return {int(number) for number in re.findall(rf"^{passed} ([0-9]{{1,9}})$", report, re.MULTILINE)}


def _tester(suite: Suite, *arguments: Any) -> str:
    return _child(
        "tester", suite.tests, suite.names, suite.objects, sorted(suite.functions), suite.in_place, *arguments
    )


def _child(name: str, *arguments: Any) -> str:
    """A program for the sandbox: `main` of the module `judges.verify.<name>`, which is not to be imported there."""
    return f"{BOOTSTRAP}\nstart({_sources()!r}, {name!r}, {arguments!r})\n"


BOOTSTRAP = """
def start(sources, name, arguments):
    import sys, types
    for package in ("judges", "judges.verify"):
        sys.modules[package] = types.ModuleType(package)
    for module, source in sources.items():
        made = sys.modules[f"judges.verify.{module}"] = types.ModuleType(f"judges.verify.{module}")
        setattr(sys.modules["judges.verify"], module, made)
        if module in ("wire", name) or name == "tester" and module in ("pytest_subset", "refs", "guards", "runner"):
            exec(compile(source, f"{module}.py", "exec"), made.__dict__)
    sys.modules[f"judges.verify.{name}"].main(*arguments)
"""


@functools.cache
def _sources() -> dict[str, str]:
    names = ("wire", "pytest_subset", "refs", "guards", "runner", "callee", "tester")
    return {name: Path(__file__).with_name(f"{name}.py").read_text() for name in names}


def program_of(completion: str, names: Collection[str] = ()) -> str:
    """The completion's last fenced block of Python, of those that define one of `names` if any does; else its last one without
    a language; else all of it.
    """
    blocks = fenced_blocks(completion)
    any_of = "|".join(re.escape(name.rpartition(".")[2]) for name in names)
    defines = re.compile(rf"^(?:\s*(?:async +)?(?:def|class) +(?:{any_of})\b|(?:{any_of}) *[:=])", re.MULTILINE)
    for languages in (("python", "py", "python3"), ("",)):
        if found := [text for language, text in blocks if language in languages]:
            of_use = [text for text in found if names and defines.search(text)]
            return (of_use or found)[-1]
    return completion


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]

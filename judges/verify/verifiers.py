"""Judges that check a completion by rule, or by running it: no model, no device, the same score each time.

| judge | 1 where the completion |
| --- | --- |
| `exact_match` | is the gold text |
| `numeric_match` | ends in the gold number |
| `math` | has an expression that equals the gold one, by math-verify |
| `json_schema` | is JSON that satisfies a schema |
| `regex` | has a match of a pattern |
| `code_tests` | is a program that passes its tests, run in `judges.verify.sandbox`; the share of tests that it passes |

and 0 where not. A prompt without the column that a judge reads abstains.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import queue
import re
import secrets
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from iterdpo.errors import ChildFailed, JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.run.worker import Done, JsonLinesWorker
from iterdpo.types import CompletionGroup, Judgment
from judges.base import Abstention, judgment_from_outcomes
from judges.verify.math_worker import Compare, Compared, WarmUp
from judges.verify.sandbox import REPORT, TIMED_OUT, SandboxError, require_sandbox, run_python

Score = float | Abstention


class _Verifier(JudgeBase):
    """Scores each completion by itself, `concurrency` at once, given what the prompt's column has."""

    needs_device = False
    name = "verifier"
    column: str | None = "gold"
    concurrency: int = 1

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        work = [(c.text, group) for group in groups for c in group.completions]
        if self.concurrency == 1:
            scores: Iterator[Score] = iter([self._score(*item) for item in work])
        else:
            with ThreadPoolExecutor(self.concurrency) as pool:
                scores = iter(list(pool.map(lambda item: self._score(*item), work)))
        return [judgment_from_outcomes(group, [next(scores) for _ in group.completions]) for group in groups]

    def _score(self, completion: str, group: CompletionGroup) -> Score:
        if self.column is None:
            return self.score(completion, None)
        gold = group.prompt.columns.get(self.column)
        if gold is None or gold == [] or gold == "":
            missing = "is empty" if self.column in group.prompt.columns else "is missing"
            return Abstention(f"the prompt's column {self.column!r} {missing}")
        return self.score(completion, gold)

    def score(self, completion: str, gold: Any) -> Score:
        raise NotImplementedError


class ExactMatch(_Verifier):
    """1 where the completion is the gold text, or one of them where the column has a list.

    Args:
        column: the prompt's column with the gold text.
        ignore_case: compare without regard to case.
        strip: compare without the white space around both.
        last_line: compare the completion's last line that is not blank, instead of all of it.
    """

    def __init__(
        self, *, column: str = "gold", ignore_case: bool = False, strip: bool = True, last_line: bool = False
    ) -> None:
        self.name, self.column = "exact_match", column
        self.ignore_case, self.strip, self.last_line = ignore_case, strip, last_line

    def score(self, completion: str, gold: Any) -> Score:
        if self.last_line:
            completion = next((line for line in reversed(completion.splitlines()) if line.strip()), "")
        return float(self._plain(completion) in map(self._plain, _texts(gold)))

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class NumericMatch(_Verifier):
    """1 where the completion's last number is the gold number, or one of them where the column has a list.

    After `####`, as GSM8K writes it, the first number counts instead. Thousands separators, fractions, percent signs,
    powers of ten, currencies and units are understood (see `last_number`). Where one side alone has a percent sign,
    50% is both 50 and 0.5. A completion without a number scores 0; a gold text without one abstains.

    Args:
        column: the prompt's column with the gold number, or a text that ends in it.
        tolerance: how far apart the two may be.
        relative: how far apart they may be as a share of the gold number; the larger of both counts.
    """

    def __init__(self, *, column: str = "gold", tolerance: float = 1e-6, relative: float = 0.0) -> None:
        for key, value in (("tolerance", tolerance), ("relative", relative)):
            if not 0 <= value < float("inf"):
                raise JudgeError(f"judge 'numeric_match': {key} is {value}; it must be 0 or more")
        self.name, self.column = "numeric_match", column
        self.tolerance, self.relative = Fraction(tolerance), Fraction(relative)

    def score(self, completion: str, gold: Any) -> Score:
        wanted = [last_number(text) for text in _texts(gold)]
        if None in wanted:
            return Abstention(f"no number in the column {self.column!r}")
        found = last_number(completion)
        return float(found is not None and any(self._same(found, number) for number in wanted if number))

    def _same(self, found: tuple[Fraction, bool], gold: tuple[Fraction, bool]) -> bool:
        (value, percent), (target, gold_percent) = found, gold
        values, targets = [value], [target]
        if percent and not gold_percent:
            values.append(value / 100)
        if gold_percent and not percent:
            targets.append(target / 100)
        return any(abs(v - t) <= max(self.tolerance, self.relative * abs(t)) for v in values for t in targets)


NUMBER = re.compile(
    r"""
    (?<![A-Za-z_0-9.^]) (?<!\^\{)                        # not part of a name (x2, km2), a number or an exponent
    (?P<sign>(?<![0-9)\]])[-+])? [$€£¥]? (?P<sign2>-)?
    (?P<number>
        [0-9]{1,3}(?:[,\u00a0\u202f][0-9]{3})+(?:\.[0-9]+)?(?![0-9])   # 1,234,567.8
      | [0-9]+(?:\.[0-9]+)? | \.[0-9]+
    )
    (?: (?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))
      | \s?(?:[x×*·]|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>[-+]?[0-9]{1,3})\}?
      | \^\{?(?P<ten>[-+]?[0-9]{1,3})\}?
      | \s?/\s?(?P<below>[0-9]{1,30})(?![0-9.]*/)
      | \x20(?P<over>[0-9]{1,9})/(?P<under>[0-9]{1,9})      # 1 1/2
    )?
    \s?\\?(?P<percent>%)?
    """,
    re.VERBOSE,
)


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """The last number of a text, or the first after its last `####`, exactly, and whether a percent sign follows it.

    `"so 1,234.5 km."` is 1234.5, `"-3/4"` is -0.75, `"1 1/2"` is 1.5, `"2.5e-3"` and `"2.5 × 10^-3"` are 0.0025,
    `"−$5"` (a Unicode minus) is -5. A hyphen after a digit or before a space is none: `"10-5"` and `"10 - 5"` end in 5. A digit that is
    part of a name or an exponent is no number: `"5 m^2"` is 5.
    """
    text = text.translate({0x2212: "-", 0x2013: "-", 0xFF0D: "-"})
    marked = text.rpartition("####")[2] if "####" in text else None
    matches = list(NUMBER.finditer(text if marked is None else marked))
    if not matches:
        return None
    match = matches[-1] if marked is None else matches[0]
    part = match.groupdict()
    if len(part["number"]) > 400:
        return None
    value = Fraction(re.sub("[,\u00a0\u202f]", "", part["number"]))
    if part["exponent"]:
        value *= Fraction(10) ** int(part["exponent"][1:])
    elif part["power"]:
        value *= Fraction(10) ** int(part["power"])
    elif part["ten"] and value == 10:
        value = Fraction(10) ** int(part["ten"])
    elif part["below"] and int(part["below"]):
        value /= int(part["below"])
    elif part["under"] and int(part["under"]):
        value += Fraction(int(part["over"]), int(part["under"]))
    negative = "-" in (part["sign"], part["sign2"])
    return (-value if negative else value), bool(part["percent"])


class Math(_Verifier):
    """1 where the completion's expression equals the gold one, by math-verify: LaTeX, boxed or not, plain expressions.

    A completion without an expression scores 0. Abstentions: a gold text that does not parse, and a comparison that
    takes too long. Comparisons run in processes of their own, which are killed at the timeout.

    Args:
        column: the prompt's column with the gold expression, or a list of them.
        timeout: seconds for one comparison.
        concurrency: comparisons at once; each is a process of some 100 MB.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"concurrency"})

    def __init__(self, *, column: str = "gold", timeout: float = 10.0, concurrency: int = 2) -> None:
        _check_positive("math", timeout=timeout, concurrency=concurrency)
        _need("math", "math_verify", "math-verify")
        self.name, self.column, self.timeout, self.concurrency = "math", column, timeout, concurrency
        self._workers: queue.LifoQueue[_MathWorker] = queue.LifoQueue()
        for _ in range(concurrency):
            self._workers.put(_MathWorker())

    def score(self, completion: str, gold: Any) -> Score:
        worker = self._workers.get()
        try:
            return worker.compare(_texts(gold), completion, self.timeout)
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        """Ends the processes; they are started again when they are needed."""
        for worker in list(self._workers.queue):
            worker.close()


class _MathWorker:
    """A process that compares, one after the other; started when first needed, and again after a timeout."""

    def __init__(self) -> None:
        self._process: JsonLinesWorker | None = None

    def compare(self, golds: list[str], completion: str, seconds: float) -> Score:
        if self._process is None:
            self._process = JsonLinesWorker("judges.verify.math_worker", name="math")
            try:
                self._process.call(WarmUp(), Done)
            except ChildFailed:
                self.close()
                raise JudgeError(
                    "judge 'math': math-verify cannot be imported; see `python -c 'import math_verify'`"
                ) from None
        try:
            compared = self._process.call(Compare(golds, completion, seconds), Compared)
        except ChildFailed:
            self.close()
            return Abstention(f"the comparison did not end within {seconds:g} s, or ran out of memory")
        return Abstention(compared.reason) if compared.score is None else compared.score

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None


class JSONSchema(_Verifier):
    """1 where the completion is JSON that satisfies a schema, of any draft that `$schema` names (else the newest).

    Where the completion has one fenced block of JSON, that block counts. NaN and infinities are no JSON. A reference
    out of the schema is never fetched: it abstains.

    Args:
        schema: the schema itself.
        path: or a file that has it.
        column: or the prompt's column that has it, as an object or as JSON text.
    """

    def __init__(
        self, *, schema: dict[str, Any] | None = None, path: str | None = None, column: str | None = None
    ) -> None:
        if sum(given is not None for given in (schema, path, column)) != 1:
            raise JudgeError("judge 'json_schema': give one of `schema`, `path` and `column`")
        if path is not None:
            try:
                schema = json.loads(Path(path).read_text())
            except (OSError, ValueError) as error:
                raise JudgeError(f"judge 'json_schema': path {path}: {error}") from None
        if column is None and (problem := _schema_problem(schema)):
            raise JudgeError(f"judge 'json_schema': {problem}")
        self.name, self.column, self._schema = "json_schema", column, schema

    def score(self, completion: str, gold: Any) -> Score:
        from jsonschema_specifications import REGISTRY  # no more schemas than the drafts' own, and none fetched
        from referencing.exceptions import Unresolvable

        schema = self._schema if self.column is None else gold
        if self.column is not None and (problem := _schema_problem(schema)):
            return Abstention(f"the column {self.column!r}: {problem}")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        try:
            value = json.loads(_json_text(completion), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        try:
            return float(_draft(schema)(schema, registry=REGISTRY).is_valid(value))
        except Unresolvable as error:
            return Abstention(f"the schema refers to {error.ref!r}, which it does not have; nothing is fetched")
        except RecursionError:
            return Abstention("the schema, or the JSON, is nested too deeply to check")


def _json_text(completion: str) -> str:
    blocks = [text for language, text in _blocks(completion) if language in ("", "json")]
    return blocks[0] if len(blocks) == 1 else completion


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _draft(schema: Any) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for

    return validator_for(schema, default=Draft202012Validator)


def _schema_problem(schema: Any) -> str | None:
    from jsonschema.exceptions import SchemaError

    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(schema, dict | bool):
            return f"a schema is an object, not {type(schema).__name__}"
        _draft(schema).check_schema(schema)
    except SchemaError as error:
        return f"not a JSON schema: {error.json_path}: {error.message}"
    except ValueError as error:
        return f"not JSON: {error}"
    return None


class Regex(_Verifier):
    """1 where the completion has a match of a pattern, in the syntax of the package `regex` (Python's, and more).

    Flags stand in the pattern: `(?i)` for either case, `(?m)` and `(?s)` for lines. A match that takes longer than
    two seconds abstains, and so does a pattern of a column that is none.

    Args:
        pattern: the pattern.
        column: or the prompt's column that has it.
        full: the whole completion must match, not just a part of it.
    """

    SECONDS = 2.0

    def __init__(self, *, pattern: str | None = None, column: str | None = None, full: bool = False) -> None:
        import regex

        if (pattern is None) == (column is None):
            raise JudgeError("judge 'regex': give one of `pattern` and `column`")
        try:
            regex.compile(pattern or "")
        except regex.error as error:
            raise JudgeError(f"judge 'regex': the pattern {pattern!r} is not valid: {error}") from None
        self.name, self.pattern, self.column, self.full = "regex", pattern, column, full

    def score(self, completion: str, gold: Any) -> Score:
        import regex

        try:
            pattern = regex.compile(str(gold) if self.pattern is None else self.pattern)
        except regex.error as error:
            return Abstention(f"the pattern of column {self.column!r} is not valid: {error.msg}")
        try:
            match = (pattern.fullmatch if self.full else pattern.search)(completion, timeout=self.SECONDS)
        except TimeoutError:
            return Abstention(f"the pattern took longer than {self.SECONDS:g} s to match")
        return float(match is not None)


class CodeTests(_Verifier):
    """The share of its tests that a program passes; or, without `partial`, 1 where it passes all, else 0.

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

    Only where the sandbox itself fails does a completion abstain, or where the tests are not valid Python.

    Args:
        column: the prompt's column with the tests.
        language: `python`, the only one.
        timeout: seconds for a run. After a run that timed out, the tests that remain count as failed.
        memory_mb: memory of each process.
        partial: give a share of the tests, instead of 1 or 0.
        concurrency: programs at once.
        allow_unsandboxed: run the programs where this machine has no sandbox, too.
    """

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"concurrency", "allow_unsandboxed"})

    def __init__(
        self,
        *,
        column: str = "tests",
        language: str = "python",
        timeout: float = 10.0,
        memory_mb: int = 512,
        partial: bool = True,
        concurrency: int = 4,
        allow_unsandboxed: bool = False,
    ) -> None:
        if language != "python":
            raise JudgeError(f"judge 'code_tests': language {language!r} is not supported; only 'python' is")
        _check_positive("code_tests", timeout=timeout, memory_mb=memory_mb, concurrency=concurrency)
        if not allow_unsandboxed:
            require_sandbox()
        self.name, self.column, self.concurrency, self.partial = "code_tests", column, concurrency, partial
        self._limits: dict[str, Any] = {
            "timeout": timeout,
            "memory_mb": memory_mb,
            "allow_unsandboxed": allow_unsandboxed,
        }

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
                    return Abstention(
                        f"the column {self.column!r} is neither a text of tests, nor a list of texts, nor a list of "
                        "objects with `input` and `output`"
                    )
        except (SyntaxError, ValueError):
            return Abstention(f"the tests of column {self.column!r} are not valid Python")
        except SandboxError as error:
            return Abstention(f"the sandbox failed: {error}")
        return passed / len(tests) if self.partial else float(passed == len(tests))

    def _assertions(self, program: str, tests: list[str]) -> int:
        marks = [secrets.token_hex(16) for _ in tests]
        outcome = run_python(
            f"{HARNESS}\ncheck({program!r}, {tests!r}, {marks!r}, {REPORT})\n",
            max_output=max(1 << 16, 40 * len(tests)),
            **self._limits,
        )
        return len(set(marks) & set(outcome.report.split())) if outcome.ok else 0

    def _runs(self, program: str, tests: list[dict[str, Any]]) -> int:
        passed = 0
        for test in tests:
            wanted = str(test["output"])
            outcome = run_python(
                program, stdin=str(test["input"]), max_output=max(1 << 16, 8 * len(wanted)), **self._limits
            )
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
    blocks = _blocks(completion)
    for languages in (("python", "py", "python3"), ("",)):
        if found := [text for language, text in blocks if language in languages]:
            return found[-1]
    return completion


FENCE = re.compile(r"^[ \t]*```[ \t]*([^\s`]*)[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks: (language, content). A last one that is never closed, as of a truncated completion, counts."""
    return [(m[1].lower(), textwrap.dedent(m[2])) for m in FENCE.finditer(text)]


def _split_tests(text: str) -> list[str]:
    """Each top-level `assert` with the statements since the one before; what follows the last goes with it.

    Raises:
        SyntaxError, ValueError: it is not Python.
    """
    body = ast.parse(text).body
    ends = [i for i, node in enumerate(body) if isinstance(node, ast.Assert)][:-1]
    parts = [body[start:end] for start, end in itertools.pairwise([0, *(i + 1 for i in ends), len(body)])]
    return ["\n".join(map(ast.unparse, part)) for part in parts]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _texts(gold: Any) -> list[str]:
    return [str(text) for text in (gold if isinstance(gold, list | tuple) else [gold])]


def _check_positive(judge: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise JudgeError(f"judge {judge!r}: {key} is {value}; it must be more than 0")


def _need(judge: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise JudgeError(f"judge {judge!r} needs the package {package}: pip install {package!r}")

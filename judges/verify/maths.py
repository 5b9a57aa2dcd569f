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
from judges.verify.latex import (
    Expression,
    boxes,
    choice,
    expression,
    gold_expression,
    in_base,
    is_name,
    same_text,
    sides,
)


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

    A completion without an expression, or with an empty box, scores 0. A gold expression is used whole: its words,
    matrices, units and bases count. A percentage is its number or its hundredth. Boxes that stand together are one
    answer. Abstentions: a gold text that does not parse, unless the answer repeats it; different units; a base, or a
    letter that may be a unit, on one side alone; an inequality on one side and an interval on the other, which may echo
    the question; words beside an answer; a comparison that takes too long. Comparisons run in child processes, which are
    killed at the timeout.
    """

    name = "math"
    REVISION = 3
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
    wanted = [found for gold in golds if (found := gold_expression(gold))]
    if not wanted:
        return Compared(reason=UNPARSED)
    boxed = boxes(completion)
    if boxed and not re.search(r"\w", EMPTY.sub("", boxed[-1])):
        return Compared(0.0)  # an empty box; math-verify would look elsewhere
    answer = expression(",".join(boxed)) if boxed else None
    unclear = ""
    for gold in wanted:
        try:
            if equal(gold, answer, completion):
                return Compared(1.0)
        except Unclear as error:
            unclear = str(error)
    return Compared(reason=unclear) if unclear else Compared(0.0)


UNPARSED = "the gold expression cannot be parsed"
EMPTY = re.compile(r"\\(?:text|textbf|mathrm|mbox|left|right|q?quad|phantom)(?![A-Za-z])")


class Unclear(ValueError):
    """Why a gold expression and an answer cannot be compared."""


def equal(gold: Expression, answer: Expression | None, completion: str) -> bool:
    """Whether `answer`, from a box, or else what math-verify finds in the completion, equals a gold expression.

    Raises:
        Unclear: no comparison is possible.
    """
    readable = not gold.words and bool(parsed(gold.latex))
    if answer is None:
        if not readable or in_base(gold.latex):
            raise Unclear(UNPARSED)
        with contextlib.suppress(Exception):  # what parses it is a grammar's runtime, and sympy, on any text at all
            from math_verify import parse

            return same(parsed(gold.latex), parse(completion.replace(r"\$", ""), parsing_timeout=None))
        return False
    if same_text(gold.latex, answer.latex):
        return units_agree(gold, answer)
    options = choice(gold.latex), choice(answer.latex)
    if None not in options:
        return options[0] == options[1]
    if in_base(gold.latex) or in_base(answer.latex):
        return same_in_base(gold.latex, answer.latex)
    if not readable:
        raise Unclear(UNPARSED)
    if answer.words and re.search("[0-9]", answer.latex):
        raise Unclear("the answer has words beside its expression")
    for long, short in ((gold, answer), (answer, gold)):
        if (found := BARE_LETTER.fullmatch(long.latex)) and same_text(found[1], short.latex):
            raise Unclear(f"{found[2]!r} may be a unit or a factor")
    if "%" in (gold.unit, answer.unit) and gold.unit != answer.unit:
        shares = [rf"\frac{{{side.latex}}}{{100}}" if side.unit == "%" else side.latex for side in (gold, answer)]
        return answer_equals(gold.latex, answer.latex) or answer_equals(*shares)
    return answer_equals(gold.latex, answer.latex) and units_agree(gold, answer)


BARE_LETTER = re.compile(r"(.*[0-9}])\s+([A-Za-z])")


def units_agree(gold: Expression, answer: Expression) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        raise Unclear(f"the units {gold.unit!r} and {answer.unit!r} differ")
    return True


def same_in_base(gold: str, answer: str) -> bool:
    """Numbers with a base: `1011_2` equals itself alone; without a base on one side, the digits must differ to tell."""
    one, other = in_base(gold), in_base(answer)
    digits = [found[0] if found else re.sub(r"\s", "", text).upper() for found, text in ((one, gold), (other, answer))]
    if one and other:
        return one == other
    if digits[0] == digits[1]:
        raise Unclear("the base is given on one side alone")
    return False


def answer_equals(gold: str, answer: str) -> bool:
    """Whether two expressions are equal. The name on the left of an equation does not count if one side has none."""
    gold_sides, answer_sides = sides(gold), sides(answer)
    if len(gold_sides) == len(answer_sides) == 1 or "," in gold + answer:
        return same(parsed(gold), parsed(answer))
    if len(gold_sides) == 2 and len(answer_sides) == 2 and not (is_name(gold_sides[0]) and is_name(answer_sides[0])):
        return same_equation(gold_sides, answer_sides)
    if len(gold_sides) == 2 and len(answer_sides) == 2 and not same_text(gold_sides[0], answer_sides[0]):
        return False  # x = 5 and y = 5
    for named, bare in ((gold_sides, answer_sides), (answer_sides, gold_sides)):
        if len(named) == 2 and len(bare) == 1 and not is_name(named[0]):
            # 2 + 3 = 5 is 5; 4 = 5 is nothing, and neither is x + y = 5.
            return same(parsed(named[0]), parsed(named[1])) and same(parsed(named[1]), parsed(bare[0]))
    chain = answer_sides[1:] if is_name(answer_sides[0]) and len(answer_sides) > 1 else answer_sides
    return all(same(parsed(gold_sides[-1]), parsed(part)) for part in chain)


def same_equation(one: list[str], other: list[str]) -> bool:
    """Whether two equations have the same solutions, as far as they differ by a factor that is a number."""
    import sympy

    differences = []
    for sides_ in (one, other):
        left, right = (parsed(side) for side in sides_)
        if not left or not right:
            raise Unclear("an equation cannot be parsed")
        differences.append(left[0] - right[0])
    if any(difference == 0 for difference in differences):
        return False
    ratio = sympy.simplify(differences[0] / differences[1])
    return bool(ratio.is_number and ratio != 0)


def same(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    if not gold or not answer:
        return False
    with contextlib.suppress(Exception):
        if verify(gold, answer, timeout_seconds=None):
            return True
    echoed = False
    if any(getattr(each[0], "is_Relational", False) for each in (gold, answer)):
        with contextlib.suppress(Exception):
            echoed = verify(answer, gold, timeout_seconds=None)
    if echoed:
        raise Unclear("one is an inequality, and the other its solution")
    return False


def parsed(latex: str) -> list[Any]:
    """An expression as math-verify has it, all of `latex`; nothing if it does not parse."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    if re.search(r"(?<![_^])[0-9]\s+[0-9]", latex):
        return []  # it would be their sum, as of a mixed number
    whole = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    with contextlib.suppress(Exception):
        found: list[Any] = parse(
            f"\\boxed{{{latex}}}",
            [LatexExtractionConfig(normalization_config=whole)],
            parsing_timeout=None,
            fallback_mode="no_fallback",
        )
        return found
    return []


if __name__ == "__main__":
    # Resource limits of last resort: a tower of powers may ask for all memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)  # that its timeouts are off; that an expression does not parse
    serve({WarmUp: warm_up, Compare: compare_in_time})

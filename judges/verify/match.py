"""Whether a completion is a text, matches a pattern, or ends in a number, and what counts as a number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from iterdpo.errors import JudgeError
from judges.base import Abstention
from judges.verify.base import Score, Verifier, texts_of


class ExactMatch(Verifier):
    """1 if the completion is the gold text, or one of them if the column has a list.

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
        return float(self._plain(completion) in map(self._plain, texts_of(gold)))

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class Regex(Verifier):
    """1 if the completion has a match of a pattern, in the syntax of the package `regex` (Python's, and more).

    Flags stand in the pattern: `(?i)` for either case, `(?m)` and `(?s)` for lines. A match that takes longer than
    two seconds abstains, and so does an invalid pattern in a column.

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


class NumericMatch(Verifier):
    """1 if the completion's last number is the gold number, or one of them if the column has a list.

    After `####`, as GSM8K writes it, the first number counts instead. Thousands separators, fractions, percent signs,
    powers of ten, currencies and units are understood (see `last_number`). If one side alone has a percent sign,
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
        wanted = [last_number(text) for text in texts_of(gold)]
        if None in wanted:
            return Abstention(f"no number in the column {self.column!r}")
        found = last_number(completion)
        return float(found is not None and any(self._same(found, number) for number in wanted if number))

    def _same(self, found: tuple[Fraction, bool], gold: tuple[Fraction, bool]) -> bool:
        (value, percent), (target, gold_percent) = found, gold
        values = [value, value / 100] if percent and not gold_percent else [value]
        targets = [target, target / 100] if gold_percent and not percent else [target]
        return any(abs(v - t) <= max(self.tolerance, self.relative * abs(t)) for v in values for t in targets)


NUMBER = re.compile(
    r"""
    (?<![A-Za-z_0-9.^]) (?<!\^\{)                        # not part of a name (x2, km2), a number or an exponent
    (?P<sign>(?<![0-9)\]])[-+])? [$€£¥]? (?P<sign2>-)?
    (?P<number>
        [0-9]{1,3}(?:[,\u00a0\u202f][0-9]{3})+(?:\.[0-9]+)?(?![0-9])   # 1,234,567.8
      | [0-9]+(?:\.[0-9]+)? | \.[0-9]+
    )
    (?: [eE](?P<exponent>[-+]?[0-9]{1,3}(?![0-9A-Za-z]))
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
    `"−$5"` (a Unicode minus) is -5. A hyphen after a digit or before a space is no sign:
    `"10-5"` and `"10 - 5"` end in 5. A digit that is part of a name or an exponent is no number: `"5 m^2"` is 5.
    """
    text = text.translate({0x2212: "-", 0x2013: "-", 0xFF0D: "-"})
    _, marked, rest = text.rpartition("####")  # without a mark, the rest is all of it
    if not (matches := list(NUMBER.finditer(rest))):
        return None
    part = matches[0 if marked else -1].groupdict()
    if len(part["number"]) > 400:
        return None
    value = Fraction(re.sub("[,\u00a0\u202f]", "", part["number"]))
    if power := part["exponent"] or part["power"]:
        value *= Fraction(10) ** int(power)
    elif part["ten"] and value == 10:
        value = Fraction(10) ** int(part["ten"])
    elif part["below"] and int(part["below"]):
        value /= int(part["below"])
    elif part["under"] and int(part["under"]):
        value += Fraction(int(part["over"]), int(part["under"]))
    negative = "-" in (part["sign"], part["sign2"])
    return (-value if negative else value), bool(part["percent"])

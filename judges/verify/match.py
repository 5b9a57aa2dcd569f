"""Whether a completion is a text, or matches a pattern."""

from __future__ import annotations

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

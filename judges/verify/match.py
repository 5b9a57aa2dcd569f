"""Whether a completion is a text, matches a pattern or a schema, or ends in a number, and what counts as a number."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError
from judges.base import Abstention
from judges.verify.base import Score, Verifier, fenced_blocks, texts_of


@dataclass(eq=False, repr=False, kw_only=True)
class ExactMatch(Verifier):
    """1 if the completion is the gold text, or one of them if the column has a list."""

    name = "exact_match"
    column: str = "gold"
    """The prompt's column with the gold text."""
    ignore_case: bool = False
    """Compare without regard to case."""
    strip: bool = True
    """Compare without the white space around both."""
    last_line: bool = False
    """Compare the completion's last line that is not blank, instead of all of it."""

    def score(self, completion: str, gold: Any) -> Score:
        if self.last_line:
            completion = next((line for line in reversed(completion.splitlines()) if line.strip()), "")
        return float(self._plain(completion) in map(self._plain, texts_of(gold)))

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


@dataclass(eq=False, repr=False, kw_only=True)
class Regex(Verifier):
    """1 if the completion has a match of a pattern, in the syntax of the package `regex` (Python's, and more).

    Flags stand in the pattern: `(?i)` for either case, `(?m)` and `(?s)` for lines. A match that takes longer than
    two seconds abstains, and so does an invalid pattern in a column.
    """

    name = "regex"
    SECONDS = 2.0
    pattern: str | None = None
    column: str | None = None
    """Or the prompt's column that has the pattern."""
    full: bool = False
    """The whole completion must match, not just a part of it."""

    def __post_init__(self) -> None:
        import regex

        if (self.pattern is None) == (self.column is None):
            raise JudgeError("judge 'regex': give one of `pattern` and `column`")
        try:
            regex.compile(self.pattern or "")
        except regex.error as error:
            raise JudgeError(f"judge 'regex': the pattern {self.pattern!r} is not valid: {error}") from None

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


@dataclass(eq=False, repr=False, kw_only=True)
class JSONSchema(Verifier):
    """1 if the completion is JSON that satisfies a schema, of any draft that `$schema` names (else the newest).

    If the completion has one fenced block of JSON, that block counts. NaN and infinities are not JSON. A reference out of
    the schema is never fetched: the completion abstains.
    """

    name = "json_schema"
    schema: dict[str, Any] | None = None
    path: str | None = None
    """Or a file that has the schema."""
    column: str | None = None
    """Or the prompt's column that has it, as an object or as JSON text."""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.schema, self.path, self.column)) != 1:
            raise JudgeError("judge 'json_schema': give one of `schema`, `path` and `column`")
        if self.path is not None:
            try:
                self.schema = json.loads(Path(self.path).read_text())
            except (OSError, ValueError) as error:
                raise JudgeError(f"judge 'json_schema': path {self.path}: {error}") from None
        if self.column is None and (problem := _schema_problem(self.schema)):
            raise JudgeError(f"judge 'json_schema': {problem}")

    def score(self, completion: str, gold: Any) -> Score:
        from jsonschema_specifications import REGISTRY  # no more schemas than the drafts' own, and none fetched
        from referencing.exceptions import Unresolvable

        schema = self.schema if self.column is None else gold
        if self.column is not None and (problem := _schema_problem(schema)):
            return Abstention(f"the column {self.column!r}: {problem}")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        blocks = [text for language, text in fenced_blocks(completion) if language in ("", "json")]
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else completion, parse_constant=int)  # int("NaN") raises
        except (ValueError, RecursionError):
            return 0.0
        try:
            return float(_draft(schema)(schema, registry=REGISTRY).is_valid(value))
        except Unresolvable as error:
            return Abstention(f"the schema refers to {error.ref!r}, which it does not have; nothing is fetched")
        except RecursionError:
            return Abstention("the schema, or the JSON, is nested too deeply to check")


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


@dataclass(eq=False, repr=False, kw_only=True)
class NumericMatch(Verifier):
    """1 if the completion's last number is the gold number, or one of them if the column has a list.

    After `####`, as GSM8K writes it, the first number counts instead. Thousands separators, fractions, percent signs,
    powers of ten, currencies and units are understood (see `last_number`). If one side alone has a percent sign,
    50% is both 50 and 0.5. A completion without a number scores 0; a gold text without one abstains.
    """

    name = "numeric_match"
    column: str = "gold"
    """The prompt's column with the gold number, or a text that ends in it."""
    tolerance: float = 1e-6
    """How far apart the two may be."""
    relative: float = 0.0
    """How far apart they may be as a share of the gold number; the larger of both counts."""

    def __post_init__(self) -> None:
        for key in ("tolerance", "relative"):
            if not 0 <= (value := getattr(self, key)) < float("inf"):
                raise JudgeError(f"judge 'numeric_match': {key} is {value}; it must be 0 or more")

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
        absolute, relative = Fraction(self.tolerance), Fraction(self.relative)
        return any(abs(v - t) <= max(absolute, relative * abs(t)) for v in values for t in targets)


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

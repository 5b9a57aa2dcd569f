"""Whether a completion is a text, matches a pattern or a schema, or ends in a number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError
from judges.base import Abstention
from judges.verify.base import Score, Verifier, fenced_blocks, texts_of
from judges.verify.numbers import Number, Unreadable, gold_number, last_number


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
    r"""1 if the completion's last number is the gold number, or one of them if the column has a list.

    After `####`, as GSM8K writes it, the first number counts instead. Thousands separators, fractions, mixed numbers,
    ratios, roots, pi, powers, percent signs, currencies and units are understood, in LaTeX and in Unicode (see
    `last_number`). If
    one side alone has a percent sign, 50% is both 50 and 0.5. A completion without a number scores 0. Abstentions: a
    gold text without a number, with several, or about one (`x > 3`), and a number on either side that is part of
    something else, such as `\log 5` or `2x`.
    """

    name = "numeric_match"
    REVISION = 3
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
        try:
            wanted = [gold_number(text) for text in texts_of(gold)]
        except Unreadable as error:
            return Abstention(f"the column {self.column!r}: {error}")
        if None in wanted:
            return Abstention(f"no number in the column {self.column!r}")
        try:
            found = last_number(completion)
        except Unreadable as error:
            return Abstention(f"the completion: {error}")
        return float(found is not None and any(self._same(found, number) for number in wanted if number))

    def _same(self, found: Number, gold: Number) -> bool:
        if len(found.parts) != len(gold.parts):
            return False
        if len(gold.parts) > 1:  # a ratio or a time: as it is written
            return found.parts == gold.parts
        (value,), (target,) = found.parts, gold.parts
        values = [value, value / 100] if found.percent and not gold.percent else [value]
        targets = [target, target / 100] if gold.percent and not found.percent else [target]
        absolute, relative = Fraction(self.tolerance), Fraction(self.relative)
        return any(abs(v - t) <= max(absolute, relative * abs(t)) for v in values for t in targets)

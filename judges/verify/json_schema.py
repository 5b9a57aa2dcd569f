"""Whether a completion is JSON that satisfies a schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError
from judges.base import Abstention
from judges.verify.base import Score, Verifier, fenced_blocks


class JSONSchema(Verifier):
    """1 if the completion is JSON that satisfies a schema, of any draft that `$schema` names (else the newest).

    If the completion has one fenced block of JSON, that block counts. NaN and infinities are not JSON. A reference out of
    the schema is never fetched: the completion abstains.

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
        blocks = [text for language, text in fenced_blocks(completion) if language in ("", "json")]
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else completion, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        try:
            return float(_draft(schema)(schema, registry=REGISTRY).is_valid(value))
        except Unresolvable as error:
            return Abstention(f"the schema refers to {error.ref!r}, which it does not have; nothing is fetched")
        except RecursionError:
            return Abstention("the schema, or the JSON, is nested too deeply to check")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


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

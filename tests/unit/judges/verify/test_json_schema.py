"""JSON and schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify.json_schema import JSONSchema
from tests.unit.judges.verify.harness import reason, scores


class TestJSONSchema:
    SCHEMA: Any = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}  # noqa: RUF012

    def test_json_that_satisfies_the_schema(self) -> None:
        completions = ['{"age": 4}', '{"age": "4"}', "{}", '{"age": 4', "", "[" * 100_000, '{"age": NaN}']
        assert scores(JSONSchema(schema=self.SCHEMA), *completions) == [1, 0, 0, 0, 0, 0, 0]

    def test_one_fenced_block_counts_and_two_do_not(self) -> None:
        block = '```json\n{"age": 4}\n```'
        assert scores(JSONSchema(schema=self.SCHEMA), f"Here:\n{block}\nDone.", f"{block}\n{block}") == [1, 0]

    def test_from_a_file_or_a_column(self, tmp_path: Path) -> None:
        (tmp_path / "s.json").write_text(json.dumps(self.SCHEMA))
        assert scores(JSONSchema(path=str(tmp_path / "s.json")), '{"age": 4}') == [1]
        for column in (self.SCHEMA, json.dumps(self.SCHEMA)):
            assert scores(JSONSchema(column="s"), '{"age": 4}', "{}", s=column) == [1, 0]
        assert "not a JSON schema" in reason(JSONSchema(column="s"), "{}", s={"type": "objekt"})
        assert "not JSON" in reason(JSONSchema(column="s"), "{}", s="{")

    def test_references_within_work_and_others_are_not_fetched(self) -> None:
        local = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
        assert scores(JSONSchema(schema=local), "4", '"4"') == [1, 0]
        remote = JSONSchema(schema={"$ref": "http://127.0.0.1:9/schema.json"})
        assert "nothing is fetched" in reason(remote, "4")

    def test_what_is_wrong_is_said_before_the_run(self, tmp_path: Path) -> None:
        with pytest.raises(JudgeError, match="one of `schema`, `path` and `column`"):
            JSONSchema.check()
        with pytest.raises(JudgeError, match="not a JSON schema"):
            JSONSchema.check(schema={"type": "objekt"})
        with pytest.raises(JudgeError, match=r"nothing\.json"):
            JSONSchema.check(path=str(tmp_path / "nothing.json"))

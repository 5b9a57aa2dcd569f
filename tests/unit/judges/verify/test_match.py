"""Texts, patterns, JSON and schemas, and numbers in texts."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify.match import ExactMatch, JSONSchema, NumericMatch, Regex, last_number
from tests.unit.judges.verify.harness import reason, scores


class TestExactMatch:
    def test_space_around_is_no_difference_and_case_is_one(self) -> None:
        assert scores(ExactMatch(), " Paris\n", "paris", "Paris.", gold="Paris") == [1, 0, 0]
        assert scores(ExactMatch(ignore_case=True), "PARIS", gold="Paris") == [1]
        assert scores(ExactMatch(strip=False), "Paris ", "Paris", gold="Paris") == [0, 1]

    def test_any_of_a_list_counts_and_a_number_is_its_text(self) -> None:
        assert scores(ExactMatch(), "a", "b", "c", gold=["a", "b"]) == [1, 1, 0]
        assert scores(ExactMatch(column="n"), "4", n=4) == [1]

    def test_the_last_line_alone(self) -> None:
        assert scores(ExactMatch(last_line=True), "Let me think.\n42\n\n", "42\nor not", "", gold="42") == [1, 0, 0]


class TestRegex:
    def test_a_part_or_the_whole_matches(self) -> None:
        assert scores(Regex(pattern=r"\d+"), "a 1", "a") == [1, 0]
        assert scores(Regex(pattern=r"\d+", full=True), "a 1", "11") == [0, 1]
        assert scores(Regex(column="p"), "abc", "xyz", p="(?i)B") == [1, 0]

    def test_a_bad_pattern_is_refused_before_the_run_or_abstains(self) -> None:
        with pytest.raises(JudgeError, match=r"'\(' is not valid"):
            Regex.check(pattern="(")
        with pytest.raises(JudgeError, match="one of `pattern` and `column`"):
            Regex.check()
        assert "not valid" in reason(Regex(column="p"), "abc", p="(")

    def test_a_pattern_that_backtracks_for_ever_abstains(self) -> None:
        judge = Regex(pattern=r"^(a|a)*$")
        judge.SECONDS = 0.2
        assert reason(judge, "a" * 60 + "!") == "the pattern took longer than 0.2 s to match"


class TestNumericMatch:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("It is 42.", 42),
            ("first 3, then 4", 4),
            ("#### 42\nNext question: 17", 42),
            ("#### 1,234", 1234),
            ("1,234,567.5 people", "1234567.5"),
            ("1\u202f234", 1234),
            ("a list 1,2,3", 3),
            ("3.14", "3.14"),
            (".5", "0.5"),
            ("-7", -7),
            ("−7", -7),
            ("x=-7", -7),
            ("10-5", 5),
            ("10 - 5", 5),
            ("GPT-4", 4),
            ("$5.50", "5.5"),
            ("-$5", -5),
            ("$-5", -5),
            ("€5", 5),
            ("$42$", 42),
            (r"\boxed{42}", 42),
            ("**42**", 42),
            ("42km", 42),
            ("42 km2", 42),
            ("5 m^2", 5),
            ("3/4", "3/4"),
            ("-3/4", "-3/4"),
            ("1 1/2", "3/2"),
            ("1/0", 1),
            ("1e3", 1000),
            ("2.5E-3", "0.0025"),
            ("2.5 × 10^-3", "0.0025"),
            (r"2.5 \times 10^{4}", 25000),
            ("10^6", 1000000),
            ("答案是42", 42),
            ("12345678901234567890", 12345678901234567890),
            ("9:30", 30),
            ("007", 7),
        ],
    )
    def test_the_last_number_is_read(self, text: str, number: int | str) -> None:
        found = last_number(text)
        assert found is not None
        assert found[0] == Fraction(number)

    def test_a_text_without_a_number_has_none(self) -> None:
        assert [last_number(t) for t in ("", "none", "x2", "####", "H_2")] == [None] * 5

    @pytest.mark.parametrize("piece", ["9", "1,", "-", "1/", " 1 "])
    def test_a_hostile_text_takes_time_in_proportion_to_its_length(self, piece: str) -> None:
        def seconds(length: int) -> float:
            text = (piece * length)[:length]
            begin = time.process_time()
            last_number(text)
            return time.process_time() - begin

        seconds(1_000)
        short, long = (min(seconds(length) for _ in range(3)) for length in (20_000, 640_000))
        assert long < 200 * short + 0.01  # 32 times, and 1,024 times if it were quadratic

    def test_an_exponent_has_three_digits_at_most(self) -> None:
        assert last_number("1e999") == (Fraction(10) ** 999, False)
        assert last_number("1e999999999") == (1, False)

    def test_tolerances(self) -> None:
        assert scores(NumericMatch(), "0.3333333", "0.33", gold="1/3") == [1, 0]
        assert scores(NumericMatch(tolerance=0.5), "41.5", "41.4", gold=42) == [1, 0]
        assert scores(NumericMatch(relative=0.01), "1010", "1011", gold=1000) == [1, 0]
        assert scores(NumericMatch(tolerance=0), "12345678901234567890", "12345678901234567891", gold="12345678901234567890") == [1, 0]  # fmt: skip

    def test_a_percent_sign_on_one_side_may_be_a_unit_or_a_hundredth(self) -> None:
        assert scores(NumericMatch(), "50%", "50", "0.5", gold="50") == [1, 1, 0]
        assert scores(NumericMatch(), "50%", "50", "0.5", gold="0.5") == [1, 0, 1]
        assert scores(NumericMatch(), "50%", "50", "0.5", r"50\%", gold="50%") == [1, 1, 1, 1]
        assert scores(NumericMatch(), "0.5%", gold="50%") == [0]

    def test_gold_forms(self) -> None:
        assert scores(NumericMatch(), "18", "19", "eighteen", gold="She has 9 * 2 = 18.\n#### 18") == [1, 0, 0]
        assert scores(NumericMatch(), "2", "3", "4", gold=[2, "3"]) == [1, 1, 0]
        assert scores(NumericMatch(), "0", "1", gold=0) == [1, 0]
        assert reason(NumericMatch(), "4", gold="four") == "no number in the column 'gold'"

    def test_a_negative_tolerance_is_refused(self) -> None:
        with pytest.raises(JudgeError, match="tolerance is -1"):
            NumericMatch.check(tolerance=-1)


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

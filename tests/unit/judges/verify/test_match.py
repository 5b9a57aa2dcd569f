"""Texts, patterns, JSON and schemas, and numbers that are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify.match import ExactMatch, JSONSchema, NumericMatch, Regex
from tests.unit.judges.verify.harness import reason, scores
from tests.unit.judges.verify.maths_pairs import NUMBERS, labelled


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
    def test_tolerances(self) -> None:
        assert scores(NumericMatch(), "0.3333333", "0.33", gold="1/3") == [1, 0]
        assert scores(NumericMatch(tolerance=0.5), "41.5", "41.4", gold=42) == [1, 0]
        assert scores(NumericMatch(relative=0.01), "1010", "1011", gold=1000) == [1, 0]
        assert scores(NumericMatch(tolerance=0), "12345678901234567890", "12345678901234567891", gold="12345678901234567890") == [1, 0]  # fmt: skip

    def test_of_pairs_of_all_kinds_none_matches_falsely_and_none_is_missed(self) -> None:
        pairs = [pair for rows in NUMBERS.values() for row in rows for pair in labelled(row)]
        found = [(gold, answer, scores(NumericMatch(), answer, gold=gold)[0]) for gold, (answer, _) in pairs]
        assert [f for f, (_, (_, wanted)) in zip(found, pairs, strict=True) if f[2] not in (None, wanted)] == []
        right = [f for f, (_, (_, wanted)) in zip(found, pairs, strict=True) if wanted]
        assert sum(score is None for *_, score in right) < len(right) / 15

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

    def test_latex_ratios_times_and_powers_are_read_whole(self) -> None:
        for gold, right, wrong in (
            (r"\frac{3}{4}", ["3/4", "0.75", r"$\dfrac34$"], ["4", "3"]),
            (r"2\sqrt{3}", [r"$2\sqrt{3}$", "3.4641016", "2√3"], ["3", "2"]),
            (r"2\pi", ["6.2831853", r"$2\pi$"], ["2"]),
            ("3:4", ["3:4", "It is 3 : 4."], ["1:4", "4", "4:3"]),
            ("12:30", ["at 12:30"], ["11:30", "30"]),
            ("2", ["2", r"\boxed{2}"], ["2^3", "2:1"]),
            ("8", ["2^3", "$2^{3}$"], ["3"]),
            ("1000", ["$1{,}000$", r"$1,\!000$", r"1\,000", "1'000"], ["0", "1"]),
            ("2.5", [r"$2\frac{1}{2}$", "2 1/2"], ["1/2"]),
        ):
            assert scores(NumericMatch(), *right, gold=gold) == [1] * len(right), gold
            assert scores(NumericMatch(), *wrong, gold=gold) == [0] * len(wrong), gold

    def test_a_number_that_is_part_of_something_else_abstains_on_either_side(self) -> None:
        for text in (r"\log 5", "(2/3)^2", "101_2", r"\sqrt{2x}", r"3 \pm 2", r"\frac{x}{2}", "2+3i", "5 √x"):
            assert scores(NumericMatch(), text, gold="5") == [None], text
            assert "not read" in reason(NumericMatch(), "5", gold=text) or "several" in reason(
                NumericMatch(), "5", gold=text
            )

    def test_a_gold_text_with_several_numbers_and_no_words_abstains(self) -> None:
        for gold in (
            "(1, 2)",
            "3 or 4",
            r"10\text{ or }12",
            "1,2,3",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            "2020-01-05",
        ):
            assert "several numbers" in reason(NumericMatch(), "2", gold=gold), gold
        assert scores(NumericMatch(), "18", gold="9 * 2 = 18") == [1]

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

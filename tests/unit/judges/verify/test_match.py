"""Texts and patterns."""

from __future__ import annotations

import pytest

from iterdpo.errors import JudgeError
from judges.verify.match import ExactMatch, Regex
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

"""Mathematical expressions, with real processes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify.maths import Math
from tests.unit.judges.verify.harness import reason, scores
from tests.unit.judges.verify.maths_pairs import MATHS, completion_of, labelled


class TestMath:
    @pytest.fixture(scope="class")
    def judge(self) -> Any:
        pytest.importorskip("math_verify")
        judge = Math()
        yield judge
        judge.close()

    def test_equal_expressions_match_whatever_their_form(self, judge: Math) -> None:
        completions = [
            r"So it is $\boxed{\frac{1}{2}}$.",
            "The answer is 0.5",
            r"$\frac{2}{4}$",
            r"$\boxed{2}$",
            "no idea",
        ]
        assert scores(judge, *completions, gold=r"\frac{1}{2}") == [1, 1, 1, 0, 0]
        assert scores(judge, r"\boxed{x^2+2x+1}", r"\boxed{x^2}", gold="$(x+1)^2$") == [1, 0]
        assert scores(judge, r"$\boxed{\{2, 1\}}$", gold=r"\{1, 2\}") == [1]
        assert scores(judge, "12", gold=12) == [1]

    def test_any_of_a_list_counts(self, judge: Math) -> None:
        assert scores(judge, "3", "4", "5", gold=["3", "4"]) == [1, 1, 0]

    def test_a_gold_text_that_does_not_parse_abstains(self, judge: Math) -> None:
        assert reason(judge, "4", gold="it depends") == "the gold expression cannot be parsed"

    def test_it_works_outside_the_main_thread(self, judge: Math) -> None:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(scores(judge, "4", "5", gold="4")))
        thread.start()
        thread.join()
        assert found == [[1, 0]]

    def test_a_comparison_that_never_ends_abstains_and_the_next_one_works(self) -> None:
        pytest.importorskip("math_verify")
        judge = Math(timeout=1, concurrency=1)
        try:
            scores(judge, "1", gold="1")
            why = reason(judge, r"$\boxed{(10^{10})!}$", gold="2")  # sympy starts to multiply
            assert why == "the comparison did not end within 1 s, or ran out of memory"
            assert scores(judge, "4", gold="4") == [1]
        finally:
            judge.close()

    def test_gold_latex_may_be_bare(self, judge: Math) -> None:
        for gold in ("x^2+1", "$x^2+1$", r"\boxed{x^2+1}", r"\(x^2+1\)"):
            assert scores(judge, r"$\boxed{1+x^2}$", r"$\boxed{x^2}$", gold=gold) == [1, 0], gold
        assert scores(judge, r"$\boxed{(1, \pi)}$", r"$\boxed{(\pi, 1)}$", gold=r"(1, \pi)") == [1, 0]

    def test_a_gold_expression_is_used_whole(self, judge: Math) -> None:
        vector, matrix = r"\begin{pmatrix} 1 \\ 0 \\ 5 \end{pmatrix}", r"\begin{pmatrix} 2 & 0 \\ 0 & 6 \end{pmatrix}"
        for gold, right, wrong in (
            (
                vector,
                [vector, vector.replace("pmatrix", "bmatrix")],
                ["5", "1", r"\begin{pmatrix} 1 \\ 0 \\ 4 \end{pmatrix}"],
            ),
            (matrix, [matrix], ["6", "2"]),
            (
                r"5\sqrt{2} \text{ cm}",
                [r"5\sqrt{2}", r"5\sqrt{2}\text{ cm}", r"\sqrt{50}"],
                ["5", "2", r"5\sqrt{3}\text{ cm}"],
            ),
            (r"10\text{ or }12", ["10, 12", r"12 \text{ or } 10", "10 or 12"], ["10", "12", "10, 13"]),
            ("xy+1", ["1+xy"], ["1", "x+1"]),
            (r"\frac{ab}{c}", [r"\frac{ab}{c}", r"\frac{ba}{c}"], [r"\frac{a}{c}", "1"]),
            ("2ab", ["2ab", "2ba"], ["2", "2a"]),
            (r"\$5.50", ["5.50", r"\$5.5", "5.5"], ["5", "50"]),
            (r"$\$1{,}000$", ["1000", "1,000"], ["1", "0"]),
            (r"\text{Tuesday}", [r"\text{Tuesday}", "Tuesday"], []),
            (r"90^\circ", ["90", r"90^\circ"], ["9"]),
            ("x=5", ["5", "x=5", "x = 5"], ["y=5", "x=4", "4=5", "0=0"]),
            ("5", ["5", "x=5", "2+3=5"], ["4=5", "x+y=5", "5=5=4"]),
            ("x+y=3", ["x+y=3", "2x+2y=6", "y=3-x"], ["x+y=4", "3", "0=0"]),
            ("1011_2", ["1011_2", "1011_{2}"], ["1011_3", "11_2", "11"]),
        ):
            wrapped = [rf"So it is $\boxed{{{answer}}}$." for answer in (*right, *wrong)]
            assert scores(judge, *wrapped, gold=gold) == [1] * len(right) + [0] * len(wrong), gold

    def test_an_empty_box_scores_0_whatever_the_text_says(self, judge: Math) -> None:
        assert scores(judge, r"2 + 2 = 4. $\boxed{}$", r"4 $\boxed{ }$", gold="4") == [0, 0]

    def test_what_cannot_be_compared_abstains(self, judge: Math) -> None:
        assert reason(judge, r"$\boxed{1011}$", gold="1011_2") == "the base is given on one side alone"
        assert "the units" in reason(judge, r"$\boxed{5\text{ km}}$", gold=r"5\text{ cm}")
        assert reason(judge, r"$\boxed{3}$", gold="either 3 or maybe 4") == "the gold expression cannot be parsed"
        assert (
            reason(judge, r"$\boxed{3}$", gold="It is $3$, or rather $4$, who knows.")
            == "the gold expression cannot be parsed"
        )

    def test_of_more_than_272_pairs_none_matches_falsely_and_what_is_undecided_abstains(self, judge: Math) -> None:
        pairs = [(gold, *each) for rows in MATHS.values() for row in rows for gold, each in labelled(row)]
        assert len(pairs) >= 272
        mistaken, undecided = [], 0
        for gold, answer, wanted in pairs:
            (score,) = scores(judge, completion_of(answer), gold=gold)
            undecided += score is None
            if score not in (None, wanted):
                mistaken.append((gold, answer, score))
        assert mistaken == []
        assert undecided < len(pairs) / 15

    def test_boxes_that_belong_together_are_one_answer(self, judge: Math) -> None:
        both = r"$x = \boxed{2}$ or $x = \boxed{3}$"
        assert scores(judge, both, gold="2, 3") == [1]
        assert scores(judge, both, r"\boxed{1}, \boxed{2}, \boxed{3}", gold="3") == [0, 0]

    def test_what_may_be_a_unit_or_an_echo_of_the_question_abstains(self, judge: Math) -> None:
        assert reason(judge, r"$\boxed{5}$", gold="5 m") == "'m' may be a unit or a factor"
        assert (
            reason(judge, r"$\boxed{x < 3}$", gold=r"(-\infty, 3)")
            == "one is an inequality, and the other its solution"
        )
        assert (
            reason(judge, r"$\boxed{\text{it is 5 or so}}$", gold="5") == "the answer has words beside its expression"
        )

    def test_a_missing_package_is_named_before_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(JudgeError, match="pip install 'math-verify'"):
            Math.check()

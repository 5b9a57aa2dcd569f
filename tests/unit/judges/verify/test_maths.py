"""Mathematical expressions, with real processes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify.maths import Math
from tests.unit.judges.verify.harness import reason, scores


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

    def test_a_missing_package_is_named_before_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(JudgeError, match="pip install 'math-verify'"):
            Math.check()

"""Expressions before they are compared."""

from __future__ import annotations

from judges.verify.latex import Expression, boxes, expression, gold_expression, in_base, is_name, same_text, sides


def test_boxes_are_balanced() -> None:
    assert boxes(r"\boxed{\frac{1}{2}} and \fbox{3} \boxed{}") == [r"\frac{1}{2}", "3", ""]
    assert boxes(r"\boxed{\left\{1\right.") == [r"\left\{1\right."]


def test_units_dollars_and_spaces_do_not_count() -> None:
    assert expression(r"5\sqrt{2} \text{ cm}") == Expression(r"5\sqrt{2}", "cm", False)
    assert expression("3 cm") == Expression("3", "cm", False)
    assert expression(r"\$1{,}000").latex == "1000"
    assert expression(r"10\text{ or }12").latex.replace(" ", "") == "10,12"
    assert expression("2ab") == Expression("2ab", "", False)
    assert expression(r"\text{Tuesday}").words
    assert expression(r"\begin{pmatrix} 1 \\ 0 \end{pmatrix}").latex == r"\begin{pmatrix} 1 \\ 0 \end{pmatrix}"


def test_a_gold_text_has_one_expression_or_none() -> None:
    assert gold_expression("The answer is $5$.") == Expression("5", "", False)
    assert gold_expression("It is $5$, or rather $6$ then.") is None


def test_equations_and_bases_are_taken_apart() -> None:
    assert sides(r"x = 5") == ["x", "5"]
    assert len(sides(r"x \leq 5 >= 3 != 2")) == 1
    assert [is_name(text) for text in ("x", "f(x)", "x_1", r"\theta", "2", "x+y")] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert in_base("1011_{2}") == ("1011", "2")
    assert in_base("x_2") is None
    assert same_text(r"\text{Tuesday}", "tuesday")
    assert not same_text("x", "X")

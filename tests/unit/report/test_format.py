"""Numbers as the reports show them."""

from __future__ import annotations

import pytest

from iterdpo.report.format import number, percent


@pytest.mark.parametrize(
    ("x", "shown"),
    [(0.294, "0.29"), (0.0, "0.00"), (-0.0034, "-0.0034"), (9.5, "9.50"), (143.2, "143"), (-1234.5, "-1,234")],
)
def test_numbers_keep_the_digits_that_matter(x: float, shown: str) -> None:
    assert number(x) == shown


@pytest.mark.parametrize(("x", "shown"), [(0.71, "71"), (0.504, "50.4"), (0.5, "50"), (0.004, "0.4"), (1.0, "100")])
def test_percentages_do_not_round_onto_one_half(x: float, shown: str) -> None:
    assert percent(x) == f"{shown}\N{NO-BREAK SPACE}%"


def test_a_percentage_of_given_digits_keeps_them_and_may_go_without_its_unit() -> None:
    assert percent(0.5, digits=1) == "50.0\N{NO-BREAK SPACE}%"
    assert percent(0.95, unit=False) == "95"

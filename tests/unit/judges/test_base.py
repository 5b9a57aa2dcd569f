"""What all judges are made with."""

from __future__ import annotations

import math

import pytest

from iterdpo.errors import JudgeError
from iterdpo.testing import make_group
from judges.base import Abstention, check_choice, is_number, judgment_from_outcomes, nearest


def test_an_abstention_among_the_scores_gives_its_own_reason() -> None:
    judgment = judgment_from_outcomes(make_group("x", ["a", "b", "c"]), [1, Abstention("too long"), math.nan])
    assert judgment.scores == [1.0, None, None]
    assert judgment.abstentions == [None, "too long", "the judge returned nan"]


def test_a_value_that_is_no_choice_is_refused_with_the_choices() -> None:
    check_choice("judge 'x'", "orders", 2, [1, 2])
    with pytest.raises(JudgeError, match=r"^judge 'x': orders is 3; it is one of 1, 2$"):
        check_choice("judge 'x'", "orders", 3, [1, 2])


@pytest.mark.parametrize(
    ("value", "number"), [(1, True), (0.5, True), (True, False), ("1", False), (math.inf, False), (None, False)]
)
def test_only_a_finite_int_or_float_is_a_number(value: object, number: bool) -> None:
    assert is_number(value) is number


def test_the_nearest_names_are_suggested_and_all_of_them_if_none_is_near() -> None:
    assert nearest("batchsize", ["batch_size", "model"], "it accepts") == "did you mean 'batch_size'?"
    assert nearest("x", ["batch_size", "model"], "it accepts") == "it accepts: batch_size, model"
    assert nearest("x", [], "it accepts") == "it accepts: nothing"

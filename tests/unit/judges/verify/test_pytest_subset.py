"""The part of pytest in the sandbox, beside pytest's own."""

from __future__ import annotations

import pytest

from judges.verify import pytest_subset as subset


def test_approx_agrees_with_pytests() -> None:
    values = [
        1,
        1.0000001,
        1.1,
        float("nan"),
        float("inf"),
        0,
        1e-13,
        [1, 1.0000001],
        (1, 2),
        {"a": 1.0},
        "1",
        None,
        True,
    ]
    for expected in (1, 0, float("inf"), [1, 1], {"a": 1}):
        for value in values:
            if isinstance(value, tuple | list) and isinstance(expected, list) and type(value) is not list:
                continue
            assert (value == subset.approx(expected)) == (value == pytest.approx(expected)), (value, expected)
    assert subset.approx(1, abs=0.2) == 1.1
    assert subset.approx(1, rel=0.2) == 1.1


def test_raises_wants_the_exception_and_its_message() -> None:
    with subset.raises(ValueError, match="b+") as raised:
        raise ValueError("abbc")
    assert str(raised.value) == "abbc"
    for wrong in (lambda: None, lambda: int("x")):
        with pytest.raises((AssertionError, ValueError)), subset.raises(KeyError):
            wrong()


def test_parameters_and_fixtures_are_given_and_unknown_ones_refused() -> None:
    seen = []

    @subset.mark.parametrize("a, b", [(1, 2), subset.param(3, 4)])
    def test(a: int, b: int, c: int) -> None:
        seen.append((a, b, c))

    subset.call(test, {"c": subset.fixture(lambda: 5)})
    assert seen == [(1, 2, 5), (3, 4, 5)]
    with pytest.raises(subset.Unsupported, match="'c'"):
        subset.call(test, {})
    with pytest.raises(subset.Unsupported, match="skip"):
        _ = subset.skip

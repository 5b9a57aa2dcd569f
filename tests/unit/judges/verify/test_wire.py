"""Plain data between two processes."""

from __future__ import annotations

import json
from decimal import Decimal
from enum import IntEnum
from typing import Any

import pytest

from judges.verify.wire import Peer


def peer() -> Peer:
    def refuse(value: Any) -> Any:
        raise TypeError(f"not plain: {value!r}")

    return Peer(0, 0, handle=refuse, export=refuse, resolve=refuse, error_to_json=refuse, error_from_json=refuse)


def crossed(value: Any) -> Any:
    return peer().decode(json.loads(json.dumps(peer().encode(value))))


def test_plain_data_crosses_with_its_types() -> None:
    for value in (None, True, 3, -(10**40), 1.5, 2j, "é", b"\xff", [1, [2]], (1,), {1: "a", (2,): [3]}, {1}, frozenset({2}), range(3), int, Decimal("1.50")):  # fmt: skip
        assert crossed(value) == value
        assert type(crossed(value)) is type(value)


def test_an_instance_of_a_derived_class_crosses_as_the_base_types_value() -> None:
    class Yes(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class Color(IntEnum):
        RED = 1

    assert [type(crossed(value)) for value in (Yes(0), Color.RED)] == [int, int]
    assert crossed(Yes(0)) != 3


def test_a_view_of_a_dictionary_crosses_as_one() -> None:
    table = {"a": 1, "b": 2}
    assert crossed(table.keys()) == {"a", "b"}
    assert list(crossed(table.values())) == [1, 2]
    assert crossed(table.items()) == table.items()


def test_an_instance_of_a_class_of_the_program_keeps_its_attributes() -> None:
    class Name(str):
        __module__ = "solution"
        short = "N"
        startswith = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

    both = peer()
    both.export = lambda value: ["object", 0]
    both.resolve = lambda value: Name("x")
    name = both.decode(both.encode(Name("abc")))
    assert (name, name != "x", name.short, name.startswith("ab")) == ("abc", True, "N", True)
    assert both.encode(name) == ["object", 0]
    for value in (["object", 0], ["type", "int"], None):
        with pytest.raises((TypeError, ValueError)):
            peer().decode(["derived", value, ["object", 0]])


def test_numbers_that_are_not_finite_cross_only_if_they_are_expected() -> None:
    nan, inf = float("nan"), float("inf")
    strict = peer()
    strict.not_finite = ["inf"]
    assert strict.decode(inf) == inf
    for value in (nan, complex(nan, 1), Decimal("nan")):
        assert str(crossed(value)) == str(value)
        with pytest.raises(ValueError, match="not expected"):
            strict.decode(json.loads(json.dumps(strict.encode(value))))


def test_nothing_else_is_made_whatever_the_other_process_sends() -> None:
    for hostile in (
        ["library", "os.system", ["tuple", ["true"]]],
        ["name", "builtins", "eval"],
        ["type", "object"],
        {},
        ["list"],
    ):
        with pytest.raises((TypeError, ValueError, KeyError)):
            peer().decode(hostile)

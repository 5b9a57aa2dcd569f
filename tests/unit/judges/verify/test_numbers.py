"""Numbers in texts."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from judges.verify.numbers import Number, Unreadable, gold_number, last_number


class TestLastNumber:
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
            ("007", 7),
        ],
    )
    def test_the_last_number_is_read(self, text: str, number: int | str) -> None:
        found = last_number(text)
        assert found is not None
        assert found.parts == (Fraction(number),)

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
        short, long = (min(seconds(length) for _ in range(3)) for length in (5_000, 160_000))
        assert long < 200 * short + 0.01  # 32 times, and 1,024 times if it were quadratic

    def test_an_exponent_has_three_digits_at_most(self) -> None:
        assert last_number("1e999") == Number((Fraction(10) ** 999,), False)
        with pytest.raises(Unreadable):
            last_number("1e999999999")

    @pytest.mark.parametrize("text", ["2x", "$3!$", "1 234", "100k", "5^2^2", r"0.\overline{3}"])
    def test_a_number_that_is_part_of_something_else_is_not_read(self, text: str) -> None:
        with pytest.raises(Unreadable):
            last_number(text)

    @pytest.mark.parametrize("text", ["x > 3", "3!", "(1, 2)", "5 to 7", "x=7,y=8", r"x \leq 3", "2 + 3", "1,5"])
    def test_a_gold_text_that_has_more_than_a_number_is_refused(self, text: str) -> None:
        with pytest.raises(Unreadable):
            gold_number(text)

    @pytest.mark.parametrize(
        ("text", "number"), [("2³", 8), ("½", "1/2"), ("1½", "3/2"), ("٤٢", 42), ("1.234.567", 1234567), ("45°", 45)]
    )
    def test_signs_of_unicode_are_numbers_too(self, text: str, number: int | str) -> None:
        assert last_number(text) == Number((Fraction(number),), False)

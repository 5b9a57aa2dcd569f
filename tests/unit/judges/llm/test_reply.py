"""Bodies of replies and errors; test_client.py has them over HTTP."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from judges.llm.reply import Reply, error_of, mean_of, read_reply, stable_reason, without_key
from judges.llm.transport import Failure


def body(**choice: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "A"}, "finish_reason": "stop", **choice}]}).encode()


def test_usage_that_is_not_reported_is_estimated() -> None:
    assert read_reply(body(message={"content": "12345678"}), (7, 99)) == Reply("12345678", "stop", [], 7, 2, False)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_reply_that_the_server_broke_off_is_a_failure(reason: str) -> None:
    assert read_reply(body(finish_reason=reason), (1, 1)) == Failure("the server broke the reply off")


def test_the_likeliest_of_two_tokens_of_the_same_text_counts() -> None:
    top = [{"token": "A", "logprob": -2.0}, {"token": "A", "logprob": -0.5}, {"token": "B", "logprob": -1.0}]
    reply = read_reply(body(logprobs={"content": [{"top_logprobs": top}]}), (1, 1))
    assert isinstance(reply, Reply)
    assert reply.top_logprobs == [{"A": -0.5, "B": -1.0}]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"error": {"message": "no", "type": "BadRequestError"}}', ("no", "BadRequestError")),
        (b'{"detail": "Not Found"}', ("Not Found", "")),
        (b"plain text", ("plain text", "")),
        (b"<html>", ("", "")),
        (b"[1]", ("[1]", "")),
    ],
)
def test_an_error_is_read_in_whatever_form_it_comes(data: bytes, said: tuple[str, str]) -> None:
    assert error_of(data) == said


def test_a_reason_has_no_numbers_no_key_and_no_message() -> None:
    assert stable_reason("Too long: 300 of 256. See the docs", "") == "Too long: N of N. See the docs"
    assert stable_reason("bad input: the secret diary of", "the secret diary of a prompt") == ""
    assert without_key("the key sk-12345678 is wrong", "sk-12345678") == "the key *** is wrong"


# --- Probabilities ---

VERDICTS = {"A": 1.0, "B": 0.0}


def test_the_probability_of_the_first_is_the_mass_of_its_tokens_against_the_others() -> None:
    # A has 0.3 + 0.1, B has 0.1: 0.4 / 0.5. "The" is left out.
    top = {"A": math.log(0.3), " A": math.log(0.1), "B": math.log(0.1), "The": math.log(0.5)}
    assert mean_of(VERDICTS, top) == pytest.approx(0.8)


@pytest.mark.parametrize("form", ["A", " A", "▁A", "ĠA", '"A', "A\n", "**A", "(A"])
def test_the_letter_is_found_in_the_forms_that_tokenizers_give_it(form: str) -> None:
    assert mean_of(VERDICTS, {form: math.log(0.6), form.replace("A", "B"): math.log(0.2)}) == pytest.approx(0.75)


def test_probabilities_without_either_letter_have_no_mean() -> None:
    for top in (
        {},
        {"The": -0.1},
        {"a": -0.1, "tie": -2.0},
        {"А": -0.1},
        {"A": -math.inf},
        {"AB": -0.1},
        {"A": math.nan},
    ):
        assert mean_of(VERDICTS, top) is None


def test_swapping_the_letters_gives_the_probability_of_the_second() -> None:
    swapped = mean_of(VERDICTS, {"A": -3.0, "B": -1.0})
    assert swapped is not None
    assert mean_of(VERDICTS, {"A": -1.0, "B": -3.0}) == pytest.approx(1 - swapped)


def test_tiny_probabilities_are_compared_all_the_same() -> None:
    assert mean_of(VERDICTS, {"A": -900.0, "B": -900.0}) == pytest.approx(0.5)


def test_the_expected_score_is_the_mean_over_the_scale() -> None:
    # (1 * 0.2 + 5 * 0.6) / 0.8; 9 is off the scale.
    top = {"1": math.log(0.2), " 5": math.log(0.6), "9": math.log(0.1), "five": math.log(0.1)}
    points = {str(n): float(n) for n in range(1, 6)}
    assert mean_of(points, top) == pytest.approx(4.0)
    assert mean_of(points, {"good": -0.1}) is None

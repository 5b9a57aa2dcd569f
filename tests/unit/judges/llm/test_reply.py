"""Bodies of replies and errors; test_client.py has them over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from judges.llm.reply import Reply, error_of, read_reply, stable_reason, without_key
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

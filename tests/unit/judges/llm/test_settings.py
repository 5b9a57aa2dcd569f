"""The `endpoint` mapping: what is refused, and that a key in the wrong place is not repeated."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.llm.settings import Endpoint

KEY = "sk-proj-4mQz81TvXy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url: is not a valid address; give http://host:port/v1"),
        ({"base_url": "ftp://host/v1"}, "base_url: is not a valid address"),
        ({"base_url": "http://host:x/v1"}, "base_url: is not a valid address"),
        ({"base_url": "http:///v1"}, "base_url: is not a valid address"),
        ({"base_url": "http://host/v1?key=1"}, "base_url: must have no user, query or fragment"),
        ({"base_url": "http://host/v1/chat/completions"}, "base_url: must end before /chat/completions"),
        ({"concurrency": 0}, "concurrency = 0: input should be greater than or equal to 1"),
        ({"timeout": -1}, "timeout = -1: input should be greater than 0"),
        ({"requests_per_minute": 0}, "requests_per_minute = 0: input should be greater than 0"),
        ({"deadline": float("inf")}, "deadline = inf: input should be a finite number"),
        ({"concurency": 4}, "unknown key 'concurency'; did you mean 'concurrency'?"),
        ({"max_cost_usd": 1.0}, "max_cost_usd: set price_in and price_out too"),
        ({"extra": {"stream": True}}, "extra: 'stream' cannot be set here"),
        ({"headers": {"Authorization": "x"}}, "headers: 'Authorization' looks like a secret"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError) as error:
        Endpoint(**settings)
    assert str(error.value).startswith(f"endpoint: {message}")


def test_yaml_reads_off_as_false_and_it_is_still_off() -> None:
    assert Endpoint(cache=False).cache == "off"


def test_a_key_in_the_place_of_a_variables_name_is_refused_and_not_repeated() -> None:
    for settings in ({"api_key_env": KEY}, {"base_url": f"https://me:{KEY}@host/v1"}, {"headers": {"X-Api-Key": KEY}}):
        with pytest.raises(JudgeError) as error:
            Endpoint(**settings)
        assert KEY not in "".join(traceback.format_exception(error.value))
        assert error.value.__context__ is None


def test_the_cost_is_per_million_tokens() -> None:
    assert Endpoint(price_in=2, price_out=10).cost(500_000, 100_000) == 1 + 1

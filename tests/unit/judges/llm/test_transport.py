"""The retry loop, with waits that are noted in place of slept; Retry-After; and the key."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.llm.transport import Failure, authorization, checked_key_name, retry_after_seconds, with_retries


def tried(*outcomes: Any, **limits: Any) -> tuple[Any, list[float]]:
    """The result of attempts with these outcomes, and the waits between them; jitter is at its most."""
    rest, waits = iter(outcomes), []

    async def attempt() -> Any:
        return next(rest)

    async def pause(seconds: float, failure: Failure) -> None:
        waits.append(seconds)

    settings = {"attempts": 10, "backoff": 1.0, "max_backoff": 30.0, **limits}
    return asyncio.run(with_retries(attempt, pause=pause, **settings)), waits


@pytest.fixture(autouse=True)
def _most_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("judges.llm.transport.random.uniform", lambda low, high: high)


BUSY = Failure("HTTP 503")


def test_the_longest_wait_doubles_up_to_its_bound() -> None:
    assert tried(*[BUSY] * 7, "A") == ("A", [1, 2, 4, 8, 16, 30, 30])


def test_a_server_may_ask_for_a_longer_wait_than_the_bound() -> None:
    assert tried(Failure("HTTP 429", retry_after=99), BUSY, "A") == ("A", [99, 2])


def test_the_last_failure_is_the_result_and_nothing_is_waited_for_after_it() -> None:
    assert tried(BUSY, Failure("HTTP 500"), attempts=2) == (Failure("HTTP 500"), [1])


def test_a_failure_that_would_come_again_is_not_tried_again() -> None:
    refused = Failure("HTTP 422", retry=False)
    assert tried(refused) == (refused, [])


def test_many_attempts_overflow_no_number() -> None:
    assert tried(*[BUSY] * 2000, "A", attempts=3000, max_backoff=1e300)[0] == "A"


def test_retry_after_is_read_as_seconds_or_a_date() -> None:
    assert [retry_after_seconds(h) for h in (None, "", "soon", "-5", "inf", "2.5", "120")] == [0, 0, 0, 0, 0, 2.5, 120]
    assert 500 < retry_after_seconds(formatdate(time.time() + 600, usegmt=True)) <= 600
    assert retry_after_seconds("Tue, 01 Jan 1980 00:00:00 GMT") == 0


def test_the_key_comes_from_the_variable_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert authorization(None, owner="remote") == {}
    monkeypatch.setenv("MY_KEY", " secret\n")
    assert authorization("MY_KEY", owner="remote") == {"Authorization": "Bearer secret"}
    monkeypatch.setenv("MY_KEY", "sécret")
    with pytest.raises(JudgeError, match=r"remote: .*MY_KEY has characters that a key cannot have") as raised:
        authorization("MY_KEY", owner="remote")
    assert "cret" not in str(raised.value)


def test_a_key_is_no_name_and_is_not_repeated() -> None:
    checked_key_name("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="is the name of an environment variable") as raised:
        checked_key_name("sk-secret")
    assert "secret" not in str(raised.value)

"""The `endpoint` mapping of an LLM judge: where to call, how often, and what it may cost."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from iterdpo.config import Section, explain
from iterdpo.errors import JudgeError
from judges.llm.transport import checked_key_name

OWN_FIELDS = {"model", "messages", "stream", "n"}
SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie", re.I)


def checked_url(url: str) -> str:
    """`url` without a slash at its end.

    Raises:
        ValueError: it is not the address of an endpoint. The message does not repeat a password in it.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or re.search(r"\s", url):
        raise ValueError("is not a valid address; give http://host:port/v1 or https://host/v1")
    if parts.username is not None or parts.query or parts.fragment:
        remedy = "name the key's variable in api_key_env"
        raise ValueError(f"must have no user, query or fragment, which may be secret; {remedy}")
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        raise ValueError("must end before /chat/completions, which is added to it")
    return url


def _without_secrets(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not (name + value).isprintable():
            raise ValueError(f"{name!r} has a character that a header cannot have")
        if SECRET_HEADER.search(name):
            raise ValueError(f"{name!r} looks like a secret; name the key's environment variable in api_key_env")
    return headers


def _without_own_fields(extra: dict[str, Any]) -> dict[str, Any]:
    if own := sorted(OWN_FIELDS & extra.keys()):
        raise ValueError(f"{own[0]!r} cannot be set here; the judge sets it")
    return extra


class Endpoint(Section):
    """The `endpoint` mapping of an LLM judge.

    Raises:
        JudgeError: an unknown key, a value out of range, or a budget of money without prices.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: Annotated[str, AfterValidator(checked_url)] | None = None
    """The address of the endpoint, up to and with /v1: `http://localhost:8000/v1`."""
    api_key_env: Annotated[str, AfterValidator(checked_key_name)] | None = None
    """The NAME of the environment variable that holds the key. The key itself is read for each request, and is kept
    nowhere."""
    concurrency: int = Field(32, ge=1)
    """Requests at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Requests are spread evenly to stay below this rate. Attempts that fail count."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """The same for tokens read and written: an estimate when a request is sent, corrected by what the server reports."""
    timeout: float = Field(60, gt=0)
    """Seconds for one attempt."""
    deadline: float = Field(600, gt=0)
    """Seconds for one call with all its attempts, from when the first is sent."""
    stage_deadline: float | None = Field(None, gt=0)
    """Seconds for all calls of a stage; those in which it waits for the next shard to be sampled do not count. When they
    are over, the calls that remain fail at once."""
    attempts: int = Field(6, ge=1)
    """Attempts of one call after errors that may pass: HTTP 408, 409, 425, 429 and 5xx, time-outs, broken connections,
    replies that are cut off."""
    backoff: float = Field(0.5, gt=0)
    """Seconds before the second attempt, at most; they double with each further one. Drawn between 0 and that."""
    max_backoff: float = Field(30, gt=0)
    """The longest such wait, in seconds. A server's Retry-After may ask for more, up to `deadline`."""
    give_up_after: int = Field(20, ge=1)
    """When so many calls in a row have failed for good, the endpoint is taken as down: those under way fail too."""
    max_tokens_spent: int | None = Field(None, gt=0)
    """Tokens, read and written, that a stage may use. A hard stop."""
    max_cost_usd: float | None = Field(None, gt=0)
    """US dollars that a stage may cost. A hard stop; needs the prices."""
    price_in: float = Field(0, ge=0)
    """US dollars for a million tokens read."""
    price_out: float = Field(0, ge=0)
    """US dollars for a million tokens written."""
    cache: Annotated[str | None, BeforeValidator(lambda cache: "off" if cache is False else cache)] = None
    """The SQLite file that keeps the replies that could be read, by the content of the request; several runs may share
    it. `off` keeps none. Default: iterdpo/judge-calls.sqlite in $XDG_CACHE_HOME or ~/.cache."""
    headers: Annotated[dict[str, str], AfterValidator(_without_secrets)] = Field(default_factory=dict)
    """Further HTTP headers, none of them secret."""
    extra: Annotated[dict[str, Any], AfterValidator(_without_own_fields)] = Field(default_factory=dict)
    """Further fields of the request body: `{seed: 1, top_p: 0.9}`. They win over the judge's; null leaves one out."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
            return
        except ValidationError as error:
            wrong = "; ".join(explain(Endpoint, e) for e in error.errors())
        raise JudgeError(f"endpoint: {wrong}")  # outside `except`, so that no input hangs on it

    @model_validator(mode="after")
    def _money_needs_prices(self) -> Endpoint:
        if self.max_cost_usd is not None and not self.price_in + self.price_out:
            raise ValueError("max_cost_usd: set price_in and price_out too, in US dollars per million tokens")
        return self

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """US dollars."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

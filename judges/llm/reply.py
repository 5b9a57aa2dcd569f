"""What a chat endpoint sent back: a `Reply`, or the reason of an error, short and stable so that it can be counted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from iterdpo.escape import printable
from judges.llm.transport import Failure


class Reply(NamedTuple):
    """`Reply(text="A", finish_reason="stop", top_logprobs=[{"A": -0.1, "B": -2.4}], tokens_in=412, tokens_out=1,
    cached=False)`

    `top_logprobs` has a mapping for each generated token, from a token's text to its log-probability; it is empty
    unless the call asked for `logprobs`. `cached`: nothing was paid for it now.
    """

    text: str
    finish_reason: str | None
    top_logprobs: list[dict[str, float]]
    tokens_in: int
    tokens_out: int
    cached: bool


def read_reply(data: bytes, estimate: tuple[int, int]) -> Reply | Failure:
    """The reply in a body that came with status 200; usage that is not reported is estimated."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        kind = {b"": "empty", b"{": "cut off JSON"}.get(data.lstrip()[:1], "not JSON")
        return Failure(f"the reply was {kind}")
    try:
        choice = answer["choices"][0]
        content = choice["message"].get("content")
    except (LookupError, TypeError, AttributeError):
        return Failure("the reply had no choices")
    finish_reason = choice.get("finish_reason")
    if finish_reason in ("abort", "error"):  # vLLM's and OpenRouter's, with whatever there was until then
        return Failure("the server broke the reply off")
    if isinstance(content, list):  # parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    text = content if isinstance(content, str) else ""
    usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    guesses = {"prompt_tokens": estimate[0], "completion_tokens": len(text.encode(errors="replace")) // 4}
    used = [n if isinstance(n := usage.get(key), int) and n >= 0 else guess for key, guess in guesses.items()]
    return Reply(text, str(finish_reason) if finish_reason else None, _top_logprobs(choice), used[0], used[1], False)


def _top_logprobs(choice: dict[str, Any]) -> list[dict[str, float]]:
    """As in `Reply`. If several tokens have the same text, the likeliest counts; none if one is malformed."""
    try:
        return [
            dict(sorted(((top["token"], float(top["logprob"])) for top in position["top_logprobs"]), key=itemgetter(1)))
            for position in choice["logprobs"]["content"]
        ]
    except (LookupError, TypeError, ValueError):
        return []


def mean_of(values: Mapping[str, float], top_logprobs: Mapping[str, float]) -> float | None:
    """The mean of the values of some tokens under their probabilities, renormalised; None if none is among the likeliest.

    `{"A": 1.0, "B": 0.0}` gives P(A) against P(B). Spaces, quotes and the tokenizers' marks for a space (`▁A`, `ĠA`)
    around a token are ignored.
    """
    found = [(t.strip(" \t\r\n▁ĠĊ\"'`*([{"), p) for t, p in top_logprobs.items() if math.isfinite(p)]
    found = [(t, p) for t, p in found if t in values]
    top = max((p for _, p in found), default=0.0)  # relative to the likeliest: exp(-900) alone would be 0
    mass = [math.exp(p - top) for _, p in found]
    return sum(values[t] * m for (t, _), m in zip(found, mass, strict=True)) / sum(mass) if found else None


def error_of(data: bytes) -> tuple[str, str]:
    """An error's message and its code or type, in OpenAI's form or vLLM's; what of them there is."""
    try:
        error = json.loads(data)
        error = error.get("error") or error.get("detail") or error
        if not isinstance(error, dict):
            return str(error), ""
        slugs = [str(error.get(key) or "") for key in ("code", "type")]
        slug = next(filter(re.compile(r"[A-Za-z_]\w{2,60}").fullmatch, slugs), "")
        return str(error.get("message") or ""), slug
    except (ValueError, RecursionError, AttributeError):
        text = data[:500].decode(errors="replace").strip()
        return ("" if text.startswith("<") else text), ""


def without_key(text: str, key: str) -> str:
    """`text` with *** for each word that has six characters of the key: servers quote it, in whole or in part."""
    if not key:
        return text
    pieces = {key[i : i + 6] for i in range(max(1, len(key) - 5))}
    return re.sub(r"\S+", lambda word: "***" if any(piece in word[0] for piece in pieces) else word[0], text)


def stable_reason(said: str, messages: str) -> str:
    """The first sentence of an error with N for its numbers, so that it can be counted; empty if it quotes a message."""
    sentence = printable(re.split(r"(?<=[a-z])\. |\n", said, maxsplit=1)[0])[:120].rstrip(". ")
    if any(sentence[i : i + 16] in messages for i in range(max(0, len(sentence) - 15))):
        return ""
    return re.sub(r"\d+", "N", sentence)

"""Verdicts and scores read off the probabilities of a reply's first token."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from judges.llm.parsing.score import NO_SCORE
from judges.llm.parsing.text import Unclear
from judges.llm.parsing.verdict import NOTHING


def verdict_probability(top_logprobs: Mapping[str, float]) -> float | Unclear:
    """P(first) from the alternatives for a verdict's token: the mass of `A` over that of `A` and `B`.

    Spaces, quotes and the tokenizers' marks for a space (`▁A`, `ĠA`) around the letter are ignored. All other tokens
    are left out of the sum. If only one of both is among the alternatives, it has all of the mass.
    """
    mass = _mass(top_logprobs, {"A", "B"})
    return mass["A"] / (mass["A"] + mass["B"]) if mass else NOTHING


def expected_score(top_logprobs: Mapping[str, float], low: int, high: int) -> float | Unclear:
    """The mean of the scores `low` to `high` under the probabilities of their tokens, renormalised.

    Raises:
        ValueError: the scale leaves 0 to 9: a score could be several tokens, and "1" the beginning of "10".
    """
    if not 0 <= low < high <= 9:
        raise ValueError(f"expected scores need a scale within 0 to 9, of single digits, not {low} to {high}")
    mass = _mass(top_logprobs, {str(s) for s in range(low, high + 1)})
    return sum(int(s) * p for s, p in mass.items()) / sum(mass.values()) if mass else NO_SCORE


def _mass(top_logprobs: Mapping[str, float], wanted: Collection[str]) -> dict[str, float]:
    """Probabilities of the wanted tokens, up to a common factor; empty if none has any."""
    found = [(t.strip(" \t\r\n▁ĠĊ\"'`*([{"), p) for t, p in top_logprobs.items()]
    found = [(t, p) for t, p in found if t in wanted and math.isfinite(p)]
    if not found:
        return {}
    top = max(p for _, p in found)  # relative to the likeliest: exp(-900) alone would be 0
    mass = dict.fromkeys(wanted, 0.0)
    for token, logprob in found:
        mass[token] += math.exp(logprob - top)
    return mass

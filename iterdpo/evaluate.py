"""What the held-out evaluation reports. Pure functions of scores, tokens and log-probabilities.

All intervals are percentile bootstrap intervals over prompts: prompts are what the evaluation drew at random, and
several completions of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from iterdpo.types import CompletionGroup

Scores = Sequence[float | None]
"""Scores of one prompt's completions; None where the judge abstained."""


class Interval(NamedTuple):
    """An estimate and its interval; all None where there is nothing to estimate from."""

    mean: float | None
    low: float | None
    high: float | None


def evaluation_metrics(
    groups: Sequence[CompletionGroup],
    scores: dict[str, list[Scores]],
    baselines: dict[str, dict[str, list[Scores]]],
    duels: dict[str, dict[str, list[list[Scores]]]],
    logps: dict[str, list[list[float]]] | None,
    *,
    bootstrap: dict[str, Any],
) -> dict[str, Any]:
    """The metrics of docs/metrics.md that the held-out completions decide.

    `scores` by role of the judge, prompt by prompt; `baselines` the same for the policies compared with, by name;
    `duels`, by role and name, are those of a judge that compares: for each prompt the scores of (the candidate's
    completion, the baseline's), as often as there are completions;
    `logps` has `policy` and `initial`, summed over each completion, None where the policy is the initial one.
    Win rates are by the held-out judge where there is one.
    """
    completions = [c for g in groups for c in g.completions]
    decider = "heldout_judge" if "heldout_judge" in scores | duels else "train_judge"
    metrics: dict[str, Any] = {"win_rate/judge": decider.removesuffix("_judge")}
    for role in ("train_judge", "heldout_judge"):
        value = mean_score(scores[role], **bootstrap) if role in scores else Interval(None, None, None)
        metrics |= _interval_keys(f"score/{role}", value)
    for name in ("initial", "previous"):
        value = Interval(None, None, None)
        if name in duels.get(decider, {}):
            value = bootstrap_mean(duel_shares(duels[decider][name]), **bootstrap)
        elif name in baselines and decider in scores:
            value = win_rate(scores[decider], baselines[name][decider], **bootstrap)
        metrics |= _interval_keys(f"win_rate/vs_{name}", value)
    kl = Interval(0.0, 0.0, 0.0) if logps is None else sequence_kl(logps["policy"], logps["initial"], **bootstrap)
    return metrics | {
        **_interval_keys("kl/to_initial", kl),
        "length/mean_tokens": sum(len(c.token_ids) for c in completions) / len(completions),
        "length/truncated": sum(c.truncated for c in completions) / len(completions),
        "distinct/1": distinct_n([c.token_ids for c in completions], 1),
        "distinct/2": distinct_n([c.token_ids for c in completions], 2),
        "evaluation/prompts": len(groups),
        "evaluation/completions": len(completions),
        "evaluation/unjudged": (
            sum(s is None for group in scores[decider] for s in group)
            if decider in scores
            else max((sum(None in met for p in prompts for met in p) for prompts in duels[decider].values()), default=0)
        ),
    }


def mean_score(groups: Sequence[Scores], *, confidence: float = 0.95, samples: int = 10_000, seed: int = 0) -> Interval:
    """The mean over prompts of the mean score of a prompt's judged completions."""
    means = [float(np.mean(judged)) for scores in groups if (judged := [s for s in scores if s is not None])]
    return bootstrap_mean(means, confidence=confidence, samples=samples, seed=seed)


def win_rate(
    candidate: Sequence[Scores],
    baseline: Sequence[Scores],
    *,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The share of held-out prompts on which the candidate's completion beats the baseline's; a tie is half a win.

    `candidate[i]` and `baseline[i]` are scores for the same prompt. With several completions, a prompt counts with
    its share over all combinations; prompts on which either side has no score are left out.
    """
    wins = []
    for ours, theirs in zip(candidate, baseline, strict=True):
        outcomes = [0.5 if a == b else float(a > b) for a in ours if a is not None for b in theirs if b is not None]
        if outcomes:
            wins.append(float(np.mean(outcomes)))
    return bootstrap_mean(wins, confidence=confidence, samples=samples, seed=seed)


def duel_shares(prompts: Sequence[Sequence[Scores]]) -> list[float]:
    """Of each prompt, the share of its duels that the candidate won; a tie is half a win.

    A duel is the scores of (the candidate's completion, the baseline's), which a judge gave side by side. Duels with
    an abstention are left out, and prompts that have no other.
    """
    judged = [[(a, b) for a, b in duels if a is not None and b is not None] for duels in prompts]
    return [sum(0.5 if a == b else float(a > b) for a, b in duels) / len(duels) for duels in judged if duels]


def sequence_kl(
    policy_logps: Sequence[Sequence[float]],
    initial_logps: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """KL(policy || initial) in nats a completion, estimated on the policy's own completions y ~ policy:

        KL = E_y[ log policy(y|x) - log initial(y|x) ]

    from log-probabilities summed over each completion's tokens (no padding), grouped by prompt. Unbiased at
    temperature 1; the estimate may be slightly negative where the policies are close.
    """
    means = [
        float(np.mean(np.subtract(ours, theirs))) for ours, theirs in zip(policy_logps, initial_logps, strict=True)
    ]
    return bootstrap_mean(means, confidence=confidence, samples=samples, seed=seed)


def logp_gap(reported: Iterable[Sequence[float]], computed: Iterable[float]) -> float | None:
    """Mean over completions of |sum of the engine's token log-probabilities - the policy's own sum|, in nats a token.

    What is left when both are the same policy is rounding. None where there is no completion.
    """
    gaps = [abs(sum(tokens) - whole) / len(tokens) for tokens, whole in zip(reported, computed, strict=True)]
    return float(np.mean(gaps)) if gaps else None


def distinct_n(token_ids: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of the completions' tokens (Li et al., arXiv:1510.03055, Section 5.2).

    1 where nothing repeats. It falls as text grows: compare equal amounts. None where no completion has n tokens.
    """
    grams = [tuple(ids[i : i + n]) for ids in token_ids for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of `values` with its percentile bootstrap interval."""
    if not values:
        return Interval(None, None, None)
    data = np.asarray(values)
    generator = np.random.default_rng(seed)
    means = np.concatenate(  # in blocks, so that thousands of prompts need no more memory than a few
        [
            data[generator.integers(len(data), size=(min(500, samples - start), len(data)))].mean(axis=1)
            for start in range(0, samples, 500)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high))


def _interval_keys(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}

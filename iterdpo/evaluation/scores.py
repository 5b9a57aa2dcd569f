"""Figures of scores and of log-probabilities: means, the best of N, KL."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Unpack

import numpy as np

from iterdpo.stats import Bootstrap, Estimate, Floats, bootstrap_mean

Scores = Sequence[float | None]
"""Scores of one prompt's completions; None if the judge abstained."""


def mean_score(groups: Iterable[Scores], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    """The mean over prompts of the mean score of a prompt's judged completions."""
    means = (float(np.mean(judged)) for scores in groups if (judged := [s for s in scores if s is not None]))
    return bootstrap_mean(means, **bootstrap)


def best_of(n: int, chosen_by: Iterable[Scores], scored_by: Iterable[Scores]) -> float | None:
    """The mean over prompts of the expected score of the best of `n` completions; None if no prompt has so many.

    One judge chooses, another may score. Only completions that both judged count; see `best_of_weights`.
    """
    found = []
    for chosen, scored in zip(chosen_by, scored_by, strict=True):
        values = np.array(scored, float)
        weights = best_of_weights(np.where(np.isnan(values), np.nan, np.array(chosen, float)), n)
        if weights is not None:
            found.append(float(np.nansum(weights * values)))
    return float(np.mean(found)) if found else None


def best_of_weights(scores: Floats, n: int) -> Floats | None:
    """The probability of each of a prompt's completions to be the best of n drawn without replacement, [M]; None if K < n.

    `scores` [M] are NaN for an abstention: such a completion is never drawn. Of the K others in ascending order, the i-th
    is the best with probability

        C(i - 1, n - 1) / C(K, n),

    so that an estimate is unbiased from one set of samples. Completions that tie share their probabilities.
    """
    weights = np.zeros(len(scores))
    judged = np.flatnonzero(~np.isnan(scores))
    if len(judged) < n:
        return None
    order = judged[np.argsort(scores[judged], kind="stable")]
    for rank, index in enumerate(order):
        weights[index] = math.comb(rank, n - 1) / math.comb(len(judged), n)
    for score in np.unique(scores[judged]):
        alike = scores == score
        weights[alike] = weights[alike].mean()
    return weights


def sequence_kl(
    policy_logps: Iterable[Sequence[float]],
    initial_logps: Iterable[Sequence[float]],
    **bootstrap: Unpack[Bootstrap],
) -> Estimate:
    """KL(policy || initial) in nats a completion, estimated on the policy's own completions y ~ policy:

        KL = E_y[ log policy(y|x) - log initial(y|x) ]

    from log-probabilities summed over each completion's tokens (no padding), grouped by prompt. Unbiased at
    temperature 1; the estimate may be slightly negative if the policies are close.
    """
    prompts = zip(policy_logps, initial_logps, strict=True)
    means = (float(np.mean(np.subtract(ours, theirs))) for ours, theirs in prompts)
    return bootstrap_mean(means, **bootstrap)


def logp_gap(reported: Iterable[Sequence[float]], computed: Iterable[float]) -> float | None:
    """Mean over completions of |sum of the engine's token log-probabilities - the policy's own sum|, in nats a token.

    What is left if both are the same policy is rounding. None if there is no completion.
    """
    gaps = (abs(sum(tokens) - whole) / len(tokens) for tokens, whole in zip(reported, computed, strict=True))
    means = np.fromiter(gaps, float)
    return float(means.mean()) if len(means) else None

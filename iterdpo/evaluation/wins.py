"""Who wins: shares of wins by prompt, win rates, their tests, and the agreement of two judges."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import Unpack

import numpy as np

from iterdpo.evaluation.scores import Scores
from iterdpo.stats import NOTHING, Bootstrap, Estimate, Floats, bootstrap_mean, sigmoid

Outcomes = Sequence[float | None] | Floats
"""Of each combination of a prompt's completions with the baseline's: 1 if the candidate's wins, 0.5 a tie; None or NaN unjudged."""

PRIOR_SD = 100.0
"""Standard deviation of the prior of both coefficients: they stay finite if length decides, or one side wins all."""


def outscored(scores: Iterable[Scores], unfinished: Iterable[Sequence[bool]]) -> Iterator[Scores]:
    """Each prompt's scores for a contest: of an unfinished thought it is lower than every other, judged or not."""
    for of_prompt, thoughts in zip(scores, unfinished, strict=True):
        yield [-math.inf if thought else score for score, thought in zip(of_prompt, thoughts, strict=True)]


def combinations(candidate: Iterable[Scores | Floats], baseline: Iterable[Scores | Floats]) -> Iterator[Floats]:
    """The outcomes of each prompt, all of them. Both yield the scores of the same prompts in the same order."""
    for ours, theirs in zip(candidate, baseline, strict=True):
        a, b = np.array(ours, float)[:, None], np.array(theirs, float)
        yield np.where(np.isnan(a) | np.isnan(b), np.nan, (a > b) + 0.5 * (a == b)).ravel()


def combined_shares(candidate: Iterable[Scores], baseline: Iterable[Scores]) -> Iterator[float | None]:
    """`shares(combinations(candidate, baseline))`, by sorting: K log K steps for each prompt in place of K^2."""
    for ours, theirs in zip(candidate, baseline, strict=True):
        judged, against = [s for s in ours if s is not None], sorted(s for s in theirs if s is not None)
        if not judged or not against:
            yield None
            continue
        twice = sum(bisect_left(against, s) + bisect_right(against, s) for s in judged)  # a win counts 2, a tie 1
        yield twice / 2 / (len(judged) * len(against))


def duels(prompts: Iterable[Sequence[Scores]]) -> Iterator[Outcomes]:
    """The outcomes of each prompt by a judge that gave the scores (candidate's, baseline's) of a duel side by side."""
    for each in prompts:
        yield [_outcome(a, b) for a, b in each]


def shares(outcomes: Iterable[Outcomes]) -> Iterator[float | None]:
    """Of each prompt, the share of its judged outcomes that the candidate won; a tie is half a win. None if none is."""
    for each in outcomes:
        judged = [float(outcome) for outcome in each if outcome is not None and outcome == outcome]
        yield sum(judged) / len(judged) if judged else None


def win_rate(candidate: Iterable[Scores], baseline: Iterable[Scores], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    """The share of held-out prompts on which the candidate's completion beats the baseline's; a tie is half a win.

    With several completions, a prompt counts with its share over all combinations; prompts on which either side has no
    score are left out.
    """
    return mean_share(combined_shares(candidate, baseline), **bootstrap)


def mean_share(of_prompts: Iterable[float | None], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    return bootstrap_mean((share for share in of_prompts if share is not None), **bootstrap)


def sign_test(of_prompts: Iterable[float | None]) -> float | None:
    """The p-value of the exact two-sided sign test: as many prompts are won (a share above one half) as are lost.

    Ties are left out. None if no prompt is won or lost.
    """
    from scipy.stats import binomtest

    signs = [share > 0.5 for share in of_prompts if share is not None and share != 0.5]
    return float(binomtest(sum(signs), len(signs)).pvalue) if signs else None


def tied(of_prompts: Iterable[float | None]) -> float | None:
    """The share of prompts on which neither side wins."""
    judged = [share for share in of_prompts if share is not None]
    return judged.count(0.5) / len(judged) if judged else None


def length_controlled(
    of_prompts: Sequence[float | None], longer: Sequence[float], *, confidence: float = 0.95
) -> Estimate:
    """The win rate if both sides were equally long (arXiv:2404.04475), from shares and differences of length by prompt.

    The logistic regression of AlpacaEval 2, without its terms for the difficulty of an instruction and for gamed
    baselines, both of which it estimates from many other models:

        P(win) = sigmoid(a + b tanh(d / sd(d))),  and the win rate is sigmoid(a).

    d is the candidate's length minus the baseline's. Both coefficients have a weak normal prior. Where no length differs
    it is the win rate. The interval is that of a by the sandwich estimator of its variance, which allows shares.
    """
    pairs = [(share, d) for share, d in zip(of_prompts, longer, strict=True) if share is not None]
    if not pairs:
        return NOTHING
    y, d = np.array(pairs, float).T
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    x = np.column_stack([np.ones(len(d)), np.tanh(d / spread) if spread else np.zeros(len(d))])  # [n, 2]
    coefficients, error = np.zeros(2), 0.0
    for _ in range(100):  # Newton's method; no step is longer than 1: a longer one may overshoot
        p = 0.5 * (1 + np.tanh(0.5 * x @ coefficients))
        inverse = np.linalg.inv((x.T * (p * (1 - p))) @ x + np.eye(2) / PRIOR_SD**2)
        step = inverse @ (x.T @ (y - p) - coefficients / PRIOR_SD**2)
        coefficients += step / max(1.0, float(np.hypot(*step)))
        error = math.sqrt(max(0.0, (inverse @ (x.T * (y - p) ** 2) @ x @ inverse)[0, 0]))
        if np.abs(step).max() < 1e-10:
            break
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    centre = float(coefficients[0])
    return Estimate(sigmoid(centre), sigmoid(centre - half), sigmoid(centre + half), len(y))


def agreement(one: Iterable[Outcomes], other: Iterable[Outcomes], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    """The mean over prompts of the share of outcomes, of those that both judges decide, on which they agree.

    A judge that compares has other outcomes of several completions than one that scores; such prompts are left out.
    """
    found = []
    for ours, theirs in zip(one, other, strict=True):
        if len(ours) != len(theirs):
            continue
        a, b = np.array(ours, float), np.array(theirs, float)  # NaN is neither 0 nor 1
        decided = ((a == 0) | (a == 1)) & ((b == 0) | (b == 1))
        if decided.any():
            found.append(int((a == b)[decided].sum()) / int(decided.sum()))
    return bootstrap_mean(found, **bootstrap)


def gap(one: Iterable[float | None], other: Iterable[float | None], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    """The mean over prompts of one judge's share of wins minus the other's."""
    pairs = zip(one, other, strict=True)
    return bootstrap_mean((a - b for a, b in pairs if a is not None and b is not None), **bootstrap)


def _outcome(ours: float | None, theirs: float | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return 0.5 if ours == theirs else float(ours > theirs)

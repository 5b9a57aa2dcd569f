"""Calibration and agreement of judges, from arrays. Pure.

`p` is everywhere the judge's probability that the completion labelled better is the better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import kendalltau, spearmanr

from iterdpo.stats import NOTHING, Estimate, Floats, Statistic, clustered_mean, resampled_weights

BINS = 10


def calibration_error(
    p: ArrayLike, prompts: Sequence[str], *, confidence: float = 0.95, samples: int = 1_000, seed: int = 0
) -> Estimate:
    """Expected calibration error (Guo et al., arXiv:1706.04599, Eq. 3), for a choice between two completions:

        ECE = Σ_b (n_b / n) |accuracy_b - confidence_b|

    over `BINS` equal bins of the confidence max(p, 1 - p), which lies in [0.5, 1]; theirs, of many classes, lies in
    [0, 1]. The judge is right if p > 0.5, and half right if it is 0.5.

    Noise can only raise it, so that percentiles of a bootstrap would miss a calibrated judge every time. The interval
    has instead the errors c · ECE, c >= 0, under which what was found is no surprise: with the bins' gaps at c times
    those found, and the bootstrap's noise on top, it lies within the central share `confidence`. Of c = 0 that is the
    test of calibration.
    """
    claimed, right, bin = _binned(p)
    if not len(bin):
        return NOTHING

    def gaps(weights: Floats) -> Floats:
        found: Floats = np.bincount(bin, weights=weights * (right - claimed), minlength=BINS) / weights.sum()
        return found

    found = gaps(np.ones(len(bin)))
    drawn = np.stack([gaps(weights) for weights in resampled_weights(prompts, samples, seed)])  # [samples, bins]
    noise = drawn - found
    value = float(np.abs(found).sum())

    def least(share: float) -> float:
        """The least c whose quantile `share` is no less than what was found."""

        def excess(c: float) -> float:
            return float(np.quantile(np.abs(c * found + noise).sum(axis=1), share)) - value

        if value == 0 or excess(0.0) >= 0:
            return 0.0
        high = 1.0
        while excess(high) < 0:
            high *= 2
        return float(brentq(excess, 0.0, high))

    tail = (1 - confidence) / 2
    low, high = (value * least(share) for share in (1 - tail, tail))
    return Estimate(value, min(low, value), max(high, value), len(bin))


def calibrated_error(p: ArrayLike, *, samples: int = 200, seed: int = 0) -> float | None:
    """The ECE that a perfectly calibrated judge of these confidences would show on so many pairs, by chance alone."""
    confidence, _, bin = _binned(p)
    if not len(confidence):
        return None
    generator = np.random.default_rng(seed)

    def gap() -> float:
        right = np.where(confidence == 0.5, 0.5, generator.random(len(bin)) < confidence)
        return float(np.abs(np.bincount(bin, weights=right - confidence, minlength=BINS)).sum() / len(bin))

    return sum(gap() for _ in range(samples)) / samples


def reliability(p: ArrayLike, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """`[{"from": 0.5, "to": 0.55, "pairs": 40, "confidence": 0.52, "accuracy": Estimate(…)}, …]`, without empty bins."""
    confidence, right, bin = _binned(p)
    names = np.asarray(prompts)
    return [
        {
            "from": 0.5 + 0.5 * int(b) / BINS,
            "to": 0.5 + 0.5 * (int(b) + 1) / BINS,
            "pairs": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": clustered_mean(right[inside], names[inside].tolist()),
        }
        for b, inside in ((b, bin == b) for b in np.unique(bin))
    ]


def best_temperature(differences: ArrayLike) -> float | None:
    """The T that makes sigmoid(d / T) likeliest, over `differences` d of score, chosen minus rejected.

    None if no T > 0 is best: the judge is right no more often than chance, or never wrong.
    """
    d = np.asarray(differences, dtype=float)
    scale = math.sqrt((d * d).mean()) if len(d) else 0.0
    if scale == 0.0:
        return None

    def slope(log_sharpness: float) -> float:  # of the log-likelihood in 1 / T, which is concave there
        return float((d * expit(-d * math.exp(log_sharpness))).sum())

    low, high = (math.log(bound / scale) for bound in (1e-6, 1e6))
    if slope(low) <= 0 or slope(high) >= 0:
        return None
    return math.exp(-brentq(slope, low, high))


def _binned(p: ArrayLike) -> tuple[Floats, Floats, NDArray[np.intp]]:
    p = np.asarray(p, dtype=float)
    confidence = np.maximum(p, 1 - p)
    bin = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return confidence, np.where(p == 0.5, 0.5, p > 0.5), bin


def symmetric_rank_correlation(x: ArrayLike, y: ArrayLike) -> Statistic:
    """Spearman's correlation of two differences between the completions of a pair, x and y.

    Which completion comes first is arbitrary, so that each pair counts in both orders: (x, y) and (-x, -y).
    """
    places = [np.unique(np.concatenate([v, -v]), return_inverse=True)[1] for v in map(np.asarray, (x, y))]

    def statistic(weights: Floats) -> float:
        both = np.concatenate([weights, weights])
        masses = [np.bincount(place, weights=both) for place in places]
        # Mean ranks of equals, centred.
        a, b = ((np.cumsum(m) - m / 2 - both.sum() / 2)[place] for m, place in zip(masses, places, strict=True))
        norm = math.sqrt((both * a * a).sum() * (both * b * b).sum())
        return float((both * a * b).sum() / norm) if norm else math.nan

    return statistic


def kappa(first: ArrayLike, second: ArrayLike, *, categories: int) -> Statistic:
    """Cohen's kappa (1960) of two ratings in 0 … categories - 1: agreement beyond what their shares give by chance.

        kappa = (p_o - p_e) / (1 - p_e)

    Not defined if both say one and the same of everything.
    """
    cell = np.asarray(first, dtype=int) * categories + np.asarray(second, dtype=int)

    def statistic(weights: Floats) -> float:
        table = np.bincount(cell, weights=weights, minlength=categories**2).reshape(categories, categories)
        table = table / table.sum()
        chance = float(table.sum(axis=1) @ table.sum(axis=0))
        return float((np.trace(table) - chance) / (1 - chance)) if chance < 1 - 1e-12 else math.nan

    return statistic


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks, equals sharing their mean rank. None if one side has no order."""
    return _correlation(spearmanr, x, y)


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b, which allows for ties (Kendall 1945). None if one side has no order."""
    return _correlation(kendalltau, x, y)


def _correlation(of: Callable[..., Any], x: Sequence[float], y: Sequence[float]) -> float | None:
    return None if len(set(x)) < 2 or len(set(y)) < 2 else float(of(x, y).statistic)

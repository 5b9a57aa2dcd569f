"""Figures with intervals, for what is measured on pairs: pure functions of arrays.

Pairs of one prompt are not independent, so every interval is over prompts. A share, or a mean of values that are
bounded, has Agresti and Coull's interval; everything else one of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]
"""A figure of all observations, given a weight for each: [n] -> a number, NaN where it is not defined."""

BINS = 10


class Estimate(NamedTuple):
    """A figure, its interval, and how many observations are behind it: `Estimate(0.71, 0.68, 0.74, n=812)`.

    All but `n` are None where there is nothing to estimate from.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int = 0


NOTHING = Estimate(None, None, None, 0)


def mean(
    values: Sequence[float] | Floats,
    prompts: Sequence[str],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
) -> Estimate:
    """The mean of `values`, which lie within `bounds`; of zeros and ones it is a share. `prompts[i]` is value i's.

    Agresti and Coull's interval (The American Statistician 52, 1998), whose centre is Wilson's: z² observations are
    added, half of them at each bound, and the normal interval is taken. It stays honest where all values are equal,
    and near the bounds. Beyond the paper, the variance is that between prompts, so that any bounded values may stand
    for zeros and ones and several pairs may share a prompt; the added observations are prompts of the mean size.
    """
    if not len(values):
        return NOTHING
    bottom, top = bounds
    x = (np.asarray(values, dtype=float) - bottom) / (top - bottom)
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    count = prompt.max() + 1
    size = len(x) / count
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    total = len(x) + z * z * size
    centre = (x.sum() + z * z * size / 2) / total
    between = np.bincount(prompt, weights=x - centre)
    variance = ((between**2).sum() + z * z * size**2 / 2 * (centre**2 + (1 - centre) ** 2)) / total**2
    half = z * math.sqrt(variance)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    back = [float(bottom + (top - bottom) * v) for v in (x.mean(), low, high)]
    return Estimate(back[0], back[1], back[2], len(x))


def bootstrap(
    statistic: Statistic,
    prompts: Sequence[str],
    *,
    confidence: float = 0.95,
    samples: int = 1_000,
    seed: int = 0,
) -> Estimate:
    """`statistic` of all observations, with its percentile bootstrap interval over prompts."""
    if not len(prompts):
        return NOTHING
    value = statistic(np.ones(len(prompts)))
    if math.isnan(value):
        return Estimate(None, None, None, len(prompts))
    drawn = [statistic(weights) for weights in _resamples(prompts, samples, seed)]
    defined = [v for v in drawn if not math.isnan(v)]
    if not defined:
        return Estimate(value, None, None, len(prompts))
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), len(prompts))


def _resamples(prompts: Sequence[str], samples: int, seed: int) -> Iterator[Floats]:
    """Weights of the observations where as many prompts as there are were drawn with replacement."""
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    count = int(prompt.max()) + 1
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        yield drawn[prompt].astype(float)


# Calibration. `p` is everywhere the judge's probability that the completion labelled better is the better one.


def calibration_error(
    p: ArrayLike,
    prompts: Sequence[str],
    *,
    bins: int = BINS,
    confidence: float = 0.95,
    samples: int = 1_000,
    seed: int = 0,
) -> Estimate:
    """Expected calibration error (Guo et al., arXiv:1706.04599, Eq. 3), for a choice between two completions:

        ECE = Σ_b (n_b / n) |accuracy_b - confidence_b|

    over equal bins of the confidence max(p, 1 - p), which lies in [0.5, 1] where theirs, of many classes, lies in
    [0, 1]. The judge is right where p > 0.5, and half right where it is 0.5.

    Noise can only raise it, so that percentiles of a bootstrap would miss a calibrated judge every time. The interval
    has instead the errors c · ECE, c >= 0, under which what was found is no surprise: with the bins' gaps at c times
    those found, and the bootstrap's noise on top, it lies within the central share `confidence`. Of c = 0 that is the
    test of calibration.
    """
    claimed, right, bin = _binned(p, bins)
    if not len(bin):
        return NOTHING

    def gaps(weights: Floats) -> Floats:
        return np.bincount(bin, weights=weights * (right - claimed), minlength=bins) / weights.sum()

    found = gaps(np.ones(len(bin)))
    noise = np.stack([gaps(weights) for weights in _resamples(prompts, samples, seed)]) - found  # [samples, bins]
    value = float(np.abs(found).sum())

    def least(share: float) -> float:
        """The least c whose quantile `share` is no less than what was found."""

        def reaches(c: float) -> bool:
            return float(np.quantile(np.abs(c * found + noise).sum(axis=1), share)) >= value

        low, high = 0.0, 1.0
        if reaches(low) or value == 0:
            return 0.0
        while not reaches(high):
            low, high = high, 2 * high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return high

    tail = (1 - confidence) / 2
    low, high = (value * least(share) for share in (1 - tail, tail))
    return Estimate(value, min(low, value), max(high, value), len(bin))


def calibrated_error(p: ArrayLike, *, bins: int = BINS, samples: int = 200, seed: int = 0) -> float | None:
    """The ECE that a perfectly calibrated judge of these confidences would show on so many pairs, by chance alone."""
    confidence, _, bin = _binned(p, bins)
    if not len(confidence):
        return None
    generator = np.random.default_rng(seed)

    def gap() -> float:
        right = np.where(confidence == 0.5, 0.5, generator.random(len(bin)) < confidence)
        return float(np.abs(np.bincount(bin, weights=right - confidence, minlength=bins)).sum() / len(bin))

    return sum(gap() for _ in range(samples)) / samples


def reliability(p: ArrayLike, prompts: Sequence[str], *, bins: int = BINS) -> list[dict[str, Any]]:
    """`[{"from": 0.5, "to": 0.55, "pairs": 40, "confidence": 0.52, "accuracy": Estimate(…)}, …]`, without empty bins."""
    confidence, right, bin = _binned(p, bins)
    names = np.asarray(prompts)
    table = []
    for b in np.unique(bin):
        inside = bin == b
        table.append(
            {
                "from": 0.5 + 0.5 * int(b) / bins,
                "to": 0.5 + 0.5 * (int(b) + 1) / bins,
                "pairs": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": mean(right[inside], names[inside].tolist()),
            }
        )
    return table


def best_temperature(differences: ArrayLike) -> float | None:
    """The T that makes sigmoid(d / T) likeliest, over `differences` d of score, chosen minus rejected.

    None where no T > 0 is best: the judge is right no more often than chance, or never wrong.
    """
    d = np.asarray(differences, dtype=float)
    scale = math.sqrt((d * d).mean()) if len(d) else 0.0
    if scale == 0.0:
        return None

    def slope(sharpness: float) -> float:  # of the log-likelihood in 1 / T, which is concave there
        return float((d * sigmoid(-d * sharpness)).sum())

    low, high = 1e-6 / scale, 1e6 / scale
    if slope(low) <= 0 or slope(high) >= 0:
        return None
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / low


def sigmoid(x: ArrayLike) -> Floats:
    return 0.5 * (1 + np.tanh(np.asarray(x, dtype=float) / 2))  # does not overflow


def _binned(p: ArrayLike, bins: int) -> tuple[Floats, Floats, NDArray[np.intp]]:
    p = np.asarray(p, dtype=float)
    confidence = np.maximum(p, 1 - p)
    bin = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return confidence, np.where(p == 0.5, 0.5, p > 0.5), bin


# Agreement


def symmetric_rank_correlation(x: ArrayLike, y: ArrayLike) -> Statistic:
    """Spearman's correlation of two differences between the completions of a pair, x and y.

    Which completion comes first is arbitrary, so that each pair counts in both orders: (x, y) and (-x, -y).
    """
    places = [np.unique(np.concatenate([v, -v]), return_inverse=True)[1] for v in map(np.asarray, (x, y))]

    def statistic(weights: Floats) -> float:
        both = np.concatenate([weights, weights])
        ranks = []
        for place in places:
            mass = np.bincount(place, weights=both)
            ranks.append((np.cumsum(mass) - mass / 2 - both.sum() / 2)[place])  # mean ranks of equals, centred
        a, b = ranks
        norm = math.sqrt((both * a * a).sum() * (both * b * b).sum())
        return float((both * a * b).sum() / norm) if norm else math.nan

    return statistic


def kappa(first: ArrayLike, second: ArrayLike, *, categories: int) -> Statistic:
    """Cohen's kappa (1960) of two ratings in 0 … categories - 1: agreement beyond what their shares give by chance.

        kappa = (p_o - p_e) / (1 - p_e)

    Not defined where both say one and the same of everything.
    """
    cell = np.asarray(first, dtype=int) * categories + np.asarray(second, dtype=int)

    def statistic(weights: Floats) -> float:
        table = np.bincount(cell, weights=weights, minlength=categories**2).reshape(categories, categories)
        table = table / table.sum()
        chance = float(table.sum(axis=1) @ table.sum(axis=0))
        return float((np.trace(table) - chance) / (1 - chance)) if chance < 1 - 1e-12 else math.nan

    return statistic


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks, equals sharing their mean rank. None where one side has no order."""
    ranks = []
    for values in (x, y):
        _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    if len(x) < 2 or min(np.ptp(r) for r in ranks) == 0:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b, which allows for ties (Kendall 1945). None where one side has no order."""
    signs = [np.sign(np.subtract.outer(values, values)) for values in (np.asarray(x, float), np.asarray(y, float))]
    norm = math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    return float((signs[0] * signs[1]).sum() / norm) if norm else None

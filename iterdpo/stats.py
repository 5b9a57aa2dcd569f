"""Estimates with their intervals. Pure functions of arrays.

Plain statistics come from scipy where they are needed. The rest is written by hand for two reasons: completions of one
prompt are not independent, so intervals are over prompts, which scipy does not offer; and `bootstrap_mean`
has drawn the figures of finished rounds, which scipy's draws would change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]
"""A figure of all observations, given a weight for each: [n] -> a number, NaN if it is not defined."""

DRAWS = 2**20
"""Random draws that `bootstrap_mean` holds at a time, 16 bytes each."""


class Estimate(NamedTuple):
    """A figure, its interval, and how many observations it was made from: `Estimate(0.71, 0.68, 0.74, n=812)`.

    All but `n` are None if there is nothing to estimate from.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int = 0


NOTHING = Estimate(None, None, None, 0)


class Bootstrap(TypedDict, total=False):
    """How intervals are drawn, if not as `bootstrap_mean` does: `{"confidence": 0.95, "samples": 10_000, "seed": 0}`."""

    confidence: float
    samples: int
    seed: int


def bootstrap_mean(
    values: Iterable[float], *, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean of `values` with its percentile bootstrap interval.

    Drawn by hand, since the figures of finished rounds come from these draws, and scipy.stats.bootstrap makes others.
    """
    data = np.fromiter(values, float)
    if not len(data):
        return NOTHING
    generator = np.random.default_rng(seed)
    rows = max(1, min(samples, DRAWS // len(data)))  # a row is a resample; the draws do not depend on the block's size
    sizes = [(min(rows, samples - start), len(data)) for start in range(0, samples, rows)]
    means = np.concatenate([data[generator.integers(len(data), size=size)].mean(axis=1) for size in sizes])
    return Estimate(float(data.mean()), *_percentiles(means, confidence), len(data))


def spending_confidence(confidence: float, look: int) -> float:
    """The coverage of an interval at the first, second, … look at the same prompts, so that all looks together have `confidence`.

    The allowed error alpha is spent as alpha / (t (t + 1)) at look t (alpha spending: Foster and Stine, JRSS B 70,
    2008). The shares add up to alpha over any number of looks, so that it need not be planned, and the union bound asks
    nothing of how the looks depend on each other.
    """
    return 1 - (1 - confidence) / (look * (look + 1))


def clustered_mean(
    values: Sequence[float] | Floats,
    prompts: Sequence[str],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
) -> Estimate:
    """The mean of `values`, which lie within `bounds`; of zeros and ones it is a share. `prompts[i]` is value i's.

    Agresti and Coull's interval (The American Statistician 52, 1998), whose centre is Wilson's: z² observations are
    added, half of them at each bound, and the normal interval is taken. It stays honest if all values are equal,
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
    value, low, high = (float(bottom + (top - bottom) * v) for v in (x.mean(), low, high))
    return Estimate(value, low, high, len(x))


def clustered_bootstrap(
    statistic: Statistic, prompts: Sequence[str], *, confidence: float = 0.95, samples: int = 1_000, seed: int = 0
) -> Estimate:
    """`statistic` of all observations, with its percentile bootstrap interval over prompts."""
    if not len(prompts):
        return NOTHING
    value = statistic(np.ones(len(prompts)))
    if math.isnan(value):
        return Estimate(None, None, None, len(prompts))
    drawn = [statistic(weights) for weights in resampled_weights(prompts, samples, seed)]
    defined = [v for v in drawn if not math.isnan(v)]
    if not defined:
        return Estimate(value, None, None, len(prompts))
    return Estimate(float(value), *_percentiles(defined, confidence), len(prompts))


def resampled_means(values: Floats, *, samples: int, generator: np.random.Generator) -> Floats:
    """Means over prompts, [samples, M], after as many prompts as there are were drawn with replacement from [P, M]."""
    count = len(values)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=samples)
    return np.asarray(weights @ values / count, dtype=float)


def nested_bootstrap(
    values: Sequence[float], draws: Sequence[Floats], *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of the runs' figures, with a percentile bootstrap interval over runs, and over prompts within each.

    `values[i]` is the figure of run i, `draws[i]` [B] the same after its prompts were resampled. A draw takes as many
    runs as there are, with replacement, and of each one of its draws. With few runs the interval is too narrow, since
    their spread is estimated from few: `student_interval` is not.
    """
    if not len(values):
        return NOTHING
    pool = np.stack(list(draws))  # [runs, B]
    runs, samples = pool.shape
    generator = np.random.default_rng(seed)
    which = generator.integers(runs, size=(samples, runs))
    means = pool[which, generator.integers(samples, size=(samples, runs))].mean(axis=1)
    return Estimate(float(np.mean(values)), *_percentiles(means, confidence), runs)


def student_interval(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """The mean of the runs' figures with Student's interval over runs. Without an interval if there is one run.

    A run's figure has the luck of its training and of its prompts in it, so that both are covered if every run has
    prompts of its own.
    """
    if len(values) < 2:
        return Estimate(float(values[0]), None, None, 1) if len(values) else NOTHING
    from scipy import stats

    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    middle = float(np.mean(values))
    return Estimate(middle, middle - half, middle + half, len(values))


def _percentiles(drawn: Floats | list[float], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def resampled_weights(prompts: Sequence[str], samples: int, seed: int) -> Iterator[Floats]:
    """Weights of the observations after as many prompts as there are were drawn with replacement."""
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    count = int(prompt.max()) + 1
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        yield drawn[prompt].astype(float)


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), written so that it cannot overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))

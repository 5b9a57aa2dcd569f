"""Calibration and agreement: by hand, and the coverage of their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from iterdpo.stats import Estimate, clustered_bootstrap
from judges.audit.stats import best_temperature, calibration_error, kappa, kendall, spearman, symmetric_rank_correlation
from tests.unit.judges.audit.faulty_judges import covered


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_interval_of_the_calibration_error_holds_the_truth_as_often_as_it_says(temperature: float) -> None:
    """Also of a calibrated judge, whose error is 0: every sample shows more, by chance."""
    gaps = np.array([0.3, 0.9, 1.6, 2.4])
    claimed, true = 1 / (1 + np.exp(-gaps)), 1 / (1 + np.exp(-gaps / temperature))
    names = [str(i) for i in range(600)]

    def draw(rng: np.random.Generator) -> Estimate:
        at = rng.integers(4, size=600)
        right = rng.random(600) < true[at]
        p = np.where(right, claimed[at], 1 - claimed[at])
        return calibration_error(p, names, samples=200)

    assert covered(draw, float((claimed - true).mean()), seeds=100) >= 0.9


def test_the_intervals_of_kappa_and_rank_correlation_hold_the_truth_as_often_as_they_say() -> None:
    names = [str(i) for i in range(300)]

    def of_kappa(rng: np.random.Generator) -> Estimate:  # fair coins that agree with P = 0.8: kappa = (0.8 - 0.5) / 0.5
        a = rng.integers(2, size=300)
        b = np.where(rng.random(300) < 0.8, a, 1 - a)
        return clustered_bootstrap(kappa(a, b, categories=3), names, samples=200)

    assert covered(of_kappa, 0.6, seeds=100) >= 0.9

    def of_ranks(rng: np.random.Generator) -> Estimate:  # bivariate normal: Spearman's is 6/pi asin(rho / 2)
        x = rng.normal(size=300)
        y = 0.5 * x + math.sqrt(0.75) * rng.normal(size=300)
        return clustered_bootstrap(symmetric_rank_correlation(x, y), names, samples=200)

    assert covered(of_ranks, 6 / math.pi * math.asin(0.25), seeds=100) >= 0.9


def test_calibration_error_by_hand() -> None:
    # Confidences 0.9, 0.9, 0.6, 0.8; right, right, right, wrong. Gaps of the bins: |2 - 1.8|, |1 - 0.6|, |0 - 0.8|.
    assert calibration_error([0.9, 0.9, 0.6, 0.2], list("abcd")).value == pytest.approx((0.2 + 0.4 + 0.8) / 4)
    # A coin that knows it: half right, with confidence one half.
    assert calibration_error([0.5, 0.5], list("ab")).value == 0.0
    # Sure, and right three times of four.
    assert calibration_error([1.0, 1.0, 1.0, 0.0], list("abcd")).value == pytest.approx(0.25)


def test_kappa_by_hand() -> None:
    # [[20, 5], [10, 15]]: observed 35/50 = 0.7; by chance 0.5 · 0.6 + 0.5 · 0.4 = 0.5; (0.7 - 0.5) / (1 - 0.5) = 0.4
    a = [0] * 25 + [1] * 25
    b = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert kappa(a, b, categories=3)(np.ones(50)) == pytest.approx(0.4)
    assert math.isnan(kappa([1, 1], [1, 1], categories=3)(np.ones(2)))


def test_rank_correlations_by_hand() -> None:
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)  # two pairs alike, one contrary
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # tau-b: one tie in x
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(1 - 6 * 2 / (3 * 8))
    assert spearman([1, 1], [1, 2]) is None
    assert kendall([1, 1], [1, 2]) is None


def test_the_best_temperature_by_hand() -> None:
    # Right three times of four at a difference of 1: sigmoid(1 / T) = 3/4, so 1 / T = ln 3.
    assert best_temperature([1, 1, 1, -1]) == pytest.approx(1 / math.log(3))
    assert best_temperature([1, -1]) is None  # a coin
    assert best_temperature([1, 2]) is None  # never wrong
    assert best_temperature([]) is None

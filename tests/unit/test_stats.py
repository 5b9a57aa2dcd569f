"""Estimates by hand, and their intervals' coverage by simulation."""

from __future__ import annotations

import math
import tracemalloc
from bisect import bisect

import numpy as np
import pytest
from scipy.stats import binom

from iterdpo.stats import (
    NOTHING,
    Estimate,
    bootstrap_mean,
    clustered_mean,
    nested_bootstrap,
    resampled_means,
    sigmoid,
    spending_confidence,
    student_interval,
)
from tests.unit.judges.audit.faulty_judges import covered


def test_the_interval_of_two_values_is_what_enumeration_gives() -> None:
    # resamples of (0, 1): means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4; the middle 40 % is all 1/2
    assert bootstrap_mean([0.0, 1.0], confidence=0.95) == Estimate(0.5, 0.0, 1.0, 2)
    assert bootstrap_mean([0.0, 1.0], confidence=0.40) == Estimate(0.5, 0.5, 0.5, 2)


def test_one_prompt_has_an_interval_of_no_width() -> None:
    assert bootstrap_mean([0.7], samples=100) == Estimate(0.7, pytest.approx(0.7), pytest.approx(0.7), 1)


def test_the_interval_of_many_prompts_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    mean, low, high, _ = bootstrap_mean(values.tolist(), samples=10_000)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert (mean, low, high) == (
        pytest.approx(values.mean()),
        pytest.approx(values.mean() - half, abs=0.05 * half),
        pytest.approx(values.mean() + half, abs=0.05 * half),
    )


@pytest.mark.parametrize("confidence", [0.80, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(confidence: float) -> None:
    generator = np.random.default_rng(2)
    trials, prompts, truth = 500, 100, 0.4
    covered = 0
    for trial in range(trials):
        wins = (generator.random(prompts) < truth).astype(float)
        _, low, high, _ = bootstrap_mean(wins.tolist(), confidence=confidence, samples=500, seed=trial)
        assert low is not None
        assert high is not None
        covered += low <= truth <= high
    # a standard deviation of `covered / trials` is 0.018 at 80 % and 0.010 at 95 %; a percentile interval of 100
    # coin flips is itself off by about a point
    assert covered / trials == pytest.approx(confidence, abs=0.045)


def test_intervals_are_the_same_for_the_same_seed_and_differ_for_another() -> None:
    values = np.random.default_rng(3).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_resamples_are_the_same_draws_whether_made_at_once_or_in_blocks() -> None:
    values = np.random.default_rng(6).normal(size=3000)
    tail = (1 - 0.95) / 2  # as floats have it
    at_once = values[np.random.default_rng(7).integers(3000, size=(4000, 3000))].mean(axis=1)  # more than HELD draws
    assert bootstrap_mean(values.tolist(), samples=4000, seed=7)[1:3] == tuple(np.quantile(at_once, [tail, 1 - tail]))


def test_the_memory_of_an_interval_does_not_grow_with_prompts_times_resamples() -> None:
    values = np.random.default_rng(8).normal(size=100_000)
    tracemalloc.start()
    bootstrap_mean(values.tolist(), samples=200)  # 2e7 draws of 8 bytes, and as many values: 320 MB at once
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6


# Of 1,000 intervals at 95 %, 93.6 to 96.4 % hold the truth but for 5 in 100 such tests; the seeds are fixed. Counts are
# whole numbers, so that the coverage of a share's interval is a little off 95 % for any single share: at 150 of 300 it
# is 94 %, and near the bounds it is more than 95 %.


@pytest.mark.parametrize(("share", "count"), [(0.5, 300), (0.8, 100), (0.97, 300), (0.02, 200)])
def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says(share: float, count: int) -> None:
    names = [str(i) for i in range(count)]
    rate = covered(lambda rng: clustered_mean(rng.random(count) < share, names), share, seeds=1_000)
    assert 0.925 <= rate <= 0.99


def test_the_interval_of_a_mean_with_ties_holds_the_truth_as_often_as_it_says() -> None:
    names = [str(i) for i in range(300)]

    def draw(rng: np.random.Generator) -> Estimate:
        return clustered_mean(rng.choice([1.0, 0.5, 0.0], p=[0.6, 0.2, 0.2], size=300), names)

    assert 0.93 <= covered(draw, 0.7, seeds=400) <= 0.98


def test_pairs_of_one_prompt_do_not_count_as_independent() -> None:
    names = [str(i // 5) for i in range(500)]  # 100 prompts of five pairs, all right or all wrong

    def draw(rng: np.random.Generator) -> Estimate:
        return clustered_mean(np.repeat(rng.random(100) < 0.7, 5), names)

    assert 0.93 <= covered(draw, 0.7, seeds=400) <= 0.98
    independent = [str(i) for i in range(500)]
    narrow = covered(lambda rng: clustered_mean(np.repeat(rng.random(100) < 0.7, 5), independent), 0.7, seeds=400)
    assert narrow < 0.7  # what is avoided


def test_the_intervals_of_differences_and_positions_hold_the_truth_as_often_as_they_say() -> None:
    names = [str(i) for i in range(300)]

    def difference(rng: np.random.Generator) -> Estimate:
        return clustered_mean(rng.choice([1.0, 0.0, -1.0], p=[0.3, 0.6, 0.1], size=300), names, bounds=(-1.0, 1.0))

    assert 0.93 <= covered(difference, 0.2, seeds=400) <= 0.98

    def first(rng: np.random.Generator) -> Estimate:  # two comparisons a pair; a fifth of the pairs say "first" twice
        flipped = rng.random(300) < 0.2
        values = np.stack([np.ones(300), flipped], axis=1).ravel()
        return clustered_mean(values, [str(i // 2) for i in range(600)])

    assert 0.93 <= covered(first, 0.6, seeds=400) <= 0.99


def test_the_interval_of_a_share_is_that_of_agresti_and_coull() -> None:
    # 8 of 10, z = 1.959964: n' = 10 + z² = 13.8415, p' = (8 + z²/2) / n' = 0.71674,
    # p' ± z sqrt(p' (1 - p') / n') = 0.71674 ± 0.23737
    found = clustered_mean([1.0] * 8 + [0.0] * 2, [str(i) for i in range(10)])
    assert found == (pytest.approx(0.8), pytest.approx(0.4794, abs=1e-4), pytest.approx(0.9541, abs=1e-4), 10)


def test_what_all_looks_spend_is_the_error_that_one_may_make() -> None:
    spent = [1 - spending_confidence(0.95, look) for look in range(1, 11)]
    assert spent[:3] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert sum(spent) == pytest.approx(0.05 * (1 - 1 / 11))  # a telescope


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_intervals_of_ten_looks_hold_all_truths_if_the_error_is_spent_and_one_its_own(share: float) -> None:
    """Exactly, by the binomial distribution of the wins. The looks are independent: the hardest case of the union bound."""
    prompts = 150

    def covers(wins: int, confidence: float) -> bool:
        values = [1.0] * wins + [0.0] * (prompts - wins)
        _, low, high, _ = bootstrap_mean(values, confidence=confidence)
        assert low is not None
        assert high is not None
        return low <= share <= high

    def coverage(confidence: float) -> float:
        """Between a fewest and a most wins, which bisection finds, the interval holds the share."""
        around = round(prompts * share)
        most = bisect(range(around, prompts), 0, key=lambda wins: 0 if covers(wins, confidence) else 1) + around - 1
        fewest = around - bisect(range(around), 0, key=lambda less: 0 if covers(around - less, confidence) else 1) + 1
        return float(binom.cdf(most, prompts, share) - binom.cdf(fewest - 1, prompts, share))

    assert 0.93 <= coverage(0.95) <= 0.97
    assert math.prod(coverage(spending_confidence(0.95, look)) for look in range(1, 11)) >= 0.93
    assert coverage(0.95) ** 10 < 0.7  # what is avoided


def test_the_sigmoid_does_not_overflow() -> None:
    assert [sigmoid(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]
    assert sigmoid(math.log(3)) == pytest.approx(0.75)


def test_students_interval_is_that_of_the_tables() -> None:
    found = student_interval([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027
    assert found == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5, 3), abs=1e-3)
    assert student_interval([1.5]) == Estimate(1.5, None, None, 1)
    assert student_interval([]) == NOTHING


def test_a_nested_bootstrap_has_the_spread_of_runs_and_of_their_prompts() -> None:
    generator = np.random.default_rng(0)
    apart = [np.full(2000, value) for value in (0.0, 1.0)]  # runs that differ, of prompts that do not
    assert nested_bootstrap([0.0, 1.0], apart) == Estimate(0.5, 0.0, 1.0, 2)
    alike = [
        resampled_means(generator.normal(size=(400, 1)), samples=2000, generator=generator)[:, 0] for _ in range(4)
    ]
    found = nested_bootstrap([0.0] * 4, [draws - draws.mean() for draws in alike])
    assert found.low is not None
    assert -found.low == pytest.approx(1.96 / math.sqrt(4 * 400), rel=0.2)
    assert nested_bootstrap([], []) == NOTHING

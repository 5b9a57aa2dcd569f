"""Mean scores and the best of N worked out by hand, KL against its closed form."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from iterdpo.evaluation.scores import best_of, best_of_weights, logp_gap, mean_score, sequence_kl
from iterdpo.stats import Estimate


def test_the_mean_score_is_over_prompts_and_not_over_completions() -> None:
    # means 2, 4 and none; over completions it would be (1 + 3 + 4) / 3
    assert mean_score([[1.0, 3.0], [4.0, None], [None]]).value == 3.0


def test_kl_is_the_mean_over_prompts_of_the_difference_of_log_probabilities() -> None:
    # first prompt: (-1 + 2.5 - 2 + 2) / 2 = 0.75; second: -3 + 2.5 = -0.5
    assert sequence_kl([[-1.0, -2.0], [-3.0]], [[-2.5, -2.0], [-2.5]]).value == 0.125
    assert sequence_kl([[-4.0, -5.0]], [[-4.0, -5.0]]) == Estimate(0.0, 0.0, 0.0, 1)


def test_kl_estimated_from_samples_agrees_with_the_closed_form() -> None:
    # completions of 3 tokens, each drawn alone: KL = 3 * sum_v p log(p / q)
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    q = np.array([0.1, 0.3, 0.2, 0.2, 0.2])
    ratio = np.log(p / q)
    exact = 3 * float(p @ ratio)
    prompts, completions = 4000, 2
    drawn = np.random.default_rng(4).choice(len(p), p=p, size=(prompts, completions, 3))
    interval = sequence_kl(np.log(p)[drawn].sum(-1).tolist(), np.log(q)[drawn].sum(-1).tolist(), samples=1000)
    error = math.sqrt(3 * float(p @ (ratio - p @ ratio) ** 2) / (prompts * completions))  # one standard error
    assert interval.value == pytest.approx(exact, abs=4 * error)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < exact < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_gap_is_the_mean_over_completions_of_nats_a_token() -> None:
    # |-3 + 4| / 2 = 0.5 and |-1 + 1| / 1 = 0
    assert logp_gap([[-1.0, -2.0], [-1.0]], [-4.0, -1.0]) == 0.25
    assert logp_gap([], []) is None


def test_the_best_of_two_of_three_is_the_mean_of_all_twos() -> None:
    assert best_of(2, [[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]) == pytest.approx((2 + 3 + 3) / 3)
    # the first two tie for the judge that chooses: 15, 30 and 30 of the judge that scores
    assert best_of(2, [[1.0, 1.0, 2.0]], [[10.0, 20.0, 30.0]]) == pytest.approx(25)
    assert best_of(1, [[5.0, 1.0]], [[1.0, 2.0]]) == best_of(2, [[5.0, 1.0]], [[1.5, 2.0]]) == 1.5


def test_prompts_with_fewer_judged_completions_have_no_best_of_so_many() -> None:
    assert best_of(2, [[1.0, None], [1.0, 2.0]], [[1.0, 1.0], [3.0, 4.0]]) == 4.0
    assert best_of(2, [[1.0, 2.0]], [[None, 2.0]]) is None


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_what_enumeration_of_all_draws_gives(n: int) -> None:
    generator = np.random.default_rng(n)
    chosen = generator.integers(0, 4, size=(6, 5)).astype(float)
    scored = generator.normal(size=(6, 5))
    expected = []
    for by, value in zip(chosen, scored, strict=True):
        for drawn in combinations(range(5), n):
            best = [i for i in drawn if by[i] == max(by[j] for j in drawn)]
            expected.append(np.mean(value[best]))  # one of those that tie
    assert best_of(n, chosen.tolist(), scored.tolist()) == pytest.approx(np.mean(expected))


def test_the_weights_of_best_of_n_are_those_of_every_choice_of_n() -> None:
    scores = np.array([0.3, 0.1, 0.9, math.nan, 0.5])
    for n in (1, 2, 3, 4):
        wins = np.zeros(5)
        choices = list(combinations([0, 1, 2, 4], n))
        for choice in choices:
            wins[max(choice, key=lambda i: scores[i])] += 1
        weights = best_of_weights(scores, n)
        assert weights is not None
        assert weights == pytest.approx(wins / len(choices))
    assert best_of_weights(scores, 5) is None  # one was not judged


def test_equal_scores_share_their_chance_to_be_the_best() -> None:
    weights = best_of_weights(np.array([1.0, 2.0, 2.0]), 2)
    assert weights is not None
    assert weights == pytest.approx([0, 1 / 2, 1 / 2])  # of three choices of two, none is without a 2

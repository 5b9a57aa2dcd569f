"""What comparisons say together, and the scores that follow."""

from __future__ import annotations

import itertools
import math

import pytest

from iterdpo.judging.comparisons import (
    PairResult,
    bradley_terry,
    count_cycles,
    judgment_from_comparisons,
    resolve_comparisons,
)
from iterdpo.testing import make_group
from iterdpo.types import Comparison


def both(i: int, j: int, winner: int | None, reason: str | None = None) -> list[Comparison]:
    """i and j in both orders; `winner` is one of them, or None for a tie (with a `reason`: not judged)."""
    if reason is not None:
        return [Comparison(i, j, None, reason), Comparison(j, i, None, reason)]
    if winner is None:
        return [Comparison(i, j, "tie"), Comparison(j, i, "tie")]
    return [
        Comparison(i, j, "first" if winner == i else "second"),
        Comparison(j, i, "second" if winner == i else "first"),
    ]


def test_a_verdict_that_changes_with_the_order_is_a_tie() -> None:
    assert resolve_comparisons([Comparison(0, 1, "first"), Comparison(1, 0, "first")]) == [PairResult(0, 1, 0.5)]
    assert resolve_comparisons([Comparison(0, 1, "first"), Comparison(1, 0, "tie")]) == [PairResult(0, 1, 0.5)]
    assert resolve_comparisons([Comparison(0, 1, "first"), Comparison(1, 0, "second")]) == [PairResult(0, 1, 1.0)]
    assert resolve_comparisons([Comparison(1, 0, "first")]) == [PairResult(0, 1, 0.0)]
    late = [Comparison(0, 1, "first"), Comparison(1, 0, None, "late")]
    assert resolve_comparisons(late) == [PairResult(0, 1, 0.5, "late")]


def test_of_probabilities_the_mean_over_the_orders_counts() -> None:
    soft = [Comparison(0, 1, "first", probability=0.9), Comparison(1, 0, "first", probability=0.6)]
    [result] = resolve_comparisons(soft)
    assert result.share == pytest.approx((0.9 + 0.4) / 2)
    # Of i = 0: 0.75 when it was first, 1 - 0.5 when it was second.
    soft = [Comparison(0, 1, "first", probability=0.75), Comparison(1, 0, "tie", probability=0.5)]
    assert resolve_comparisons(soft) == [PairResult(0, 1, 0.625)]


def test_win_rates_are_mean_shares() -> None:
    group = make_group("?", ["x", "y", "z"])
    judgment = judgment_from_comparisons(group, [*both(0, 1, 0), *both(0, 2, 0), *both(1, 2, None)])
    assert judgment.scores == [1.0, 0.25, 0.25]


def test_a_comparison_that_was_not_judged_makes_both_abstain_and_spares_the_others() -> None:
    group = make_group("?", ["w", "x", "y", "z"])
    whole = [both(i, j, i) for i, j in itertools.combinations(range(4), 2)]
    full = judgment_from_comparisons(group, [c for pair in whole for c in pair])
    failed = both(0, 1, None, reason="timed out")
    partial = judgment_from_comparisons(group, [*failed, *(c for pair in whole[1:] for c in pair)])
    assert partial.scores[:2] == [None, None]
    assert partial.abstentions[:2] == ["timed out", "timed out"]
    assert partial.scores[2:] == full.scores[2:]


def test_a_completion_that_never_could_be_compared_is_left_out_of_the_others_scores() -> None:
    group = make_group("?", ["x", "y", "empty"])
    comparisons = [*both(0, 1, 1), *both(0, 2, None, reason="too long"), *both(1, 2, None, reason="too long")]
    assert judgment_from_comparisons(group, comparisons).scores == [0.0, 1.0, None]
    passing = judgment_from_comparisons(group, comparisons, is_permanent=lambda reason: reason != "too long")
    assert passing.scores == [None] * 3  # judged against it, these two might have fared otherwise


def test_bradley_terry_abstains_as_a_whole_since_every_score_depends_on_every_comparison() -> None:
    group = make_group("?", ["x", "y", "z"])
    comparisons = [*both(0, 1, None, reason="no verdict"), *both(0, 2, 0), *both(1, 2, 1)]  # each met somebody
    judgment = judgment_from_comparisons(group, comparisons, aggregate="bradley_terry")
    assert judgment.scores == [None] * 3
    assert judgment.abstentions == ["no verdict"] * 3


def test_bradley_terry_of_two_is_the_log_odds_of_their_comparisons() -> None:
    # Without a prior the maximum likelihood is s_0 - s_1 = log(w / (1 - w)).
    strengths = bradley_terry(2, [(0, 1, 0.8)], prior=1e-9)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(0.8 / 0.2), abs=1e-4)
    assert sum(strengths) == pytest.approx(0, abs=1e-9)


def test_bradley_terry_recovers_the_strengths_that_made_the_results() -> None:
    truth = [1.0, 0.2, -0.5, -0.7]
    results = [(i, j, 1 / (1 + math.exp(truth[j] - truth[i]))) for i, j in itertools.combinations(range(4), 2)]
    assert bradley_terry(4, results, prior=1e-9) == pytest.approx(truth, abs=1e-3)


def test_one_that_always_wins_has_a_finite_strength() -> None:
    strengths = bradley_terry(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)])
    assert strengths[0] > strengths[1] > strengths[2]
    assert all(map(math.isfinite, strengths))


def test_a_win_against_a_tie_in_the_other_order_is_a_tie() -> None:
    group = make_group("x", ["p", "q"])
    judgment = judgment_from_comparisons(group, [Comparison(0, 1, "first"), Comparison(1, 0, "tie")])
    assert judgment.scores == [0.5, 0.5]


def test_a_cycle_is_three_completions_that_beat_each_other() -> None:
    circle = [Comparison(0, 1, "first"), Comparison(1, 2, "first"), Comparison(2, 0, "first")]
    ladder = [Comparison(0, 1, "first"), Comparison(1, 2, "first"), Comparison(0, 2, "first")]
    assert count_cycles(circle) == (1, 1)
    assert count_cycles(ladder) == (0, 1)
    assert count_cycles([*circle[:2], Comparison(2, 0, "tie")]) == (0, 0)  # not decisive
    assert count_cycles(circle[:2]) == (0, 0)  # not all were compared
    both_orders = [*both(0, 1, 0), *both(1, 2, 1), *both(0, 2, 2)]
    assert count_cycles(both_orders) == (1, 1)
    assert count_cycles([*both_orders[:4], *both(0, 2, 0)]) == (0, 1)
    assert count_cycles([*both_orders[:4], *both(0, 2, None)]) == (0, 0)

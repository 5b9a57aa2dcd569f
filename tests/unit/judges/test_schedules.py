"""Which completions meet, and the scores that follow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.judging.stats import Met, count_cycles, meetings
from iterdpo.testing import make_group
from iterdpo.types import Comparison
from judges.schedules import Knockout, all_pairs, bradley_terry, judgment_from_comparisons, random_pairs


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
    assert meetings([Comparison(0, 1, "first"), Comparison(1, 0, "first")]) == [Met(0, 1, 0.5)]
    assert meetings([Comparison(0, 1, "first"), Comparison(1, 0, "tie")]) == [Met(0, 1, 0.5)]
    assert meetings([Comparison(0, 1, "first"), Comparison(1, 0, "second")]) == [Met(0, 1, 1.0)]
    assert meetings([Comparison(1, 0, "first")]) == [Met(0, 1, 0.0)]


def test_of_probabilities_the_mean_over_the_orders_counts() -> None:
    soft = [Comparison(0, 1, "first", probability=0.9), Comparison(1, 0, "first", probability=0.6)]
    [met] = meetings(soft)
    assert met.points == pytest.approx((0.9 + 0.4) / 2)


def test_win_rates_are_means_over_those_met() -> None:
    group = make_group("?", ["x", "y", "z"])
    judgment = judgment_from_comparisons(group, [*both(0, 1, 0), *both(0, 2, 0), *both(1, 2, None)])
    assert judgment.scores == [1.0, 0.25, 0.25]


def test_a_comparison_that_was_not_judged_makes_both_abstain_and_leaves_the_others_as_they_were() -> None:
    group = make_group("?", ["w", "x", "y", "z"])
    whole = [both(i, j, i) for i, j in all_pairs(4)]
    full = judgment_from_comparisons(group, [c for pair in whole for c in pair])
    failed = both(0, 1, None, reason="timed out")
    partial = judgment_from_comparisons(group, [*failed, *(c for pair in whole[1:] for c in pair)])
    assert partial.scores[:2] == [None, None]
    assert partial.abstentions[:2] == ["timed out", "timed out"]
    assert partial.scores[2:] == full.scores[2:]


def test_one_that_could_not_be_judged_against_anybody_is_nobodys_opponent() -> None:
    group = make_group("?", ["x", "y", "empty"])
    comparisons = [*both(0, 1, 1), *both(0, 2, None, reason="too long"), *both(1, 2, None, reason="too long")]
    assert judgment_from_comparisons(group, comparisons).scores == [0.0, 1.0, None]
    passing = judgment_from_comparisons(group, comparisons, lasting=lambda reason: reason != "too long")
    assert passing.scores == [None] * 3  # judged against it, these two might have fared otherwise


def test_bradley_terry_abstains_as_a_whole_since_every_score_depends_on_every_comparison() -> None:
    group = make_group("?", ["x", "y", "z"])
    comparisons = [*both(0, 1, None, reason="no verdict"), *both(0, 2, 0), *both(1, 2, 1)]  # each met somebody
    judgment = judgment_from_comparisons(group, comparisons, aggregate="bradley_terry")
    assert judgment.scores == [None] * 3
    assert judgment.abstentions == ["no verdict"] * 3


def test_bradley_terry_of_two_is_the_log_odds_of_their_meetings() -> None:
    # Without a prior the maximum likelihood is s_0 - s_1 = log(w / (1 - w)).
    strengths = bradley_terry(2, [(0, 1, 0.8)], prior=1e-9)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(0.8 / 0.2), abs=1e-4)
    assert sum(strengths) == pytest.approx(0, abs=1e-9)


def test_bradley_terry_recovers_the_strengths_that_made_the_results() -> None:
    truth = [1.0, 0.2, -0.5, -0.7]
    results = [(i, j, 1 / (1 + math.exp(truth[j] - truth[i]))) for i, j in all_pairs(4)]
    assert bradley_terry(4, results, prior=1e-9) == pytest.approx(truth, abs=1e-3)


def test_one_that_always_wins_has_a_finite_strength() -> None:
    strengths = bradley_terry(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)])
    assert strengths[0] > strengths[1] > strengths[2]
    assert all(map(math.isfinite, strengths))


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 5))
def test_random_pairs_are_distinct_and_link_everybody(count: int, number: int, seed: int) -> None:
    pairs = random_pairs(count, number, seed=seed)
    assert len(pairs) == len(set(pairs)) == min(number, count * (count - 1) // 2)
    assert all(0 <= i < j < count for i, j in pairs)
    if number >= count - 1:
        linked = {0}
        while grown := {k for pair in pairs if linked & set(pair) for k in pair} - linked:
            linked |= grown
        assert linked == set(range(count))


def play(count: int, better: dict[tuple[int, int], float], *, seed: int = 0) -> tuple[list[float | None], int]:
    knockout, played = Knockout(count, seed=seed), 0
    while matches := knockout.matches():
        played += len(matches)
        knockout.record([Met(min(m), max(m), better.get((min(m), max(m)), 1.0)) for m in matches])
    return knockout.judgment(make_group("?", [str(k) for k in range(count)]), []).scores, played


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_knock_out_finds_the_best_in_one_meeting_less_than_there_are(count: int) -> None:
    scores, played = play(count, {})  # the lower number always wins
    assert played == count - 1
    if count > 1:
        assert scores.index(max(s for s in scores if s is not None)) == 0


def test_who_leaves_a_knock_out_by_lot_abstains() -> None:
    scores, _ = play(2, {(0, 1): 0.5})
    assert sorted(scores, key=str) == [0.0, None]


def test_a_knock_out_with_a_meeting_that_was_not_judged_gives_nobody_a_score() -> None:
    knockout = Knockout(4, seed=0)
    knockout.record([Met(min(m), max(m), 0.5, "timed out") for m in knockout.matches()])
    judgment = knockout.judgment(make_group("?", list("wxyz")), [])
    assert judgment.scores == [None] * 4
    assert set(judgment.abstentions) == {"timed out"}


def test_a_circle_of_three_is_one_cycle_of_one_triad() -> None:
    circle = [*both(0, 1, 0), *both(1, 2, 1), *both(0, 2, 2)]
    assert count_cycles(circle) == (1, 1)
    assert count_cycles([*both(0, 1, 0), *both(1, 2, 1), *both(0, 2, 0)]) == (0, 1)
    assert count_cycles([*both(0, 1, 0), *both(1, 2, 1), *both(0, 2, None)]) == (0, 0)

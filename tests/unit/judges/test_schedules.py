"""Which completions are compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.judging.comparisons import PairResult
from iterdpo.testing import make_group
from judges.schedules import Knockout, random_pairs


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
        knockout.record([PairResult(min(m), max(m), better.get((min(m), max(m)), 1.0)) for m in matches])
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
    knockout.record([PairResult(min(m), max(m), 0.5, "timed out") for m in knockout.matches()])
    judgment = knockout.judgment(make_group("?", list("wxyz")), [])
    assert judgment.scores == [None] * 4
    assert set(judgment.abstentions) == {"timed out"}

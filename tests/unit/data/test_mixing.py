"""Shares of fresh, replayed and offline pairs."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.data.mixing import drawn, further_pairs


@pytest.mark.parametrize(
    ("fresh", "replay", "offline", "expected"),
    [(60, 0.3, 0.1, (30, 10)), (50, 0.5, 0.0, (50, 0)), (10, 0.0, 0.0, (0, 0)), (0, 0.5, 0.25, (0, 0))],
)
def test_further_pairs_have_their_shares_of_all(
    fresh: int, replay: float, offline: float, expected: tuple[int, int]
) -> None:
    assert further_pairs(fresh, replay=replay, offline=offline) == expected


def test_too_few_pairs_to_replay_leave_the_offline_ones_their_share() -> None:
    assert further_pairs(60, replay=0.5, offline=0.2, earlier=0) == (0, 15)  # 15 of 75
    assert further_pairs(60, replay=0.5, offline=0.2, earlier=40) == (40, 25)  # 25 of 125
    assert further_pairs(60, replay=0.5, offline=0.2, earlier=100) == (100, 40)  # 40 of 200


@given(st.integers(0, 30), st.integers(0, 12), st.integers(0, 5))
def test_drawn_items_keep_their_order_and_are_as_many_as_asked_for_or_all(size: int, number: int, seed: int) -> None:
    found = drawn(range(size), number, seed=seed)
    assert found == sorted(set(found))
    assert len(found) == min(size, number)
    assert found == drawn(range(size), number, seed=seed)


def test_each_subset_is_drawn_equally_often() -> None:
    # 3,000 draws of 2 of 4: each of the 6 subsets 500 times in the mean, with a standard deviation of 20.4
    counts = Counter(tuple(drawn("abcd", 2, seed=seed)) for seed in range(3000))
    assert counts.keys() == set(combinations("abcd", 2))
    assert all(abs(count - 500) < 5 * 20.4 for count in counts.values())

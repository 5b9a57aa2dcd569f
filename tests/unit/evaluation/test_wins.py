"""Win rates worked out by hand, and their tests."""

from __future__ import annotations

import math

import numpy as np
import pytest

from iterdpo.evaluation.scores import Scores, mean_score
from iterdpo.evaluation.wins import (
    agreement,
    combinations,
    combined_shares,
    duels,
    gap,
    length_controlled,
    shares,
    sign_test,
    tied,
    win_rate,
)
from iterdpo.stats import NOTHING, Estimate


def test_a_win_is_1_a_tie_is_half_and_a_loss_is_0() -> None:
    assert win_rate([[0.9], [0.2], [0.5], [0.5]], [[0.1], [0.3], [0.5], [0.4]]).value == (1 + 0 + 0.5 + 1) / 4


def test_a_prompt_counts_once_with_its_share_over_all_combinations() -> None:
    # first prompt: 3 against {1, 3} is 1 + 0.5, 2 against {1, 3} is 1 + 0: 2.5 of 4. Second: a loss.
    assert win_rate([[3.0, 2.0], [0.0]], [[1.0, 3.0], [1.0]]).value == (2.5 / 4 + 0) / 2


def test_abstentions_are_left_out_and_are_no_losses() -> None:
    candidate: list[Scores] = [[1.0, None], [None], [2.0], [None, None]]
    baseline: list[Scores] = [[0.0], [5.0], [None], [None]]
    assert win_rate(candidate, baseline) == Estimate(1.0, 1.0, 1.0, 1)


def test_where_nothing_was_judged_there_is_no_win_rate() -> None:
    assert win_rate([[None]], [[1.0]]) == NOTHING
    assert win_rate([], []) == NOTHING
    assert mean_score([[None, None], []]) == NOTHING


def test_the_two_sides_of_a_comparison_add_up_to_1() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = (generator.integers(0, 4, size=(30, 3)).astype(float).tolist() for _ in range(2))
    one, other = win_rate(ours, theirs).value, win_rate(theirs, ours).value
    assert one is not None
    assert other is not None
    assert one + other == pytest.approx(1)
    assert win_rate(ours, ours).value == pytest.approx(0.5)


def test_prompts_without_a_partner_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        win_rate([[1.0], [2.0]], [[1.0]])


def test_duels_without_a_judged_one_leave_the_prompt_out() -> None:
    assert list(shares(duels([[[1.0, 0.0], [0.5, 0.5]], [[None, 1.0]], [[0.0, 1.0], [None, 0.0]]]))) == [
        0.75,
        None,
        0.0,
    ]


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (5, 5, 1.0),
        (6, 0, 2 / 2**6),
        (0, 0, None),
    ],
)
def test_the_sign_test_is_that_of_wins_against_losses_whatever_ties(wins: int, losses: int, p: float | None) -> None:
    assert sign_test([*[1.0] * wins, *[0.25] * losses, *[0.5] * 7, None]) == (None if p is None else pytest.approx(p))


def test_ties_are_a_share_of_the_judged_prompts() -> None:
    assert tied([0.5, 1.0, None, 0.5, 0.0]) == 0.5
    assert tied([None]) is None


def test_shares_by_sorting_are_those_of_all_combinations_to_the_last_digit() -> None:
    generator = np.random.default_rng(0)

    def scores() -> list[Scores]:
        drawn = generator.choice([None, -math.inf, 0.0, 0.1, 0.2, 0.3], size=(60, 7), p=[0.3, *[0.14] * 5]).tolist()
        return [row[: generator.integers(1, 8)] for row in drawn]

    ours, theirs = scores(), scores()
    found = list(combined_shares(ours, theirs))
    assert found == list(shares(combinations(ours, theirs)))
    by_hand = []
    for a, b in zip(ours, theirs, strict=True):
        won = [0.5 if x == y else float(x > y) for x in a for y in b if x is not None and y is not None]
        by_hand.append(sum(won) / len(won) if won else None)
    assert found == by_hand
    assert None in found


def test_two_judges_agree_on_what_both_decide_and_their_gap_is_between_shares() -> None:
    one, other = [[1.0, 0.0, 0.5], [None, 1.0], [0.5]], [[1.0, 1.0, 1.0], [0.0, 1.0], [1.0]]
    assert agreement(one, other).value == (1 / 2 + 1) / 2
    assert gap([0.75, None, 1.0], [0.5, 0.5, 0.25]).value == (0.25 + 0.75) / 2
    assert agreement([[1.0, 0.0]], [[1.0, 1.0, 0.0, 0.0]]) == NOTHING  # of two completions: duels, and combinations
    assert agreement([], []) == gap([], []) == NOTHING


def test_with_equal_lengths_the_length_controlled_win_rate_is_the_win_rate() -> None:
    controlled = length_controlled([1.0, 1.0, 0.5, 0.0], [0.0] * 4)
    assert controlled.value == pytest.approx(0.625, abs=1e-4)
    assert controlled.n == 4
    assert length_controlled([None], [3.0]) == NOTHING


# With two differences of length, +c and -c, both coefficients fit the two rates: a is the mean of their logits.
@pytest.mark.parametrize(
    ("longer", "shorter", "expected"),
    [
        (0.75, 0.25, 0.5),  # length alone: ln 3 and -ln 3
        (0.9, 0.5, 0.75),  # ln 9 and 0: ln 3
        (0.5, 0.9, 0.75),
        (0.2, 0.2, 0.2),
    ],
)
def test_a_length_controlled_win_rate_of_two_lengths_has_a_closed_form(
    longer: float, shorter: float, expected: float
) -> None:
    wins = [
        share for rate in (longer, shorter) for share in [1.0] * round(100 * rate) + [0.0] * round(100 - 100 * rate)
    ]
    found = length_controlled(wins, [30.0] * 100 + [-30.0] * 100)
    assert found.value == pytest.approx(expected, abs=1e-4)
    assert found.low is not None
    assert found.high is not None
    assert found.low < expected < found.high
    # var(a) = (1 / (n p q) of one rate + that of the other) / 4
    deviation = math.sqrt(sum(1 / (100 * r * (1 - r)) for r in (longer, shorter))) / 2
    logits = [math.log(end / (1 - end)) for end in (found.low, found.high)]
    assert logits[1] - logits[0] == pytest.approx(2 * 1.959964 * deviation, rel=1e-3)


def test_lengths_are_measured_in_deviations_of_a_sample() -> None:
    # both shares are fitted: a + b tanh(10 / sd) = ln 3 and a + b tanh(-5 / sd) = 0, with sd = 15 / sqrt 2
    one, other = math.tanh(math.sqrt(2) * 10 / 15), math.tanh(math.sqrt(2) * -5 / 15)
    a = -other * math.log(3) / (one - other)
    assert length_controlled([0.75, 0.5], [10.0, -5.0]).value == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-4)


def test_the_regression_is_that_of_another_implementation() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(0)
    longer = generator.normal(40, 100, size=150)
    wins = (generator.random(150) < 1 / (1 + np.exp(-0.3 - 1.5 * np.tanh(longer / 100)))).astype(float)
    wins[:20] = 0.25  # as a share of several completions, or the probability of a verdict
    x = np.column_stack([np.ones(150), np.tanh(longer / longer.std(ddof=1))])
    # as in alpaca_eval: every row twice, as a win and as a loss, weighted with its share
    model = linear_model.LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10)
    model.fit(np.vstack([x, x]), np.repeat([1, 0], 150), sample_weight=np.concatenate([wins, 1 - wins]))
    expected = 1 / (1 + math.exp(-model.coef_[0][0]))
    assert length_controlled(wins.tolist(), longer.tolist()).value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("wins", [[1.0] * 50, [1.0] * 25 + [0.0] * 25])
def test_a_length_controlled_win_rate_stays_finite_if_length_or_nothing_decides(wins: list[float]) -> None:
    found = length_controlled(wins, [float(i) for i in range(50, 0, -1)])  # the longer win all of the second
    assert None not in found
    assert all(0 <= end <= 1 for end in found[:3] if end is not None)


@pytest.mark.parametrize("effect", [0.0, 0.6])
def test_the_interval_of_a_length_controlled_win_rate_holds_the_truth_as_often_as_it_says(effect: float) -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(600):
        x = generator.normal(size=128)
        p = 1 / (1 + np.exp(-effect - np.tanh(x / x.std(ddof=1))))
        found = length_controlled((generator.random(128) < p).tolist(), x.tolist())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1 / (1 + math.exp(-effect)) <= found.high
    assert 0.93 <= held / 600 <= 0.97

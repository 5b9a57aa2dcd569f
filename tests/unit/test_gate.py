"""Promote, keep or stop."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from iterdpo.gate import decide

METRIC = "win_rate/vs_previous"


@pytest.mark.parametrize("value", [0.5, 0.500001, 1.0])
def test_a_metric_at_or_above_the_minimum_promotes(value: float) -> None:
    decision = decide({METRIC: value}, metric=METRIC, minimum=0.5)
    assert decision.action == "promote"
    assert decision.reason == f"{METRIC} {value:.3f} is at least 0.5"


@pytest.mark.parametrize(
    ("otherwise", "consequence"), [("keep", "the policy before is kept"), ("stop", "the run ends")]
)
def test_a_metric_below_the_minimum_does_what_otherwise_says(
    otherwise: Literal["keep", "stop"], consequence: str
) -> None:
    decision = decide({METRIC: 0.47}, metric=METRIC, minimum=0.5, otherwise=otherwise)
    assert decision.action == otherwise
    assert decision.reason == f"{METRIC} 0.470 is below 0.5; {consequence}"


@pytest.mark.parametrize("metrics", [{}, {METRIC: None}])
@pytest.mark.parametrize("minimum", [0.5, 0.0, -1000.0])
def test_a_metric_that_was_not_measured_promotes_nothing(metrics: dict[str, Any], minimum: float) -> None:
    decision = decide(metrics, metric=METRIC, minimum=minimum)
    assert decision.action == "keep"
    assert "was not measured" in decision.reason


@pytest.mark.parametrize(
    ("kl", "action"), [(4.0, "promote"), (5.0, "promote"), (5.1, "keep"), (None, "keep"), (-0.2, "promote")]
)
def test_max_kl_holds_back_a_candidate_that_went_too_far_or_whose_kl_is_unknown(kl: float | None, action: str) -> None:
    decision = decide({METRIC: 0.9, "kl/to_initial": kl}, metric=METRIC, minimum=0.5, max_kl=5.0)
    assert decision.action == action
    assert ("kl/to_initial" in decision.reason) == (action == "keep")


def test_without_max_kl_the_kl_does_not_matter() -> None:
    assert decide({METRIC: 0.9, "kl/to_initial": 1e6}, metric=METRIC, minimum=0.5).action == "promote"


def test_any_metric_may_decide() -> None:
    metrics = {METRIC: 0.1, "score/heldout_judge": -1.5}
    assert decide(metrics, metric="score/heldout_judge", minimum=-2).action == "promote"


@pytest.mark.parametrize(
    "metrics", [{METRIC: math.nan, "kl/to_initial": 1.0}, {METRIC: 0.9, "kl/to_initial": math.nan}]
)
def test_a_metric_that_is_not_a_number_promotes_nothing(metrics: dict[str, Any]) -> None:
    assert decide(metrics, metric=METRIC, minimum=0.5, max_kl=5.0).action == "keep"


TIES = {METRIC: 0.5, f"{METRIC}_low": 0.5, f"{METRIC}_high": 0.5}


@pytest.mark.parametrize("metric", [METRIC, f"{METRIC}_low"])
def test_ties_alone_promote_nothing(metric: str) -> None:
    decision = decide(TIES, metric=metric, minimum=0.5)
    assert decision.action == "keep"
    assert decision.reason == f"{metric} is 0.500 from ties alone; the policy before is kept"


def test_ties_promote_if_less_than_a_tie_would() -> None:
    assert decide(TIES, metric=METRIC, minimum=0.45).action == "promote"


def test_as_many_wins_as_losses_are_no_ties() -> None:
    even = {**TIES, f"{METRIC}_low": 0.4, f"{METRIC}_high": 0.6}
    assert decide(even, metric=METRIC, minimum=0.5).action == "promote"


def test_a_score_of_one_half_is_no_tie() -> None:
    scores = {"score/train_judge": 0.5, "score/train_judge_low": 0.5, "score/train_judge_high": 0.5}
    assert decide(scores, metric="score/train_judge", minimum=0.5).action == "promote"

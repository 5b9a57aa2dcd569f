"""Promote, keep, lower the learning rate or stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from iterdpo.config import GateConfig, RuleConfig
from iterdpo.gate import FACTOR, Decision, best_record, best_round, decide, learning_rate
from iterdpo.types import Action, RoundRecord

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


def record(round: int, decision: Action = "promote", policy_round: int | None = None, **metrics: float) -> RoundRecord:
    """How an earlier round ended, with the metrics `length` and `win` under their names."""
    names = {"length": "length/mean_tokens", "win": "win_rate/vs_initial", "score": "score/heldout_judge"}
    found = {"round": round, "gate/decision": decision} | {names[name]: value for name, value in metrics.items()}
    kept = round if policy_round is None else policy_round
    return RoundRecord(round, decision, "", f"round-{kept:03d}/policy", kept, "81f0", {}, found)


def rule(metric: str, **keys: Any) -> dict[str, Any]:
    return RuleConfig(metric=metric, **keys).model_dump()


def judged(
    metrics: dict[str, Any], *rules: dict[str, Any], earlier: Sequence[RoundRecord] = (), **more: Any
) -> Decision:
    """A candidate that wins, but for `rules`."""
    return decide({METRIC: 0.9} | metrics, metric=METRIC, minimum=0.5, rules=rules, earlier=earlier, **more)


@pytest.mark.parametrize(
    ("value", "bound", "holds"),
    [
        (0.2, {"minimum": 0.2}, True),
        (0.19, {"minimum": 0.2}, False),
        (0.2, {"maximum": 0.2}, True),
        (0.21, {"maximum": 0.2}, False),
        (None, {"maximum": 0.2}, False),
        (math.nan, {"maximum": 0.2}, False),
        (math.nan, {"minimum": 0.2}, False),
    ],
)
def test_a_rule_holds_within_its_bound(value: float | None, bound: dict[str, float], holds: bool) -> None:
    decision = judged({"distinct/2": value}, rule("distinct/2", **bound))
    assert decision.action == ("promote" if holds else "keep")
    assert [check.holds for check in decision.checks] == [True, holds]


# lengths: initial 100, round 1 160 (the best by a win rate of 0.8), round 2 130 (promoted last), round 3 kept
LENGTHS = [
    record(0, length=100),
    record(1, length=160, win=0.8),
    record(2, length=130, win=0.7),
    record(3, "keep", 2, length=999, win=0.9),
]


@pytest.mark.parametrize(
    ("against", "rise", "finding"),
    [
        ("initial", 50, "rose by 50 from 100 of the initial policy, at most 50"),
        ("initial", 49, "rose by 50 from 100 of the initial policy, more than 49"),
        ("previous", 20, "rose by 20 from 130 of the previous policy, at most 20"),
        ("best", -11, "rose by -10 from 160 of the best round, more than -11"),
    ],
)
def test_an_increase_is_from_the_policy_that_the_rule_names(against: str, rise: float, finding: str) -> None:
    earlier = [replace(r, gate={"metric": "win_rate/vs_initial"}) for r in LENGTHS]
    metrics = {"length/mean_tokens": 150.0}
    decision = judged(metrics, rule("length/mean_tokens", max_increase=rise, against=against), earlier=earlier)
    assert decision.checks[1].finding == f"length/mean_tokens {finding}"
    assert decision.action == ("keep" if "more than" in finding else "promote")


def test_a_decrease_is_an_increase_the_other_way() -> None:
    found = [
        judged({"length/mean_tokens": 90.0}, rule("length/mean_tokens", max_decrease=bound), earlier=LENGTHS)
        for bound in (40, 39)
    ]
    assert [decision.action for decision in found] == ["promote", "keep"]
    assert found[1].reason == (
        "length/mean_tokens fell by 40 from 130 of the previous policy, more than 39; the policy before is kept"
    )


def test_a_change_from_what_was_not_measured_promotes_nothing() -> None:
    decision = judged({"distinct/1": 0.5}, rule("distinct/1", max_increase=9), earlier=LENGTHS)
    assert decision.reason == "distinct/1 was not measured for the previous policy; the policy before is kept"


def test_of_several_broken_rules_the_strictest_decides_and_the_first_of_two() -> None:
    broken = [
        rule("distinct/1", minimum=0.9),
        rule("distinct/2", minimum=0.9, otherwise="lower_learning_rate"),
        rule("length/mean_tokens", maximum=10, otherwise="lower_learning_rate"),
    ]
    metrics = {"distinct/1": 0.5, "distinct/2": 0.5, "length/mean_tokens": 20}
    assert judged(metrics, *broken, learning_rate_factor=0.25)[:2] == (
        "lower_learning_rate",
        "distinct/2 0.500 is below 0.9; the policy before is kept, and the learning rate is multiplied by 0.25",
    )
    stop = rule("distinct/1", minimum=0.6, otherwise="stop")
    assert judged(metrics, *broken, stop)[:2] == ("stop", "distinct/1 0.500 is below 0.6; the run ends")


def test_rules_that_hold_are_counted_in_the_reason_and_numbered_in_the_checks() -> None:
    decision = judged({"distinct/1": 0.5}, rule("distinct/1", minimum=0.4), earlier=LENGTHS)
    assert decision.reason == f"{METRIC} 0.900 is at least 0.5, and the other rule holds"
    assert decision.checks[1]._asdict() == {
        "metric": "distinct/1",
        "value": 0.5,
        "kind": "minimum",
        "bound": 0.4,
        "before": None,
        "holds": True,
        "otherwise": "keep",
        "finding": "distinct/1 0.500 is at least 0.4",
    }


def test_ties_alone_keep_no_minimum_of_any_win_rate() -> None:
    ties = {f"win_rate/vs_initial{end}": 0.5 for end in ("", "_low", "_high")}
    decision = judged(ties, rule("win_rate/vs_initial_low", minimum=0.5, otherwise="stop"))
    assert decision.reason == "win_rate/vs_initial_low is 0.500 from ties alone; the run ends"


@pytest.mark.parametrize(
    ("before", "patience", "action"),
    [
        ([], 1, "stop"),
        ([], 2, "keep"),
        (["keep"], 2, "stop"),
        (["keep", "promote"], 2, "keep"),
        (["promote", "lower_learning_rate", "keep"], 3, "stop"),
        (["keep", "keep", "keep"], None, "keep"),
    ],
)
def test_patience_counts_the_rounds_in_a_row_without_a_promotion(
    before: list[Action], patience: int | None, action: str
) -> None:
    earlier = [record(0), *(record(r, decision) for r, decision in enumerate(before, 1))]
    decision = decide({METRIC: 0.4}, metric=METRIC, minimum=0.5, patience=patience, earlier=earlier)
    assert decision.action == action
    if action == "stop":
        rounds = "1 round" if patience == 1 else f"{patience} rounds"
        assert decision.reason == f"{METRIC} 0.400 is below 0.5; the run ends after {rounds} without a promotion"


def test_a_promotion_ends_no_run_however_impatient() -> None:
    earlier = [record(0), record(1, "keep")]
    assert decide({METRIC: 0.9}, metric=METRIC, minimum=0.5, patience=1, earlier=earlier).action == "promote"


def test_each_lowering_multiplies_the_learning_rate_by_the_factor_of_its_round() -> None:
    earlier = [
        record(0),
        replace(record(1, "lower_learning_rate"), gate={"learning_rate_factor": 0.1}),
        record(2, "keep"),
        record(3, "lower_learning_rate"),  # of a gate with the default
        record(4),
    ]
    assert learning_rate(1e-5, earlier) == pytest.approx(1e-5 * 0.1 * 0.5)
    assert learning_rate(1e-5, earlier[:1]) == 1e-5
    assert GateConfig().learning_rate_factor == FACTOR


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("win_rate/vs_initial", 1),
        ("win_rate/vs_initial_low", 1),
        ("win_rate/vs_previous", 2),  # each promoted round has beaten the one before
        ("win_rate/vs_best_low", 2),
        ("score/heldout_judge", 0),  # higher than all that were promoted
    ],
)
def test_the_best_round_is_the_promoted_one_with_the_highest_metric_that_rounds_share(metric: str, best: int) -> None:
    scores = [3.0, 1.0, 2.0, 9.0]
    rounds = [
        r.metrics | {"score/heldout_judge": s, METRIC: 0.9 - r.round / 10, "win_rate/vs_best": 0.9 - r.round / 10}
        for r, s in zip(LENGTHS, scores, strict=True)
    ]
    assert best_round(rounds, {"metric": metric}) == best
    earlier = [replace(r, metrics=m, gate={"metric": metric}) for r, m in zip(LENGTHS, rounds, strict=True)]
    assert best_record(earlier).round == best


def test_of_two_equal_rounds_the_later_is_the_best_and_round_0_is_it_before_any_other() -> None:
    rounds = [record(0).metrics, record(1, win=0.6).metrics, record(2, win=0.6).metrics]
    assert best_round(rounds, {"metric": "win_rate/vs_initial"}) == 2
    assert best_round(rounds[:1], {"metric": "win_rate/vs_initial"}) == 0
    losing = [record(0).metrics, record(1, win=0.4).metrics]
    assert best_round(losing, {"metric": "win_rate/vs_initial"}) == 0  # half against itself


def unevaluated(round: int) -> RoundRecord:
    made = record(round)
    return replace(made, metrics={**made.metrics, "gate/evaluated": False})


def test_rounds_without_an_evaluation_end_no_patience_and_are_no_baseline() -> None:
    earlier = [record(0, length=10.0), record(1, "keep", 0), unevaluated(2)]
    assert decide({METRIC: 0.4}, metric=METRIC, minimum=0.5, patience=2, earlier=earlier).action == "stop"
    longer = rule("length/mean_tokens", max_increase=5.0)
    metrics = {METRIC: 0.9, "length/mean_tokens": 12.0}
    decision = decide(metrics, metric=METRIC, minimum=0.5, rules=[longer], earlier=earlier)
    assert decision.action == "promote"  # measured from round 0, not from round 2


@pytest.mark.parametrize("metric", [METRIC, "score/heldout_judge"])
def test_a_round_without_an_evaluation_is_never_the_best(metric: str) -> None:
    rounds = [record(0, score=0.1), record(1, score=0.6), unevaluated(2)]
    rows = [{**known.metrics, "round": known.round, "gate/decision": known.decision} for known in rounds]
    assert best_round(rows, {"metric": metric}) == 1


# Runs drawn without a model: what each round wins against the initial and the previous policy, by the judge that trains and
# by the held-out one, over as many prompts as a small run has.
PROMPTS, RUNS = 128, 200
GUARDED: dict[str, Any] = {
    "metric": "win_rate/vs_previous",
    "minimum": 0.5,
    "rules": [
        rule("judges/gap_low", maximum=0.1, otherwise="stop"),
        rule("win_rate/vs_previous_high", minimum=0.5, otherwise="stop"),
    ],
    "patience": 3,
}


def drawn_run(
    generator: np.random.Generator, train: Sequence[float], heldout: Sequence[float], previous: Sequence[float]
) -> list[Decision]:
    """The decisions of a run whose true win rates are these, round by round, until it is stopped."""
    records, decisions = [record(0)], []
    for t, (by_train, by_heldout, over) in enumerate(zip(train, heldout, previous, strict=True), 1):
        easy = generator.random(PROMPTS)  # the judges agree about a prompt if neither errs
        gaps = (easy < by_train).astype(float) - (easy < by_heldout)
        wins = (generator.random(PROMPTS) < over).astype(float)
        metrics: dict[str, Any] = {"round": t, "win_rate/vs_initial": by_heldout}
        for name, values in (("judges/gap", gaps), ("win_rate/vs_previous", wins)):
            mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(PROMPTS)
            metrics |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
        decisions.append(decide(metrics, **GUARDED, earlier=records))
        records.append(replace(record(t, decisions[-1].action), metrics=metrics, gate=GUARDED))
        if decisions[-1].action == "stop":
            break
    return decisions


def test_a_good_judge_is_not_stopped_in_19_of_20_runs_and_one_that_is_exploited_is() -> None:
    generator = np.random.default_rng(3)
    good = [
        drawn_run(
            generator,
            train=[0.62, 0.70, 0.75, 0.78, 0.80],
            heldout=[0.60, 0.67, 0.71, 0.73, 0.74],
            previous=[0.60, 0.58, 0.55, 0.53, 0.51],
        )
        for _ in range(RUNS)
    ]
    assert sum(run[-1].action == "stop" for run in good) <= RUNS / 20
    exploited = [
        drawn_run(
            generator,
            train=[0.62, 0.75, 0.85, 0.92, 0.96],
            heldout=[0.58, 0.52, 0.42, 0.32, 0.25],
            previous=[0.58, 0.45, 0.38, 0.35, 0.35],
        )
        for _ in range(RUNS)
    ]
    stopped = [run for run in exploited if run[-1].action == "stop"]
    assert len(stopped) >= 0.95 * RUNS
    assert sum(len(run) <= 3 for run in stopped) >= 0.9 * RUNS  # before it has gone far
    assert {check.metric for run in stopped for check in run[-1].checks if not check.holds} >= {"judges/gap_low"}

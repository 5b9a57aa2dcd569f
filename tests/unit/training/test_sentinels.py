"""Alarms, step by step, on numbers made up by hand."""

from __future__ import annotations

from typing import Any

import pytest

from iterdpo.config import SentinelsConfig
from iterdpo.training.sentinels import Alarm, Sentinels


def sentinels(**config: Any) -> Sentinels:
    return Sentinels(SentinelsConfig(**config))


def alarms(watch: Sentinels, rows: list[dict[str, float]]) -> list[list[str]]:
    return [[alarm.name for alarm in watch.observe({"grad_norm": 1.0, **row})] for row in rows]


def test_an_alarm_names_the_number_and_the_key_that_it_passed() -> None:
    watch = sentinels(window=2, chosen_drop=10, chosen_drop_action="stop")
    assert watch.observe({"grad_norm": 1.0, "logps/chosen_drop": 30.0}) == []  # one step is not two
    assert watch.observe({"grad_norm": 1.0, "logps/chosen_drop": -5.0}) == [
        Alarm(
            "chosen_drop",
            "stop",
            "the chosen completions have lost 12.5 nats against the reference in the mean of 2 steps "
            "(dpo.sentinels.chosen_drop = 10)",
        )
    ]


@pytest.mark.parametrize(("key", "column"), [("chosen_drop", "logps/chosen_drop"), ("margin", "rewards/margins")])
def test_a_mean_over_the_window_is_compared_and_equal_is_not_above(key: str, column: str) -> None:
    watch = sentinels(window=3, **{key: 4.0})
    rows = [{column: value} for value in (3.0, 4.0, 5.0, 6.0, 0.0)]  # means from the third on: 4, 5, 11/3
    assert alarms(watch, rows) == [[], [], [], [key], []]


def test_accuracy_that_stays_at_one_half_is_stuck_whichever_side_of_it() -> None:
    watch = sentinels(stuck_window=4, stuck_accuracy=0.05)
    # Means of four: 0.5, 0.525, 0.575, 0.475
    rows = [{"rewards/accuracies": value} for value in (0.5, 0.4, 0.6, 0.5, 0.6, 0.6, 0.2)]
    assert alarms(watch, rows) == [[], [], [], ["stuck_accuracy"], ["stuck_accuracy"], [], ["stuck_accuracy"]]


def test_accuracy_far_below_one_half_is_not_stuck() -> None:
    assert alarms(sentinels(stuck_window=2), [{"rewards/accuracies": 0.1}] * 3) == [[], [], []]


def test_a_gradient_norm_is_compared_with_the_median_of_the_steps_before_it() -> None:
    watch = sentinels(grad_norm=10)
    norms = [90.0, 1.0, 1.0, 1.0, 2.0, 10.0, 10.1, 10.1, 30.0]
    # No alarm before five are known. The median of 90 1 1 1 2 is 1: 10 is not above ten times that. Then of
    # 90 1 1 1 2 10 it is 1.5, with 10.1 it is 2, and with another 10.1 it is 6.
    rows = [{"grad_norm": norm} for norm in norms]
    assert alarms(watch, rows) == [[]] * 9
    assert alarms(watch, [{"grad_norm": 102.0}]) == [["grad_norm"]]  # the median is 10


def test_a_norm_of_zero_before_is_nothing_to_compare_with() -> None:
    assert alarms(sentinels(), [{"grad_norm": 0.0}] * 6 + [{"grad_norm": 5.0}]) == [[]] * 7


@pytest.mark.parametrize("action", ["off", "warn", "stop"])
def test_an_action_of_off_is_silent_and_the_others_are_handed_on(action: str) -> None:
    found = sentinels(window=1, margin=1, margin_action=action).observe({"grad_norm": 1.0, "rewards/margins": 2.0})
    assert [alarm.action for alarm in found] == ([] if action == "off" else [action])


def test_metrics_that_a_loss_does_not_have_raise_no_alarm() -> None:
    watch = sentinels(window=1, stuck_window=2, margin=1, chosen_drop=1)
    assert alarms(watch, [{}] * 5) == [[]] * 5  # sft has neither rewards nor a reference


def test_two_alarms_may_sound_in_one_step() -> None:
    watch = sentinels(window=1, margin=1, chosen_drop=1)
    assert alarms(watch, [{"rewards/margins": 2.0, "logps/chosen_drop": 2.0}]) == [["chosen_drop", "margin"]]

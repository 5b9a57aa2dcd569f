"""A round from its specification to its policy, in this process, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterdpo.training.launch import OPTIMIZER_STATE
from tests.unit.training.rounds import (
    apart,
    log_of,
    run,
    weights,
)

pytestmark = pytest.mark.usefixtures("the_peak_is_known")


@pytest.mark.parametrize("adapter", [None, {}])
def test_gradient_checkpointing_does_not_change_the_policy(
    tmp_path: Path, tiny_model: Path, grouped: Path, adapter: dict[str, Any] | None
) -> None:
    plain = weights(run(tmp_path / "a", tiny_model, grouped, adapter=adapter))
    again = weights(run(tmp_path / "b", tiny_model, grouped, adapter=adapter, gradient_checkpointing=True))
    assert apart(plain, again) < 1e-6


def test_two_rounds_that_carry_the_optimizer_are_one_round_of_two_epochs(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    # Without a reference, a schedule or more than one step an epoch, nothing else begins anew in a second round.
    constant = {"reference": "none", "lr_scheduler": "constant", "warmup_ratio": 0.0, "pairs_per_step": 8}
    settings = {**constant, "optimizer_state": "carry"}
    whole = weights(run(tmp_path / "whole", tiny_model, grouped, epochs=4, **settings))
    first = run(tmp_path / "first", tiny_model, grouped, epochs=2, **settings)
    state = first / OPTIMIZER_STATE
    carried = weights(run(tmp_path / "carried", first, grouped, epochs=2, optimizer=state, **settings))
    reset = weights(run(tmp_path / "reset", first, grouped, epochs=2, **constant))
    assert apart(carried, whole) < 1e-5
    assert apart(reset, whole) > 1e-3
    assert not (tmp_path / "reset" / "policy.partial" / OPTIMIZER_STATE).exists()


def test_an_alarm_is_noted_in_the_log_and_training_goes_on(
    tmp_path: Path, tiny_model: Path, grouped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(tmp_path, tiny_model, grouped, epochs=3, sentinels={"margin": 1e-4, "window": 1})
    log = log_of(output)
    assert len(log) == 6
    assert "alarms" not in log[0]  # at the reference the margin is 0
    assert log[-1]["alarms"][0].startswith("margin: the reward margin is ")
    assert f"step 6: {log[-1]['alarms'][0]}" in caplog.text


def test_an_alarm_that_is_to_stop_the_round_does_when_its_step_is_in_the_log(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    sentinels = {"margin": 1e-4, "window": 1, "margin_action": "stop"}
    with pytest.raises(RuntimeError, match=r"step \d: the reward margin is .* the round is stopped"):
        run(tmp_path, tiny_model, grouped, epochs=3, sentinels=sentinels)
    output = tmp_path / "policy.partial"
    log = log_of(output)
    assert len(log) < 6
    assert ["alarms" in row for row in log] == [False] * (len(log) - 1) + [True]
    assert not (output / "model.safetensors").exists()


def test_trackers_write_under_the_runs_directory(tmp_path: Path, tiny_model: Path, grouped: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run(tmp_path, tiny_model, grouped, trackers=["tensorboard"], tracker_project="a-project")
    (directory,) = {path.parent for path in (tmp_path / "trackers" / "a-project").glob("events*")}
    events = EventAccumulator(str(directory)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in log_of(output)]
    assert found == expected
    assert "step" not in events.Tags()["scalars"]


def test_fewer_processes_than_asked_for_is_an_error(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    with pytest.raises(RuntimeError, match="2 training processes are configured, but this one sees 1"):
        run(tmp_path, tiny_model, pairs, processes=2)

"""A round from its specification to its policy, in this process, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from iterdpo.sampling.worker import merge_adapter
from iterdpo.training.launch import OPTIMIZER_STATE
from iterdpo.training.models import ADAPTER_CONFIG, load_policy
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
    carried = weights(run(tmp_path / "carried", first, grouped, epochs=2, carried=state, **settings))
    reset = weights(run(tmp_path / "reset", first, grouped, epochs=2, **constant))
    assert apart(carried, whole) < 1e-5
    assert apart(reset, whole) > 1e-3
    assert not (tmp_path / "reset" / "policy.partial" / OPTIMIZER_STATE).exists()


@pytest.mark.filterwarnings("ignore")
def test_adamw_8bit_trains_weights_in_bfloat16_and_resumes(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao.optim", reason="torchao is not installed")
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)  # which takes minutes on a CPU
    settings = {"optimizer": "adamw_8bit", "precision": "bf16", "epochs": 6, "optimizer_state": "carry"}
    output = run(tmp_path / "a", tiny_model, pairs, **settings)
    log = log_of(output)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"] - 0.01
    with safe_open(output / "model.safetensors", "pt") as saved:
        assert {saved.get_tensor(name).dtype for name in list(saved.keys())} == {torch.bfloat16}
    again = run(tmp_path / "b", output, pairs, carried=output / "optimizer.pt", **settings)
    assert log_of(again)[-1]["loss"] < log[0]["loss"] - 0.01


def test_a_round_ends_after_max_steps_and_has_the_reference_of_the_pairs_it_saw(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    constant = {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    whole = log_of(run(tmp_path / "whole", tiny_model, pairs, epochs=2, **constant))
    for steps, epochs in ((2, 0.3333), (8, 1.3333)):  # 22 pairs, 4 a step: 6 steps a pass
        log = log_of(run(tmp_path / str(steps), tiny_model, pairs, max_steps=steps, **constant))
        assert [row["loss"] for row in log] == [row["loss"] for row in whole[:steps]]
        assert log[-1]["epoch"] == epochs
        stored = load_file(tmp_path / str(steps) / "reference" / "logps.safetensors")["logps"]
        assert int(stored[:, 0].count_nonzero()) == min(22, 4 * steps)


def test_a_linear_decay_ends_with_max_steps(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    log = log_of(run(tmp_path, tiny_model, pairs, max_steps=4, warmup_steps=0, learning_rate=1e-3))
    assert [row["learning_rate"] for row in log] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_dropout_of_an_adapter_is_on_in_training_steps_alone(tmp_path: Path, tiny_model: Path, grouped: Path) -> None:
    settings = {"learning_rate": 1e-2, "epochs": 2, "eval_pairs": grouped}
    plain = run(tmp_path / "a", tiny_model, grouped, adapter={}, **settings)
    dropped = run(tmp_path / "b", tiny_model, grouped, adapter={"lora_dropout": 0.5}, **settings)
    again = run(tmp_path / "c", tiny_model, grouped, adapter={"lora_dropout": 0.5}, **settings)
    assert json.loads((dropped / ADAPTER_CONFIG).read_text())["lora_dropout"] == 0.5
    assert apart(weights(dropped), weights(again)) == 0.0
    assert apart(weights(dropped), weights(plain)) > 1e-4
    # The round that goes on from there has its own dropout, here none: its reference is then the policy, exactly.
    row = log_of(run(tmp_path / "d", dropped, grouped, adapter={}))[0]
    assert row["rewards/chosen"] == row["rewards/rejected"] == 0.0
    row = log_of(run(tmp_path / "e", dropped, grouped, adapter={"lora_dropout": 0.5}))[0]
    assert row["rewards/chosen"] != 0.0
    stored = [load_file(tmp_path / place / "reference" / "logps.safetensors")["logps"] for place in "de"]
    assert torch.equal(*stored)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"], ["o_proj"]])
def test_modules_to_save_are_trained_whole_saved_with_the_adapter_and_merged(
    tmp_path: Path, tiny_model: Path, grouped: Path, names: list[str]
) -> None:
    settings = {"adapter": {"r": 4, "modules_to_save": names}, "learning_rate": 1e-2, "precision": "bf16"}
    first = run(tmp_path / "a", tiny_model, grouped, epochs=2, **settings)
    log = log_of(first)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"]
    saved = load_file(first / "adapter_model.safetensors")
    kept = {name.removeprefix("base_model.model.") for name in saved if "lora_" not in name}
    tied = {"model.embed_tokens.weight", "lm_head.weight"}  # the tiny model's
    expected = {"norm": {"model.norm.weight"}, "o_proj": {f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)}}
    assert kept == expected.get(names[0], tied)
    base = load_policy(tiny_model)
    for name in kept:
        weight = saved[f"base_model.model.{name}"]
        assert weight.dtype == torch.float32
        assert 1e-4 < (weight - base.get_parameter(name)).abs().max() < 0.2
    if kept == tied:
        assert torch.equal(*[saved[f"base_model.model.{name}"] for name in tied])
    assert len(saved) - len(kept) == 2 * 2 * (6 if names == ["o_proj"] else 7)  # what is trained whole has no adapter

    merge_adapter(first, tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[5, 17, 99, 42, 7]])
    with torch.no_grad():
        merged = load_policy(tmp_path / "merged").eval()(ids).logits
        torch.testing.assert_close(merged, load_policy(first).eval()(ids).logits, rtol=0, atol=1e-4)
    second = run(tmp_path / "b", first, grouped, **settings)
    assert log_of(second)[0]["rewards/chosen"] == 0.0
    assert apart(load_file(second / "adapter_model.safetensors"), saved) > 1e-4
    assert (second / ADAPTER_CONFIG).read_bytes() == (first / ADAPTER_CONFIG).read_bytes()
    with pytest.raises(RuntimeError, match=r"dpo\.adapter\.modules_to_save is \[\], but the policy's adapter has "):
        run(tmp_path / "c", first, grouped, adapter={"r": 4})


def test_a_cpu_computes_without_kernels_whatever_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    monkeypatch.setattr("iterdpo.training.train.use_kernels", lambda *call: pytest.fail("kernels on a CPU"))
    run(tmp_path, tiny_model, pairs, kernels="liger", max_steps=1)


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


def test_fewer_processes_than_asked_for_is_an_error(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    with pytest.raises(RuntimeError, match="2 training processes are configured, but this one sees 1"):
        run(tmp_path, tiny_model, pairs, processes=2)

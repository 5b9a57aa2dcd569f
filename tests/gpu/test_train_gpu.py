"""The trainer on a CUDA GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rounds import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_round_trains_from_zero_rewards_and_the_margin_grows(
    tmp_path: Path, model: Path, pairs: Path, precision: str
) -> None:
    log = run(tmp_path, model, pairs, precision=precision, epochs=3)
    assert log[0]["rewards/chosen"] == 0.0
    assert log[0]["rewards/rejected"] == 0.0
    assert sum(row["rewards/margins"] for row in log[-4:]) > 4 * 0.05
    print(f"{precision}: {log[-1]['pairs_per_second']:.1f} pairs/s, margin {log[-1]['rewards/margins']:.3f}")


def test_the_losses_of_a_batch_are_computed_without_a_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, pairs: Path
) -> None:
    import torch

    from iterdpo.training.step import Trainer

    of_batch = Trainer.losses

    def watched(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return of_batch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "losses", watched)
    run(tmp_path, model, pairs, tokens_per_micro_batch=2048)
    assert (tmp_path / "policy.partial" / "model.safetensors").exists()


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path, model: Path, pairs: Path) -> None:
    plain = run(tmp_path / "plain", model, pairs, precision="fp32")
    checkpointed = run(tmp_path / "checkpointed", model, pairs, precision="fp32", gradient_checkpointing=True)
    losses = [[row["loss"] for row in log] for log in (plain, checkpointed)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_sharing_prompts_gives_the_same_losses(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, model: Path, pairs: Path
) -> None:
    caplog.set_level(logging.INFO, "iterdpo.training.train")
    shared = run(tmp_path / "shared", model, pairs, precision="fp32")
    own = run(tmp_path / "own", model, pairs, precision="fp32", shared_prompts=False)
    assert [record.args for record in caplog.records if "path" in record.msg] == [("shared",), ("rows",)]
    assert [row["loss"] for row in shared] == pytest.approx([row["loss"] for row in own], abs=1e-4)


def test_offloaded_activations_give_the_same_losses(tmp_path: Path, model: Path, pairs: Path) -> None:
    plain = run(tmp_path / "plain", model, pairs)
    offloaded = run(tmp_path / "offloaded", model, pairs, activation_offload=True)
    assert offloaded[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-2)
    # FlashAttention adds gradients in no certain order.
    assert [row["loss"] for row in offloaded] == pytest.approx([row["loss"] for row in plain], abs=0.02)


def test_adamw_8bit_trains_from_zero_rewards(tmp_path: Path, model: Path, pairs: Path) -> None:
    pytest.importorskip("torchao")
    log = run(tmp_path, model, pairs, optimizer="adamw_8bit", epochs=3)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_trains_from_zero_rewards(tmp_path: Path, model: Path, pairs: Path, quantize: str) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    log = run(tmp_path, model, pairs, adapter={"quantize": quantize}, learning_rate=1e-3, epochs=3)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "policy.partial" / "adapter_model.safetensors").exists()

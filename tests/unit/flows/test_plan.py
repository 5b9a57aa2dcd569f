"""Sizes that `--dry-run` announces, against what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.plan import _policy_bytes, _size
from iterdpo.config import DPOConfig


def test_a_checkpoint_is_announced_as_large_as_its_weights(tiny_model: Path) -> None:
    announced = _policy_bytes(tiny_model, DPOConfig())
    assert announced == pytest.approx((tiny_model / "model.safetensors").stat().st_size, rel=0.02)
    assert _policy_bytes(tiny_model, DPOConfig(save_dtype="bfloat16")) == announced / 2


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*\.self_attn\.(q|v)_proj"])
def test_an_adapter_is_announced_as_large_as_peft_makes_it(tiny_model: Path, targets: str | list[str]) -> None:
    from iterdpo.training.models import load_policy, with_new_adapter

    model = with_new_adapter(load_policy(tiny_model), r=4, alpha=8, target_modules=targets, quantize="none")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dpo = DPOConfig.model_validate({"adapter": {"r": 4, "target_modules": targets}})
    assert _policy_bytes(tiny_model, dpo) == 4 * trained


def test_sizes_are_written_in_the_unit_that_shows_them() -> None:
    assert [_size(2**40), _size(0.3 * 2**30), _size(3 * 2**20)] == ["1024.0 GiB", "0.3 GiB", "3.0 MiB"]

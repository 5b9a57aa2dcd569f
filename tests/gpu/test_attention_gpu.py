"""Attention over trees, and log-probabilities, on a GPU and on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterdpo.run.devices import visible_gpus

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("groups", [8, 2])
def test_flash_attention_and_the_blocks_give_the_same_outputs_and_gradients(groups: int) -> None:
    found = attended(groups, "bfloat16", window=None, softcap=None)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 2e-2 * one.norm()


@pytest.mark.parametrize(
    ("groups", "window", "softcap"), [(8, None, None), (2, 100, None), (2, None, 1.5), (8, 100, 1.5)]
)
def test_flex_attention_and_the_blocks_give_the_same_outputs_and_gradients(
    groups: int, window: int | None, softcap: float | None
) -> None:
    for one, other in zip(*attended(groups, "float32", window=window, softcap=softcap), strict=True):
        assert (one - other).norm() <= 5e-3 * one.norm()  # TF32


def attended(groups: int, dtype: str, *, window: int | None, softcap: float | None) -> list[list[Any]]:
    """Outputs and gradients of attention over trees: on the CPU in float32, on the GPU in `dtype`."""
    import torch

    from iterdpo.training import attention

    generator = torch.Generator().manual_seed(0)
    shape = [(150, [90, 200]), (70, [30]), (2, [100, 4, 60]), (400, [10])]
    width, tokens = 1152, 1116  # more than dense blocks compute on a GPU
    layout = attention.tree_layout(shape, width)
    tensors = [torch.randn(1, heads, width, 64, generator=generator) for heads in (8, groups, groups)]
    wanted = torch.randn(1, width, 8, 64, generator=generator)
    wanted[:, tokens:] = 0
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", getattr(torch, dtype))):
        inputs = [t.detach().to(device, kind).requires_grad_() for t in tensors]
        attention.use_layout(attention.moved(layout, device))
        output, _ = attention.tree_attention(None, *inputs, None, sliding_window=window, softcap=softcap)
        gradients = torch.autograd.grad((output * wanted.to(device, kind)).sum(), inputs)
        found.append([output[:, :tokens].float().cpu(), *(g.float().cpu() for g in gradients)])
    return found


def test_the_gpu_and_the_cpu_compute_the_same_log_probabilities(tmp_path: Path, model: Path) -> None:
    import torch

    from iterdpo.training.logps import completion_logps, score_completions
    from iterdpo.training.models import load_policy

    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
    on_gpu = score_completions(model, prompts, completions, precision="fp32")
    with torch.no_grad():
        on_cpu = completion_logps(load_policy(model).eval(), prompts, completions)
    assert on_gpu == pytest.approx(on_cpu.tolist(), abs=1e-2)
    assert visible_gpus()

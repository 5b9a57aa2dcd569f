"""bfloat16 computation over float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed


@contextmanager
def bfloat16(model: torch.nn.Module, *, copies: bool) -> Iterator[None]:
    """Compute `model` in bfloat16 by autocast; with `copies`, over `bfloat16_copies` of its weights."""
    device = next(model.parameters()).device.type
    with bfloat16_copies(model) if copies else nullcontext(), torch.autocast(device, torch.bfloat16):
        yield


@contextmanager
def bfloat16_copies(model: torch.nn.Module) -> Iterator[None]:
    """Put bfloat16 copies of the float32 weights in their place, as they are now. `parameters()` has them meanwhile.

    Autocast alone leaves embeddings, norms and all that is between matrix products in float32, and casts on each side of
    a product. With copies, activations are bfloat16 throughout. Gradients flow through the copies to the weights, and
    are summed there in float32: the backward pass belongs inside, since gradient checkpointing runs layers again.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.dtype == torch.float32:
                swapped.append((module._parameters, name, weight))
    weights = {id(weight): weight for _, _, weight in swapped}  # tied ones stay one
    copies = dict(zip(weights, _Copies.apply(*weights.values()) if weights else (), strict=True))
    for parameters, name, weight in swapped:
        parameters[name] = copies[id(weight)]
    try:
        yield
    finally:
        for parameters, name, weight in swapped:
            parameters[name] = weight


class _Copies(torch.autograd.Function):
    """bfloat16 copies of weights, whose gradients are added to the weights' in one pass over each."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(copies, weights)
        ctx.mark_non_differentiable(
            *(copy for copy, weight in zip(copies, weights, strict=True) if not weight.requires_grad)
        )
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if distributed.is_initialized() and distributed.get_world_size() > 1:  # DDP averages what is returned
            return tuple(None if gradient is None else gradient.float() for gradient in gradients)
        reached = [(weight, g) for weight, g in zip(ctx.weights, gradients, strict=True) if g is not None]
        new = [(weight, g) for weight, g in reached if weight.grad is None]
        if more := [(weight.grad, g) for weight, g in reached if weight.grad is not None]:
            torch._foreach_add_(*map(list, zip(*more, strict=True)))
        for weight, _ in new:
            weight.grad = torch.empty_like(weight)
        if new:
            torch._foreach_copy_([weight.grad for weight, _ in new], [g for _, g in new])
        return (None,) * len(gradients)

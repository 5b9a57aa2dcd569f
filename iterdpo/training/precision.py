"""bfloat16 computation over float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


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
    made: dict[int, Tensor] = {}  # tied weights stay one
    for parameters, name, weight in swapped:
        if id(weight) not in made:
            made[id(weight)] = weight.to(torch.bfloat16)
        parameters[name] = made[id(weight)]
    try:
        yield
    finally:
        for parameters, name, weight in swapped:
            parameters[name] = weight

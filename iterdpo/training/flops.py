"""Floating-point operations of a batch and of the device, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from iterdpo.training.collate import Batch
from iterdpo.training.logps import last_modules


def forward_flops(model: Any) -> Callable[[Batch], float]:
    """The multiplications and additions of a forward pass over a batch's tokens, padding left out.

    Two for each weight of a matrix and token (PaLM, arXiv:2204.02311, appendix B), the output head's at completion
    positions only, and 4 H d for each query and key that attention brings together in each layer. Where prompts are
    shared, the last layer's MLP is not computed for them, and does not count. Of a mixture of experts all experts count,
    which is too many.
    """
    config = model.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings().weight
    matrices = sum(weights(p) for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings and p is not head)
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    layers, of_head = getattr(config, "num_hidden_layers", 0), 2.0 * head.shape[0] * head.shape[1]
    last = sum(weights(p) for module in last_modules(model) for p in module.parameters() if p.ndim >= 2)

    def of(batch: Batch) -> float:
        attention = 4 * width * layers * batch.attention_pairs
        unread = batch.tokens - len(batch.layout.read) if batch.layout is not None else 0
        matrix = 2.0 * (matrices * batch.tokens - last * unread)
        return float(matrix + of_head * len(batch.targets) + attention)

    return of


def weights(parameter: Any) -> int:
    """How many weights a matrix has. In 4 bits, two of them share a byte."""
    return int(parameter.numel()) * (2 if parameter.dtype == torch.uint8 else 1)


def matmul_peak(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of square matrix products on `device`, the best of several tries. MFU is measured against it."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

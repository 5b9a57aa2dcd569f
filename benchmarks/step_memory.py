"""What a full fine-tuning step keeps in memory, by kind, at a vocabulary of 128k: live tensors, not resident pages.

    python -m benchmarks.step_memory

Prints one JSON line: the bytes of weights, gradients and optimizer state, what the forward pass of one micro-batch
leaves for the backward pass, their sum, and the peak of the whole step as torch's own MemTracker counts it. `logits`
is what one [T, V] tensor of float32 logits would take.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.dpo_step import random_checkpoint
from iterdpo.training.collate import Tree
from iterdpo.training.logps import Scorer
from iterdpo.training.losses import dpo_loss
from iterdpo.training.models import load_policy


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = load_policy(random_checkpoint(Path(scratch), "128k"))
    scorer = Scorer(model, "shared").train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-5, fused=True)
    draw = random.Random(0)

    def ids() -> list[int]:
        return [draw.randrange(128_000) for _ in range(64)]

    trees = [Tree(ids(), [ids(), ids()]) for _ in range(8)]

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logps = scorer(scorer.collate(trees)).logps.view(-1, 2)
        zeros = torch.zeros(len(trees))
        return dpo_loss(logps[:, 0], logps[:, 1], zeros, zeros, beta=0.1).losses.mean()

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    with _tracked(scorer, optimizer) as tracker:
        before = _total(tracker, "current")
        loss = forward()
        activations = _total(tracker, "current") - before
        del loss
    with _tracked(scorer, optimizer) as tracker:
        step()
        peak = _total(tracker, "peak")
    weights = sum(p.numel() * p.element_size() for p in scorer.parameters())
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    parts = {"weights": weights, "gradients": weights, "optimizer": state, "activations": activations}
    tokens = sum(tree.tokens for tree in trees)
    row = {**parts, "sum": sum(parts.values()), "peak": peak, "logits": 4 * tokens * model.config.vocab_size}
    line: dict[str, Any] = {name: round(value / 2**20) for name, value in row.items()}
    print(json.dumps(line | {"unit": "MiB", "tokens": tokens, "peak_to_sum": round(peak / row["sum"], 3)}))


def _tracked(scorer: Scorer, optimizer: torch.optim.Optimizer) -> MemTracker:
    tracker = MemTracker()
    tracker.track_external(scorer, optimizer)
    return tracker


def _total(tracker: MemTracker, when: str) -> int:
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot(when).values())


if __name__ == "__main__":
    main()

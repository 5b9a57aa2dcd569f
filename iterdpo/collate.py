"""Pairs to padded batches, and the order in which they are trained on. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iterdpo.seeds import derive_seed

PAD_MULTIPLE = 16  # few distinct shapes: each new one costs a compiled kernel on a CPU


@dataclass(frozen=True, slots=True)
class TokenPair:
    """The token ids that training reads: `TokenPair(prompt=[40, 8], chosen=[253, 2], rejected=[30, 2])`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of prompt and completion, padded on the right.

    Right padding lies behind every completion, so that a causal model needs no mask for it: what is read, at
    completion positions, cannot see it. `first` is the leftmost position whose logits are needed.
    """

    input_ids: Tensor  # [R, T]
    completion_mask: Tensor  # [R, T], True where the token belongs to a completion
    first: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.completion_mask.to(device), self.first)


def collate(prompts: Sequence[list[int]], completions: Sequence[list[int]], *, pad_token_id: int = 0) -> Batch:
    """Rows `prompts[r] + completions[r]`, at least one token of each.

    Raises:
        ValueError: an empty prompt or completion; neither has a log-probability.
    """
    if not all(prompts) or not all(completions):
        raise ValueError("a row needs at least one prompt token and one completion token")
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = -(-max(map(len, rows)) // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for r, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, len(prompt) : len(row)] = True
    return Batch(ids, mask, min(map(len, prompts)) - 1)


def collate_pairs(pairs: Sequence[TokenPair], *, pad_token_id: int = 0) -> Batch:
    """2B rows: the B chosen, then the B rejected."""
    prompts = [p.prompt for p in pairs]
    return collate(prompts * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs], pad_token_id=pad_token_id)


def plan_steps(count: int, *, epochs: int, pairs_per_step: int, seed: int) -> list[list[int]]:
    """Which pairs each optimizer step trains on: a new order every epoch, the last step of an epoch may be smaller.

    It depends on nothing else: neither on the number of processes nor on how a step is cut into micro-batches.
    """
    steps = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        steps += [order[i : i + pairs_per_step] for i in range(0, count, pairs_per_step)]
    return steps


def micro_batches(
    step: Sequence[int], lengths: Sequence[int], *, size: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This process's share of a step, cut into batches of at most `size` pairs of similar length.

    Every process gets the same number of batches, since they meet at each; an empty one has nothing to add.
    """
    ordered = sorted(step, key=lambda i: (lengths[i], i))
    share = ordered[rank::world]
    count = -(-len(ordered[0::world]) // size)
    return [share[i * size : (i + 1) * size] for i in range(count)]

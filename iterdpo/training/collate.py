"""Pairs to batches, and the order in which they are trained on. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from iterdpo.seeds import derive_seed
from iterdpo.training.attention import PAD_MULTIPLE, TreeLayout, tree_layout

ROW_MULTIPLE = 64  # few distinct shapes: each new one costs a compiled kernel


@dataclass(frozen=True, slots=True)
class TokenPair:
    """The token ids that training reads: `TokenPair(prompt=[40, 8], chosen=[253, 2], rejected=[30, 2])`.

    An empty side is absent: unpaired data has one side only.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and distinct completions of it: `Tree(prompt=[40, 8], branches=[[253, 2], [30, 2]])`."""

    prompt: list[int]
    branches: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))


@dataclass(frozen=True, slots=True)
class Batch:
    """Trees as the model reads them: all in one row with a layout, or each branch in a row of its own without.

    Rows are padded on the right, behind every completion, so that a causal model needs no mask for it.
    """

    input_ids: Tensor  # [R, T]; R = 1 with a layout
    position_ids: Tensor | None  # [1, T] with a layout
    layout: TreeLayout | None
    sources: Tensor  # [M], places (row * T + column) whose next token is a completion's
    targets: Tensor  # [M], those next tokens
    branch: Tensor  # [M], the branch that each belongs to
    branches: int
    tokens: int
    """Tokens in `input_ids` that are not padding."""
    seen: int
    """Pairs of a query and a key that it sees."""

    def to(self, device: torch.device | str) -> Batch:
        position_ids = None if self.position_ids is None else self.position_ids.to(device)
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=position_ids,
            layout=None if self.layout is None else self.layout.to(device),
            sources=self.sources.to(device),
            targets=self.targets.to(device),
            branch=self.branch.to(device),
        )


def collate(trees: Sequence[Tree], *, shared: bool, pad_token_id: int = 0) -> Batch:
    """The batch of `trees`; `shared` puts each prompt into it once. Branches keep their order.

    Raises:
        ValueError: an empty prompt or completion; neither has a log-probability.
    """
    if not all(tree.prompt and all(tree.branches) for tree in trees):
        raise ValueError("a row needs at least one prompt token and one completion token")
    return _one_row(trees, pad_token_id) if shared else _rows(trees, pad_token_id)


def _one_row(trees: Sequence[Tree], pad_token_id: int) -> Batch:
    ids: list[int] = []
    sources: list[int] = []
    for tree in trees:
        prompt_end = len(ids) + len(tree.prompt)
        ids += tree.prompt
        for branch in tree.branches:
            sources += [prompt_end - 1, *range(len(ids), len(ids) + len(branch) - 1)]
            ids += branch
    width = -(-(len(ids) + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    layout = tree_layout([(len(tree.prompt), list(map(len, tree.branches))) for tree in trees], width)
    return Batch(
        torch.tensor(ids + [pad_token_id] * (width - len(ids))).unsqueeze(0),
        layout.position.unsqueeze(0),
        layout,
        torch.tensor(sources),
        *_targets(trees),
        tokens=len(ids),
        seen=sum(
            _triangle(0, len(t.prompt)) + sum(_triangle(len(t.prompt), len(b)) for b in t.branches) for t in trees
        ),
    )


def _rows(trees: Sequence[Tree], pad_token_id: int) -> Batch:
    rows = [(tree.prompt, branch) for tree in trees for branch in tree.branches]
    width = -(-max(len(prompt) + len(branch) for prompt, branch in rows) // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = torch.full((len(rows), width), pad_token_id)
    sources: list[int] = []
    for number, (prompt, branch) in enumerate(rows):
        ids[number, : len(prompt) + len(branch)] = torch.tensor(prompt + branch)
        first = number * width + len(prompt) - 1
        sources += range(first, first + len(branch))
    tokens = sum(len(prompt) + len(branch) for prompt, branch in rows)
    seen = sum(_triangle(0, len(prompt) + len(branch)) for prompt, branch in rows)
    return Batch(ids, None, None, torch.tensor(sources), *_targets(trees), tokens=tokens, seen=seen)


def _triangle(before: int, length: int) -> int:
    """Keys that `length` tokens behind `before` others see, each also itself."""
    return length * before + length * (length + 1) // 2


def _targets(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, int]:
    branches = [branch for tree in trees for branch in tree.branches]
    targets = [token for branch in branches for token in branch]
    numbers = torch.arange(len(branches)).repeat_interleave(torch.tensor(list(map(len, branches))))
    return torch.tensor(targets), numbers, len(branches)


def grow_trees(pairs: Iterable[TokenPair]) -> tuple[list[Tree], list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Trees of pairs, one a prompt, and where each pair's chosen and rejected are: (tree, branch), branch -1 absent.

    Two pairs of a prompt share the completions that they have in common.
    """
    trees: list[Tree] = []
    numbers: dict[tuple[int, ...], int] = {}
    known: list[dict[tuple[int, ...], int]] = []
    places = []
    for pair in pairs:
        tree = numbers.setdefault(tuple(pair.prompt), len(trees))
        if tree == len(trees):
            trees.append(Tree(pair.prompt, []))
            known.append({})

        def place(completion: list[int], tree: int = tree) -> tuple[int, int]:
            if not completion:
                return tree, -1
            branch = known[tree].setdefault(tuple(completion), len(trees[tree].branches))
            if branch == len(trees[tree].branches):
                trees[tree].branches.append(completion)
            return tree, branch

        places.append((place(pair.chosen), place(pair.rejected)))
    return trees, places


def plan_steps(groups: Sequence[int] | np.ndarray, *, epochs: int, pairs_per_step: int, seed: int) -> list[np.ndarray]:
    """Which pairs each optimizer step trains on: a new order every epoch, the last step of an epoch may be smaller.

    `groups` has a number for each pair, equal for pairs of one prompt: these stay together. The plan depends on
    nothing else: neither on the number of processes nor on how a step is cut into micro-batches.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    steps = []
    for epoch in range(epochs):
        rank = np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(int(group.max(initial=-1)) + 1)
        order = np.argsort(rank[group], kind="stable")
        steps += [order[i : i + pairs_per_step] for i in range(0, len(order), pairs_per_step)]
    return steps


def micro_batches(sizes: Sequence[int], *, budget: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This process's share of items of `sizes` tokens, cut into batches of similar items and at most `budget` tokens.

    An item that is larger is a batch of its own. Every process gets the same number of batches, since they meet at
    each; an empty one has nothing to add.
    """
    ordered = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    shares = [_cut(ordered[start::world], sizes, budget) for start in range(world)]
    return shares[rank] + [[]] * (max(map(len, shares)) - len(shares[rank]))


def _cut(items: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for item in reversed(items):  # the largest first: what does not fit shows at once
        if sizes[item] > room:
            batches.append([])
            room = budget
        batches[-1].append(item)
        room -= sizes[item]
    return batches

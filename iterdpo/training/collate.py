"""From pairs to the model's input: the order of pairs, trees, micro-batches, tensors, and the way back. Pure.

`RoundPairs` has a round's pairs and the plan of its steps (`plan_steps`). `grow_trees` turns the pairs of a step into
trees, each a prompt with its distinct completions, and a `PairIndex` from pairs to branches. `micro_batches` says which
trees go through the model together, and `collate` makes the tensors. `PairIndex.in_batch` leads from a batch's branches
back to the pairs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from iterdpo.config import DPOConfig
from iterdpo.data.pairs import TokenPair, TokenPairs
from iterdpo.seeds import derive_seed
from iterdpo.training.attention import PAD_MULTIPLE, TreeLayout, tree_layout

ROW_MULTIPLE = 64  # few distinct sizes, whose memory is used again


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and distinct completions of it: `Tree(prompt=[40, 8], branches=[[253, 2], [30, 2]])`.

    `given` is how many tokens at each branch's beginning are read like the prompt and not scored; empty if there are none.
    """

    prompt: list[int]
    branches: list[list[int]]
    given: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))

    @property
    def scored(self) -> list[tuple[list[int], int]]:
        """Each branch with the number of tokens that are given."""
        return list(zip(self.branches, self.given or (0,) * len(self.branches), strict=True))

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each branch are scored."""
        return [len(branch) - given for branch, given in self.scored]


@dataclass(frozen=True, slots=True)
class Batch:
    """Trees as the model reads them: all in one row with a layout, or each branch in its own row without one.

    Rows are padded on the right, after every completion, so that a causal model needs no mask for it.
    """

    input_ids: Tensor  # [R, T]; R = 1 with a layout
    position_ids: Tensor | None  # [1, T] with a layout
    layout: TreeLayout | None
    sources: Tensor  # [M], positions (row * T + column) whose next token is a completion's
    targets: Tensor  # [M], those next tokens
    branch: Tensor  # [M], the branch that each belongs to
    branches: int
    tokens: int
    """Tokens in `input_ids` that are not padding."""
    attention_pairs: int
    """How many pairs of a query and a key that it sees there are."""


def collate(trees: Sequence[Tree], *, shared: bool, pad_token_id: int = 0) -> Batch:
    """The batch of `trees`; with `shared` each prompt is in it once. Branches keep their order.

    A ValueError if a prompt or completion is empty, or no token of it is scored: it has no log-probability.
    """
    if not all(tree.prompt and all(length > 0 for length in tree.lengths) for tree in trees):
        raise ValueError("a row needs at least one prompt token and one completion token")
    return _one_row(trees, pad_token_id) if shared else _rows(trees, pad_token_id)


def _one_row(trees: Sequence[Tree], pad_token_id: int) -> Batch:
    ids = list(chain.from_iterable(tree.prompt for tree in trees))
    sources: list[int] = []
    prompt_end = 0
    for tree in trees:
        prompt_end += len(tree.prompt)
        for branch, given in tree.scored:
            before = [prompt_end - 1, *range(len(ids), len(ids) + len(branch) - 1)]  # of each token, the one before it
            sources += before[given:]
            ids += branch
    width = -(-(len(ids) + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    layout = tree_layout([(len(tree.prompt), list(map(len, tree.branches))) for tree in trees], width)
    return Batch(
        _tensor(ids + [pad_token_id] * (width - len(ids))).unsqueeze(0),
        layout.position.unsqueeze(0),
        layout,
        _tensor(sources),
        *_targets(trees),
        tokens=len(ids),
        attention_pairs=sum(
            causal_pairs(0, len(t.prompt)) + sum(causal_pairs(len(t.prompt), len(b)) for b in t.branches) for t in trees
        ),
    )


def _rows(trees: Sequence[Tree], pad_token_id: int) -> Batch:
    rows = [(tree.prompt, *branch) for tree in trees for branch in tree.scored]
    lengths = [len(prompt) + len(branch) for prompt, branch, _ in rows]
    width = -(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = torch.full((len(rows), width), pad_token_id)
    sources: list[int] = []
    for number, (prompt, branch, given) in enumerate(rows):
        ids[number, : lengths[number]] = _tensor(prompt + branch)
        first = number * width + len(prompt) - 1
        sources += range(first + given, first + len(branch))
    seen = sum(causal_pairs(0, length) for length in lengths)
    return Batch(ids, None, None, _tensor(sources), *_targets(trees), tokens=sum(lengths), attention_pairs=seen)


def causal_pairs(before: int, length: int) -> int:
    """How many (query, key) pairs `length` tokens after `before` others make; each sees itself too."""
    return length * before + length * (length + 1) // 2


def _targets(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, int]:
    branches = [branch[given:] for tree in trees for branch, given in tree.scored]
    numbers = np.arange(len(branches)).repeat(list(map(len, branches)))
    return _tensor(list(chain.from_iterable(branches))), torch.from_numpy(numbers), len(branches)


def _tensor(values: list[int]) -> Tensor:
    """By numpy, which reads a list of numbers five times as fast as torch."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def grow_trees(pairs: Iterable[TokenPair]) -> tuple[list[Tree], PairIndex]:
    """The trees of pairs, one for each prompt. Pairs of a prompt share the completions that they have in common."""
    trees: list[Tree] = []
    numbers: dict[tuple[int, ...], int] = {}
    known: list[dict[tuple[int, ...], int]] = []  # of each tree: its branches' numbers
    givens: list[list[int]] = []

    def branch(tree: int, completion: list[int], given: int) -> int:
        if not completion:
            return -1
        number = known[tree].setdefault((given, *completion), len(trees[tree].branches))
        if number == len(trees[tree].branches):
            trees[tree].branches.append(completion)
            givens[tree].append(given)
        return number

    rows = []
    for pair in pairs:
        tree = numbers.setdefault(tuple(pair.prompt), len(trees))
        if tree == len(trees):
            trees.append(Tree(pair.prompt, []))
            known.append({})
            givens.append([])
        of_chosen, of_rejected = pair.given
        rows.append((tree, branch(tree, pair.chosen, of_chosen), branch(tree, pair.rejected, of_rejected)))
    index = np.array(rows, dtype=np.int64).reshape(-1, 3)
    trees = [replace(t, given=tuple(given)) if any(given) else t for t, given in zip(trees, givens, strict=True)]
    return trees, PairIndex(index[:, 0], index[:, 1:])


@dataclass(frozen=True, slots=True)
class PairIndex:
    """Positions of the completions of B pairs among trees.

    Two pairs of one prompt that share their chosen completion:
    `PairIndex(tree=[0, 0], branches=[[0, 1], [0, 2]])`.
    """

    tree: np.ndarray  # [B], the pair's tree
    branches: np.ndarray  # [B, 2], which of its branches are chosen and rejected; -1 if absent

    def in_batch(self, trees: Sequence[Tree], batch: Sequence[int]) -> PairSlots:
        """Their positions in a batch of some of the trees; pairs of other trees are left out."""
        first = np.full(len(trees), -1)  # the number in the batch of each tree's first branch
        total = 0
        for number in batch:
            first[number] = total
            total += len(trees[number].branches)
        local = np.flatnonzero(first[self.tree] >= 0)
        branches = self.branches[local]
        slots = np.where(branches >= 0, first[self.tree[local], None] + branches, total)
        return PairSlots(torch.from_numpy(local), torch.from_numpy(slots))


@dataclass(frozen=True, slots=True)
class PairSlots:
    """The b pairs of a batch, and which of its branches are their completions."""

    local_pairs: Tensor  # [b], their numbers in the step
    branch_index: Tensor  # [b, 2], branches of chosen and rejected; one past the last branch if absent

    def gather(self, values: Tensor, *, absent: float) -> tuple[Tensor, Tensor]:
        """Values [branches] of the chosen and of the rejected completions, [b] each; `absent` for those that are not."""
        padded = torch.cat((values, values.new_full((1,), absent)))
        chosen, rejected = self.branch_index.to(values.device).unbind(dim=1)
        return padded[chosen], padded[rejected]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some trees of a step as the model reads them, and the pairs that their branches are the completions of."""

    batch: Batch
    lengths: Tensor  # [branches], how many tokens of each are scored
    slots: PairSlots
    pairs: Tensor  # [b], their numbers in the round
    others: Tensor  # [b, 2] bool, as `RoundPairs.others`
    empty: bool
    """Whether this process has nothing left to do in the step. It computes all the same, because processes meet."""


class RoundPairs:
    """All pairs of a round, numbered: those to train on first, then those held out.

    `held_out` is None if nothing is. The round's `seed` decides the order, and for KTO each pair's partner, which is a
    pair of another prompt. For SFT, pairs come without their rejected completions.
    """

    def __init__(self, training: TokenPairs, held_out: TokenPairs | None, dpo: DPOConfig, *, seed: int) -> None:
        self.training, self.held_out, self.chosen_only = training, held_out, dpo.loss.type == "sft"
        size = dpo.pairs_per_step
        self.steps_per_epoch = -(-len(training) // size)
        epochs = dpo.epochs if dpo.max_steps is None else -(-dpo.max_steps // self.steps_per_epoch)
        self.steps = plan_steps(training.groups, epochs=epochs, pairs_per_step=size, seed=seed)[: dpo.max_steps]
        self.one_epoch = self.steps[: self.steps_per_epoch]  # or less, with every pair that is trained on
        rest = np.arange(len(training), len(self))
        self.held_out_steps = [rest[i : i + size] for i in range(0, len(rest), size)]
        groups = [training.groups]
        if held_out is not None:
            groups.append(held_out.groups + 1 + int(training.groups.max()))
        self.partners = choose_partners(np.concatenate(groups), seed=seed) if dpo.loss.type == "kto" else None

    def __len__(self) -> int:
        return len(self.training) + (len(self.held_out) if self.held_out is not None else 0)

    def __getitem__(self, number: int) -> TokenPair:
        if number < len(self.training):
            pair = self.training[number]
        else:
            assert self.held_out is not None
            pair = self.held_out[number - len(self.training)]
        return TokenPair(pair.prompt, pair.chosen, [], pair.given) if self.chosen_only else pair

    def trees(self, numbers: np.ndarray) -> tuple[list[Tree], PairIndex]:
        return grow_trees(self[number] for number in numbers.tolist())

    def others(self, numbers: np.ndarray) -> Tensor:
        """[n, 2] bool: whether the chosen and the rejected completions of these pairs are another source's."""
        held_out = [] if self.held_out is None else [self.held_out.others]
        return torch.from_numpy(np.concatenate([self.training.others, *held_out])[numbers])

    def mismatched_trees(self, numbers: np.ndarray) -> list[Tree]:
        """A tree for each pair: its prompt with a completion of its partner's."""
        assert self.partners is not None
        trees = []
        for number, partner in zip(numbers.tolist(), self.partners[numbers].tolist(), strict=True):
            pair = self[partner]
            sides = zip((pair.chosen, pair.rejected), pair.given, strict=True)
            completions = [(c, given) for c, given in sides if c]
            completion, given = completions[number % len(completions)]
            trees.append(Tree(self[number].prompt, [completion], (given,) if given else ()))
        return trees


def choose_partners(groups: np.ndarray, *, seed: int) -> np.ndarray:
    """[N]: for each pair the first pair of another prompt, one drawn for each prompt. `groups` as in `plan_steps`."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng(derive_seed(seed, "partners")).permutation(len(first))
    after = np.empty(len(first), dtype=np.int64)
    after[order] = first[np.roll(order, -1)]
    return after[group]


def plan_steps(groups: Sequence[int] | np.ndarray, *, epochs: int, pairs_per_step: int, seed: int) -> list[np.ndarray]:
    """The pairs of each optimizer step: a new order every epoch; the last step of an epoch may be smaller.

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


def tree_sizes(trees: Sequence[Tree], *, shared: bool) -> list[int]:
    """Tokens that go through the network for each tree: with `shared`, its prompt once."""
    return [t.tokens if shared else t.tokens + (len(t.branches) - 1) * len(t.prompt) for t in trees]


def micro_batches(sizes: Sequence[int], *, budget: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This process's share of items of `sizes` tokens, cut into batches of similar items with at most `budget` tokens.

    A larger item makes a batch alone. The batches are as few as the budget allows, and the largest is as small as their
    number allows. Every process gets the same number of batches, since processes synchronize at each; an empty batch adds
    nothing.
    """
    ordered = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    shares = [_cut(ordered[first::world][::-1], sizes, budget) for first in range(world)]
    return shares[rank] + [[]] * (max(map(len, shares)) - len(shares[rank]))


def _cut(items: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """The items in order, the largest first: one that does not fit in memory fails at once."""

    def within(budget: int) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for item in items:
            if not batches or sizes[item] > room:
                batches.append([])
                room = budget
            batches[-1].append(item)
            room -= sizes[item]
        return batches

    few = len(within(budget))
    least = bisect_left(range(budget), True, lo=1, key=lambda smaller: len(within(smaller)) <= few)
    return within(least)

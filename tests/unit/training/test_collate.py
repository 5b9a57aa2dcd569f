"""Trees and their batches, and the partition of pairs into steps, processes and micro-batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iterdpo.config import DPOConfig
from iterdpo.training.collate import (
    PAD_MULTIPLE,
    ROW_MULTIPLE,
    RoundPairs,
    TokenPair,
    Tree,
    collate,
    grow_trees,
    micro_batches,
    plan_steps,
)

TREES = [Tree([5, 6, 7], [[1, 2], [3]]), Tree([8], [[4, 9, 2]])]


def test_in_rows_of_their_own_each_branch_stands_behind_its_prompt_padded_on_the_right() -> None:
    batch = collate(TREES, shared=False, pad_token_id=99)
    pad = [99]
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 1, 2] + pad * 11,
        [5, 6, 7, 3] + pad * 12,
        [8, 4, 9, 2] + pad * 12,
    ]
    assert batch.layout is None
    assert batch.position_ids is None
    assert batch.sources.tolist() == [2, 3, 16 + 2, 32 + 0, 32 + 1, 32 + 2]
    assert batch.targets.tolist() == [1, 2, 3, 4, 9, 2]
    assert batch.branch.tolist() == [0, 0, 1, 2, 2, 2]
    assert (batch.branches, batch.tokens) == (3, 5 + 4 + 4)
    assert batch.attention_pairs == (1 + 2 + 3 + 4 + 5) + (1 + 2 + 3 + 4) + (1 + 2 + 3 + 4)


def test_in_one_row_each_prompt_stands_once_and_all_branches_come_after_all_prompts() -> None:
    batch = collate(TREES, shared=True, pad_token_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 3, 4, 9, 2] + [99] * 54]
    assert batch.position_ids is not None
    assert batch.position_ids[0, :10].tolist() == [0, 1, 2, 0, 3, 4, 3, 1, 2, 3]
    # A branch's first token is predicted at the end of its prompt, wherever that is.
    assert batch.sources.tolist() == [2, 4, 2, 3, 7, 8]
    assert batch.targets.tolist() == [1, 2, 3, 4, 9, 2]
    assert batch.branch.tolist() == [0, 0, 1, 2, 2, 2]
    assert (batch.branches, batch.tokens) == (3, 10)
    # Prompt 5 6 7: 1 + 2 + 3. Behind it 1 2: 4 + 5, and 3: 4. Prompt 8: 1. Behind it 4 9 2: 2 + 3 + 4.
    assert batch.attention_pairs == 6 + 9 + 4 + 1 + 9


@pytest.mark.parametrize(("tokens", "width"), [(2, 16), (16, 16), (17, 32), (100, 112)])
def test_rows_are_as_wide_as_the_next_multiple_of_16_so_that_few_shapes_occur(tokens: int, width: int) -> None:
    assert PAD_MULTIPLE == 16
    assert collate([Tree([1], [[2] * (tokens - 1)])], shared=False).input_ids.shape == (1, width)


@pytest.mark.parametrize(("tokens", "width"), [(2, 64), (63, 64), (64, 128), (200, 256)])
def test_one_row_is_as_wide_as_the_next_multiple_of_64_and_always_ends_in_padding(tokens: int, width: int) -> None:
    assert ROW_MULTIPLE == 64
    batch = collate([Tree([1], [[2] * (tokens - 1)])], shared=True, pad_token_id=9)
    assert batch.input_ids.shape == (1, width)
    assert batch.input_ids[0, -1] == 9


def test_a_trees_tokens_count_its_prompt_once() -> None:
    assert Tree([1, 2, 3], [[4, 5], [6]]).tokens == 3 + 2 + 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("trees", [[Tree([], [[1]])], [Tree([1], [[]])], [Tree([1], [[2]]), Tree([1], [[2], []])]])
def test_an_empty_prompt_or_completion_is_refused(trees: list[Tree], shared: bool) -> None:
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        collate(trees, shared=shared)


# Trees of pairs


def test_pairs_of_one_prompt_become_one_tree_and_share_the_completions_that_are_the_same() -> None:
    trees, index = grow_trees(
        [
            TokenPair([1, 2], [3], [4]),
            TokenPair([7], [3], [5]),
            TokenPair([1, 2], [3], [6, 6]),
            TokenPair([1, 2], [6, 6], [4]),
        ]
    )
    assert trees == [Tree([1, 2], [[3], [4], [6, 6]]), Tree([7], [[3], [5]])]
    assert index.tree.tolist() == [0, 1, 0, 0]
    assert index.branches.tolist() == [[0, 1], [0, 1], [0, 2], [2, 1]]


def test_a_side_that_is_absent_has_no_branch() -> None:
    trees, index = grow_trees([TokenPair([1], [2], []), TokenPair([1], [], [2]), TokenPair([3], [], [4])])
    assert trees == [Tree([1], [[2]]), Tree([3], [[4]])]
    assert index.tree.tolist() == [0, 0, 1]
    assert index.branches.tolist() == [[0, -1], [-1, 0], [-1, 0]]


TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=3)
PAIRS = st.lists(st.builds(TokenPair, TOKENS, st.one_of(st.just([]), TOKENS), TOKENS), max_size=12)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS)
def test_every_completion_is_where_the_index_says_and_no_branch_stands_twice(pairs: list[TokenPair]) -> None:
    trees, index = grow_trees(pairs)
    for pair, tree, branches in zip(pairs, index.tree, index.branches, strict=True):
        for completion, branch in zip((pair.chosen, pair.rejected), branches, strict=True):
            assert trees[tree].prompt == pair.prompt
            assert (trees[tree].branches[branch] if branch >= 0 else []) == completion
    assert len({tuple(tree.prompt) for tree in trees}) == len(trees)
    for tree in trees:
        assert len(set(map(tuple, tree.branches))) == len(tree.branches)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, data=st.data())
def test_values_of_a_batchs_branches_come_back_to_the_pairs_that_have_them(
    pairs: list[TokenPair], data: st.DataObject
) -> None:
    trees, index = grow_trees(pairs)
    batch = data.draw(st.permutations(range(len(trees)))) if trees else []
    batch = batch[: data.draw(st.integers(0, len(trees)))]
    names = [(number, branch) for number in batch for branch in range(len(trees[number].branches))]
    slots = index.in_batch(trees, batch)
    chosen, rejected = slots.gather(torch.arange(len(names)), absent=-1)
    assert slots.local_pairs.tolist() == [p for p, tree in enumerate(index.tree) if tree in batch]
    for pair, *values in zip(slots.local_pairs.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        for completion, value in zip((pairs[pair].chosen, pairs[pair].rejected), values, strict=True):
            tree, branch = names[value] if value >= 0 else (0, None)
            assert (trees[tree].branches[branch] if branch is not None else []) == completion


class Pairs(list[TokenPair]):
    """Stands for `TokenPairs`: one group for each prompt."""

    @property
    def groups(self) -> np.ndarray:
        return np.array([pair.prompt[0] for pair in self])


def test_a_mismatched_tree_has_a_completion_of_another_prompt() -> None:
    pairs = Pairs(TokenPair([p], [100 + 10 * p + i], [200 + 10 * p + i]) for p in range(3) for i in range(1 + p))
    held_out = Pairs([TokenPair([7], [170], [])])
    source = RoundPairs(pairs, held_out, DPOConfig(loss="kto"), seed=5)
    trees = source.mismatched_trees(np.arange(len(source)))
    assert len(trees) == 7
    for number, tree in enumerate(trees):
        own = [
            side for pair in [*pairs, *held_out] if pair.prompt == tree.prompt for side in (pair.chosen, pair.rejected)
        ]
        assert tree.prompt == source[number].prompt
        assert len(tree.branches) == 1
        assert tree.branches[0] not in own
        assert tree.branches[0]


def test_pairs_that_are_held_out_come_after_those_to_train_on() -> None:
    pairs, held_out = (
        Pairs(TokenPair([p], [1], [2]) for p in range(5)),
        Pairs(TokenPair([p], [3], [4]) for p in range(3)),
    )
    source = RoundPairs(pairs, held_out, DPOConfig(loss="sft", epochs=2, pairs_per_step=2), seed=5)
    assert sorted(np.concatenate(source.one_epoch).tolist()) == [0, 1, 2, 3, 4]
    assert len(source.steps) == 2 * len(source.one_epoch) == 6
    assert [numbers.tolist() for numbers in source.held_out_steps] == [[5, 6], [7]]
    assert source[6] == TokenPair([1], [3], [])


# Steps

GROUPS = st.lists(st.integers(0, 12), max_size=60)


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, epochs=st.integers(1, 3), size=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_epoch_trains_on_every_pair_once_the_tail_too(
    groups: list[int], epochs: int, size: int, seed: int
) -> None:
    steps = [step.tolist() for step in plan_steps(groups, epochs=epochs, pairs_per_step=size, seed=seed)]
    count = len(groups)
    a_pass = -(-count // size)
    assert len(steps) == epochs * a_pass
    for epoch in range(epochs):
        own = steps[epoch * a_pass : (epoch + 1) * a_pass]
        assert sorted(i for step in own for i in step) == list(range(count))
        assert [len(step) for step in own[:-1]] == [size] * (len(own) - 1)


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS.filter(bool), seed=st.integers(0, 9))
def test_pairs_of_one_prompt_follow_each_other_in_their_own_order(groups: list[int], seed: int) -> None:
    (order,) = plan_steps(groups, epochs=1, pairs_per_step=len(groups), seed=seed)
    read = [groups[i] for i in order]
    changes = sum(one != other for one, other in pairwise(read))
    assert changes == len(set(groups)) - 1
    for group in set(groups):
        own = [i for i in order if groups[i] == group]
        assert own == sorted(own)


def plan(count: int, **settings: int) -> list[list[int]]:
    return [step.tolist() for step in plan_steps(np.arange(count), **settings)]


def test_the_order_is_new_in_every_epoch_and_the_same_for_the_same_seed() -> None:
    steps = plan(50, epochs=2, pairs_per_step=50, seed=1)
    assert steps[0] != steps[1]
    assert list(range(50)) not in steps
    assert steps == plan(50, epochs=2, pairs_per_step=50, seed=1)
    assert steps != plan(50, epochs=2, pairs_per_step=50, seed=2)


def test_the_order_does_not_depend_on_the_size_of_a_step_or_on_what_the_groups_are_called() -> None:
    whole, small = (plan(20, epochs=1, pairs_per_step=size, seed=3) for size in (20, 7))
    assert [i for step in small for i in step] == whole[0]
    renamed = plan_steps([10 * i + 7 for i in range(20)], epochs=1, pairs_per_step=20, seed=3)
    assert renamed[0].tolist() == whole[0]


# Micro-batches


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    budget=st.integers(1, 120),
    world=st.integers(1, 6),
)
def test_the_processes_share_a_step_out_whatever_their_number(sizes: list[int], budget: int, world: int) -> None:
    shares = [micro_batches(sizes, budget=budget, rank=rank, world=world) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(sizes)))
    assert len({len(share) for share in shares}) == 1  # they meet at each batch
    assert any(all(share) for share in shares)  # and at no more of them than one of them needs
    smaller = (
        max((sum(sizes[i] for i in batch) for share in shares for batch in share if len(batch) > 1), default=1) - 1
    )
    if world == 1 and smaller > max(sizes, default=0):  # as even as their number allows
        assert len(micro_batches(sizes, budget=smaller)) > len(shares[0])
    for share in shares:
        for batch in share:
            assert len(batch) <= 1 or sum(sizes[i] for i in batch) <= budget
        read = [sizes[i] for batch in share for i in batch]
        assert read == sorted(read, reverse=True)  # similar lengths together
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1


def test_micro_batches_by_hand() -> None:
    sizes = [4, 9, 2, 3, 20]
    assert micro_batches(sizes, budget=9) == [[4], [1], [0, 3, 2]]
    # From the smallest on, in turn: 2 4 20 for one process, 3 9 for the other.
    assert micro_batches(sizes, budget=9, rank=0, world=2) == [[4], [0, 2]]
    assert micro_batches(sizes, budget=9, rank=1, world=2) == [[1], [3]]
    assert micro_batches([5], budget=9, rank=1, world=2) == [[]]
    assert micro_batches([1] * 10, budget=8) == [[9, 8, 7, 6, 5], [4, 3, 2, 1, 0]]  # not 8 and 2


# Tokens that are given


@pytest.mark.parametrize("shared", [True, False])
def test_given_tokens_are_read_and_not_scored(shared: bool) -> None:
    whole = collate(TREES, shared=shared)
    answers = collate([Tree([5, 6, 7], [[1, 2], [3]], (1, 0)), Tree([8], [[4, 9, 2]], (2,))], shared=shared)
    assert torch.equal(answers.input_ids, whole.input_ids)
    assert (answers.branches, answers.tokens, answers.attention_pairs) == (3, whole.tokens, whole.attention_pairs)
    scored = [1, 2, 5]  # of the tokens 1 2, 3, 4 9 2
    assert answers.sources.tolist() == whole.sources[scored].tolist()
    assert (answers.targets.tolist(), answers.branch.tolist()) == ([2, 3, 2], [0, 1, 2])


def test_a_branch_of_which_all_tokens_are_given_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        collate([Tree([1], [[2, 3]], (2,))], shared=False)


def test_trees_of_pairs_know_which_tokens_of_each_branch_are_given() -> None:
    trees, index = grow_trees(
        [TokenPair([1], [2, 3], [4, 5, 6], (1, 2)), TokenPair([1], [2, 3], [7], (1, 0)), TokenPair([9], [2], [3])]
    )
    assert trees == [Tree([1], [[2, 3], [4, 5, 6], [7]], (1, 2, 0)), Tree([9], [[2], [3]])]
    assert [tree.lengths for tree in trees] == [[1, 1, 1], [1, 1]]
    assert index.branches.tolist() == [[0, 1], [0, 2], [0, 1]]

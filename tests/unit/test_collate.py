"""Padding, and the partition of pairs into steps, processes and micro-batches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterdpo.collate import PAD_MULTIPLE, TokenPair, collate, collate_pairs, micro_batches, plan_steps


def test_rows_are_prompt_then_completion_padded_on_the_right_to_one_width() -> None:
    batch = collate([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], pad_token_id=99)
    pad = [99]
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2] + pad * 11, [8, 3, 4, 9] + pad * 12]
    yes, no = [True], [False]
    assert batch.completion_mask.tolist() == [no * 3 + yes * 2 + no * 11, no + yes * 3 + no * 12]


def test_the_first_logits_needed_are_those_of_the_shortest_prompts_last_token() -> None:
    assert collate([[5, 6, 7], [8, 9]], [[1], [2]]).first == 1
    assert collate([[5]], [[1]]).first == 0


@pytest.mark.parametrize(("tokens", "width"), [(2, 16), (16, 16), (17, 32), (100, 112)])
def test_widths_are_rounded_up_so_that_few_shapes_occur(tokens: int, width: int) -> None:
    assert PAD_MULTIPLE == 16
    assert tuple(collate([[1]], [[2] * (tokens - 1)]).input_ids.shape) == (1, width)


def test_chosen_rows_come_first_and_rejected_rows_after_them_in_the_order_of_the_pairs() -> None:
    batch = collate_pairs([TokenPair([1], [2], [3]), TokenPair([4], [5], [6])])
    assert batch.input_ids[:, :2].tolist() == [[1, 2], [4, 5], [1, 3], [4, 6]]


def test_a_pairs_tokens_count_its_prompt_twice() -> None:
    assert TokenPair([1, 2, 3], [4, 5], [6]).tokens == 2 * 3 + 2 + 1


@pytest.mark.parametrize(("prompts", "completions"), [([[]], [[1]]), ([[1]], [[]]), ([[1], [1]], [[2], []])])
def test_an_empty_prompt_or_completion_is_refused(prompts: list[list[int]], completions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        collate(prompts, completions)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 60), epochs=st.integers(1, 3), size=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_epoch_trains_on_every_pair_once_the_tail_too(count: int, epochs: int, size: int, seed: int) -> None:
    steps = plan_steps(count, epochs=epochs, pairs_per_step=size, seed=seed)
    a_pass = -(-count // size)
    assert len(steps) == epochs * a_pass
    for epoch in range(epochs):
        own = steps[epoch * a_pass : (epoch + 1) * a_pass]
        assert sorted(i for step in own for i in step) == list(range(count))
        assert [len(step) for step in own[:-1]] == [size] * (len(own) - 1)


def test_the_order_is_new_in_every_epoch_and_the_same_for_the_same_seed() -> None:
    steps = plan_steps(50, epochs=2, pairs_per_step=50, seed=1)
    assert steps[0] != steps[1]
    assert list(range(50)) not in steps
    assert steps == plan_steps(50, epochs=2, pairs_per_step=50, seed=1)
    assert steps != plan_steps(50, epochs=2, pairs_per_step=50, seed=2)


def test_the_order_does_not_depend_on_the_size_of_a_step() -> None:
    whole, small = (plan_steps(20, epochs=1, pairs_per_step=size, seed=3) for size in (20, 7))
    assert [i for step in small for i in step] == whole[0]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    size=st.integers(1, 10),
    world=st.integers(1, 6),
    data=st.data(),
)
def test_the_processes_share_a_step_out_whatever_their_number(
    lengths: list[int], size: int, world: int, data: st.DataObject
) -> None:
    step = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    shares = [micro_batches(step, lengths, size=size, rank=rank, world=world) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == sorted(step)
    assert len({len(share) for share in shares}) == 1  # they meet at each batch
    largest = math.ceil(len(step) / world)
    assert len(shares[0]) == math.ceil(largest / size)  # and at no more of them than the work needs
    for share in shares:
        assert max(map(len, share)) <= size
        read = [lengths[i] for batch in share for i in batch]
        assert read == sorted(read)  # similar lengths together
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert shares == [
        micro_batches(list(reversed(step)), lengths, size=size, rank=rank, world=world) for rank in range(world)
    ]

"""Floating-point operations, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.collate import Tree, collate
from iterdpo.training.flops import forward_flops, matmul_peak, weights
from iterdpo.training.models import load_policy, with_new_adapter

TREES = [Tree([1], [[3], [4, 5]]), Tree([6, 7], [[8]])]
# Two layers of width 64, with 2 heads and 1 key-value head of 32, and 128 within: query, key, value, output, and three
# matrices of the MLP.
MATRICES = 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 128)
HEAD = 259 * 64
LAST = 64 * 64 + 3 * 64 * 128  # of the last layer, after its attention


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_policy(tiny_model)


def test_a_row_of_trees_by_hand(model: Any) -> None:
    # 4 + 3 tokens, of which 4 are predicted, after 3 others. Keys seen: prompts 1 and 1 + 2, branches 2, 2 + 3 and 3.
    expected = 2 * (MATRICES * 7 - LAST * 4) + 2 * HEAD * 4 + 4 * 64 * 2 * (1 + 3 + 2 + 5 + 3)
    assert forward_flops(model)(collate(TREES, shared=True)) == expected


def test_rows_of_their_own_repeat_the_prompt(model: Any) -> None:
    # 2 + 3 + 3 tokens; keys seen: 1 + 2, 1 + 2 + 3 and 1 + 2 + 3.
    expected = 2 * MATRICES * 8 + 2 * HEAD * 4 + 4 * 64 * 2 * (3 + 6 + 6)
    assert forward_flops(model)(collate(TREES, shared=False)) == expected


def test_padding_costs_nothing(model: Any) -> None:
    wide, narrow = collate([Tree([1], [[2] * 63])], shared=True), collate([Tree([1], [[2] * 63])], shared=False)
    assert wide.input_ids.shape[1] == 2 * narrow.input_ids.shape[1]
    assert forward_flops(model)(wide) == forward_flops(model)(narrow) - 2 * LAST  # the last token is not read


def test_a_head_of_its_own_costs_what_a_tied_one_costs(model: Any, tmp_path: Path) -> None:
    untied = load_policy(build_tiny_checkpoint(tmp_path, tie_word_embeddings=False))
    batch = collate(TREES, shared=True)
    assert forward_flops(untied)(batch) == forward_flops(model)(batch)


def test_an_adapters_matrices_are_added(tmp_path: Path) -> None:
    base = load_policy(build_tiny_checkpoint(tmp_path))
    batch = collate(TREES, shared=True)
    before = forward_flops(base)(batch)
    with_new_adapter(base, r=4, alpha=8, target_modules=["k_proj"], quantize="none")
    assert forward_flops(base)(batch) == before + 2 * (2 * (64 * 4 + 4 * 32)) * 7


def test_two_weights_of_four_bits_share_a_byte() -> None:
    assert weights(torch.zeros(3, 5)) == 15
    assert weights(torch.zeros(12, 1, dtype=torch.uint8)) == 24


def test_the_peak_is_the_rate_of_the_fastest_of_several_products(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0, *[10.0, 20.0] * 3])  # 4, 2, 3 and three times 10 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert matmul_peak(torch.device("cpu"), torch.float32, size=8) == 2 * 8**3 / 2.0

"""Diversity, loops and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from iterdpo.evaluation.texts import MIX, distinct_n, loops, refuses, self_bleu


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([[1, 2, 1, 2], [1, 2]], 1, 2 / 6),
        ([[1, 2, 1, 2], [1, 2]], 2, 2 / 4),  # 12 21 12 | 12: no n-gram spans two completions
        ([[1, 2, 1, 2], [1, 2]], 3, 1.0),
        ([[1, 2, 1, 2], [1, 2]], 5, None),
        ([[7, 7, 7, 7]], 2, 1 / 3),
        ([[]], 1, None),
        ([], 1, None),
    ],
)
def test_distinct_n_is_distinct_n_grams_over_all(token_ids: list[list[int]], n: int, expected: float | None) -> None:
    assert distinct_n(lambda: token_ids, n) == expected


@pytest.mark.parametrize("held", [20, 100, 2_000])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_exact_however_few_ngrams_are_held_at_a_time(n: int, held: int) -> None:
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, 12, size=length) for length in generator.integers(0, 30, size=40)]
    grams = [tuple(text[i : i + n].tolist()) for text in texts for i in range(len(text) - n + 1)]
    passes = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from texts

    assert distinct_n(stream, n, held=held) == len(set(grams)) / len(grams)
    if len(set(grams)) > held:
        assert passes > 2  # one for the total, and at least two for the n-grams


def test_ngrams_whose_hashes_are_at_the_ends_of_a_pass_are_counted_once() -> None:
    ends = [edge + side for edge in (2**64, 2**63, 2**62, 2**61) for side in (-1, 0)]
    tokens = np.array([end * pow(int(MIX), -1, 2**64) % 2**64 for end in ends], np.uint64)
    assert distinct_n(lambda: [tokens], 1, held=2) == 1.0


def test_tokens_too_large_to_be_counted_exactly_are_refused() -> None:
    assert distinct_n(lambda: [[2**21 - 1, 0, 1]], 3) == 1.0
    with pytest.raises(ValueError, match="below 2,097,152"):
        distinct_n(lambda: [[2**21, 0, 1]], 3)


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 1.0),
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], 0.0),
        ([[1, 2], [1, 2], []], 1.0),  # too short for longer n-grams, and one that is empty
        # The second is a part of the first. Of the first, 4 of 5, 3 of 4, 2 of 3 and 1 of 2 n-grams are in the second; of the
        # second all are, and it is one token shorter.
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4]], ((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 + np.exp(1 - 5 / 4)) / 2),
        ([[1, 1, 1], [1], [2]], (0.0 + 1.0 + 0.0) / 3),  # no pair of the first is elsewhere
        # By sacrebleu 2.6: BLEU(smooth_method="none", tokenize="none", effective_order=True), each against all others.
        (
            [
                [3, 2, 2, 3, 2, 3, 3, 0, 0, 1, 1, 3],
                [3, 0, 1, 3, 0, 3, 0, 1, 3],
                [1, 1, 1, 2, 1, 3, 1, 1, 2, 2, 2, 2, 3, 3],
                [3, 2, 2],
                [1],
                [],
                [3, 1, 0, 3, 0, 3, 2, 0, 0, 1, 0, 0],
            ],
            0.1892225472061022,
        ),
        ([[1, 2], []], None),
        ([], None),
    ],
)
def test_self_bleu_is_the_mean_bleu_of_each_completion_against_all_others(
    token_ids: list[list[int]], expected: float | None
) -> None:
    assert self_bleu(token_ids) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("ids", "looping"),
    [
        ([*range(20), *[7] * 16], True),
        ([*range(20), *[7] * 15], False),
        ([*range(20), *[1, 2, 3] * 6], True),  # 16 tokens take six of three
        ([*range(20), *[1, 2, 3] * 6, 99], True),  # an end token
        ([*range(20), *[1, 2, 3] * 6, 98, 99], False),
        ([*range(20), *[1, 2, 3] * 6, 1, 2], True),  # cut within the n-gram
        ([*range(20), *[1, 2, 3] * 5], False),
        ([*range(100, 140)] * 4, True),
        ([*range(100, 140)] * 3, False),
        ([*range(100, 164)] * 4, True),  # 64 tokens
        ([*range(100, 165)] * 4, False),
        ([*range(200)], False),
        ([], False),
        ([5], False),
    ],
)
def test_a_loop_is_an_n_gram_that_repeats_until_the_end(ids: list[int], looping: bool) -> None:
    assert loops(ids) is looping
    assert loops(np.array(ids, np.int32)) is looping


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("  I’m sorry, I cannot assist with that request.", True),
        ("I am unable to provide medical advice.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("Unfortunately, I can't do that.", True),
        ("I cannot fulfill your request.", True),
        ("I apologize, but I cannot continue.", True),
        ("I'm sorry to hear that you lost your keys.", False),
        ("I can't wait to tell you about it!", False),
        ("Sure. I'm sorry, but I can't help laughing.", False),
        ("Sorry is a board game.", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text: str, refusal: bool) -> None:
    assert refuses(text) is refusal

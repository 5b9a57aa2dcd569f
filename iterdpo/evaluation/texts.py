"""What the completions look like: diversity, loops, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""The token ids of one completion."""

HELD = 2**21
"""N-grams held at a time (8 bytes each, with their copies some 75 MB)."""

MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: multiplying by it permutes the 64-bit integers

PERIODS, REPEATS, LOOP_TOKENS = 64, 4, 16
"""A loop is an n-gram of at most 64 tokens that is there four times in a row, and makes up 16 tokens."""

REFUSALS = (
    r"(i['’]m|i am) (very |really |so )?sorry,? (but )?(i|as an)\b.{0,40}?(can['’]?t|cannot|can not|unable|not able|won['’]t)",
    r"(i['’]m|i am) (unable|not able) to\b",
    r"(unfortunately|sorry|apologies),? (but )?i (can['’]?t|cannot|can not|am unable|am not able|won['’]t)\b",
    r"i (can['’]?t|cannot|can not|won['’]t|will not|must decline to) (help|assist|comply|provide|fulfill|do that|answer|support)",
    r"as an? (ai|artificial intelligence|language model|ai language model|ai assistant)\b",
    r"(my apologies|i apologi[sz]e),? (but )?i (can['’]?t|cannot|can not)\b",
)
"""How a refusal begins, in English."""

_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)


def loops(ids: TokenIds) -> bool:
    """Whether the completion ends in a loop, with or without an end token after it."""
    tokens = np.asarray(ids)
    return _ends_in_a_loop(tokens) or _ends_in_a_loop(tokens[:-1])


def refuses(text: str) -> bool:
    """Whether the text begins as a refusal does: with one of the `REFUSALS`, whatever its case."""
    return _REFUSAL.match(text.lstrip()) is not None


def _ends_in_a_loop(tokens: NDArray[Any]) -> bool:
    if len(tokens) < LOOP_TOKENS:
        return False
    before = tokens[-PERIODS - 1 : -1][::-1]  # before[p - 1] is p tokens before the last
    for period in np.flatnonzero(before == tokens[-1]) + 1:
        copies = max(REPEATS, -(-LOOP_TOKENS // period))
        whole = tokens[-copies * period :]
        if len(whole) == copies * period and np.array_equal(whole[period:], whole[:-period]):
            return True
    return False


def distinct_n(token_ids: Callable[[], Iterable[TokenIds]], n: int, *, held: int = HELD) -> float | None:
    """Distinct n-grams over all n-grams of the completions' tokens (Li et al., arXiv:1510.03055, Section 5.2).

    1 if nothing repeats. It falls as text grows: compare equal amounts. None if no completion has n tokens.

    `token_ids` is called once for each pass over the completions. A pass counts the n-grams whose hashes lie in a
    range, which is halved as often as more than `held` distinct ones are found; the next pass has the next range. The
    hash is one to one, so that the count is exact. A ValueError if n token ids of this size do not fit into 64 bits:
    of three tokens each must be below 2^21.
    """
    total = sum(max(0, len(ids) - n + 1) for ids in token_ids())
    distinct, first, width = 0, 0, 2**64
    while total and first < 2**64:
        last = min(first + width, 2**64) - 1
        found = np.empty(0, np.uint64)
        for hashes in _ngram_hashes(token_ids(), n, block=held // 2):
            found = _distinct(np.concatenate([found, hashes[(first <= hashes) & (hashes <= last)]]))
            while len(found) > held:
                width //= 2
                last = first + width - 1
                found = found[found <= last]
        distinct += len(found)
        first = last + 1
    return distinct / total if total else None


def self_bleu(token_ids: Iterable[TokenIds], order: int = 4) -> float | None:
    """The mean BLEU of each completion with all others as its references (Zhu et al., arXiv:1802.01886, Section 2.2).

    1 if each has a twin, 0 if none shares an n-gram of `order` tokens with another. It rises with the number of completions:
    compare equal ones. BLEU is that of one sentence without smoothing, over the orders that it is long enough for. Empty
    completions are left out. None if fewer than two are left.

    A library would count the n-grams of all references anew for each completion, which takes the square of their number. Here
    they are counted once: of each n-gram, the greatest count in another completion is its greatest or its second greatest.
    """
    rows = [np.asarray(ids, np.int64) for ids in token_ids if len(ids)]
    if len(rows) < 2:
        return None
    flat, lengths = np.concatenate(rows), np.array([len(row) for row in rows])
    of = np.repeat(np.arange(len(rows)), lengths)
    left = np.cumsum(lengths)[of] - np.arange(len(flat))  # tokens from here to the completion's end
    width = int(flat.max()) + 1
    grams, logs, orders = np.zeros(len(flat), np.int64), np.zeros(len(rows)), np.zeros(len(rows))
    for n in range(1, order + 1):
        starts = np.flatnonzero(left >= n)  # of the n-grams; each is an (n-1)-gram, by its number, and a token
        if not len(starts):
            break
        grams[starts] = np.unique(grams[starts] * width + flat[starts + n - 1], return_inverse=True)[1]
        matches = _clipped_matches(grams[starts], of[starts], len(rows))
        possible = np.maximum(lengths - n + 1, 0)
        with np.errstate(divide="ignore"):  # of none, log 0
            logs[possible > 0] += np.log(matches[possible > 0] / possible[possible > 0])
        orders += possible > 0
    return float(np.mean(_brevity(lengths) * np.exp(logs / orders)))


def _clipped_matches(grams: NDArray[np.int64], of: NDArray[np.int64], rows: int) -> NDArray[Any]:
    """Of each completion, its n-grams that another has too, each at most as often as the one that has it most often."""
    pairs, counts = np.unique(grams * rows + of, return_counts=True)
    gram, row = pairs // rows, pairs % rows
    order = np.lexsort((-counts, gram))  # by n-gram, the greatest count first
    gram, row, counts = gram[order], row[order], counts[order]
    first = np.append(True, gram[1:] != gram[:-1])
    group = np.flatnonzero(first)[np.cumsum(first) - 1]  # where the n-gram's greatest count is
    second = np.append(counts, 0)[group + 1] * np.append(~first, False)[group + 1]
    others = np.where(first, second, counts[group])
    return np.bincount(row, np.minimum(counts, others), rows)


def _brevity(lengths: NDArray[np.int64]) -> NDArray[Any]:
    """BLEU's penalty of completions that are shorter than the one nearest in length; of two as near, the shorter counts."""
    ordered = np.sort(lengths)
    place = np.searchsorted(ordered, lengths)
    twin = np.append(ordered, -1)[place + 1] == lengths
    below = np.append(ordered, -np.inf)[place - 1]  # before the first, infinitely far
    above = np.append(ordered, np.inf)[place + 1]
    nearest = np.where(lengths - below <= above - lengths, below, above)
    return np.where(twin | (nearest < lengths), 1.0, np.exp(1 - nearest / lengths))


def _ngram_hashes(token_ids: Iterable[TokenIds], n: int, *, block: int) -> Iterator[NDArray[np.uint64]]:
    """A hash of each n-gram, equal for equal ones alone, computed for about `block` tokens at a time."""
    bits = 64 // n
    waiting: list[NDArray[np.uint64]] = []
    tokens = 0

    def hashes() -> NDArray[np.uint64]:
        flat, ends = np.concatenate(waiting), np.cumsum([len(ids) for ids in waiting])
        if bits < 64 and int(flat.max(initial=0)) >= 2**bits:
            raise ValueError(f"n-grams of {n} tokens are counted for token ids below {2**bits:,}, not {flat.max():,}")
        # n-grams end with their completion
        starts = np.arange(len(flat)) + n <= np.repeat(ends, np.diff(ends, prepend=0))
        packed = np.zeros(len(flat), np.uint64)
        for i in range(n):
            packed[: len(flat) - i] |= flat[i:] << np.uint64(bits * i)
        return packed[starts] * MIX

    for ids in token_ids:
        waiting.append(np.asarray(ids, np.uint64))
        tokens += len(ids)
        if tokens >= block:
            yield hashes()
            waiting, tokens = [], 0
    if waiting:
        yield hashes()


def _distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The sorted distinct `values`, which are overwritten. np.unique builds a hash table, which takes far longer."""
    values.sort()
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values

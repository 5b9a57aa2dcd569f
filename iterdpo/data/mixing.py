"""Fresh pairs with those of earlier rounds and of a file: how many of each. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def further_pairs(fresh: int, *, replay: float, offline: float, earlier: int | None = None) -> tuple[int, int]:
    """How many replayed and offline pairs to add to the fresh ones, so that they are these shares of all.

    `further_pairs(60, replay=0.3, offline=0.1) == (30, 10)`. There are `earlier` pairs to replay: if they are too few,
    all are taken, and the offline pairs are still their share.
    """
    replayed = round(replay * fresh / (1 - replay - offline))
    if earlier is not None:
        replayed = min(replayed, earlier)
    return replayed, round(offline * (fresh + replayed) / (1 - offline))


def drawn(items: Iterable[T], number: int, *, seed: int) -> list[T]:
    """`number` of the items, or all if they are fewer, in their order; each subset is equally likely.

    Reads the items once, and has `number` in memory (algorithm R of Vitter, 1985, doi:10.1145/3147.3165).
    """
    draw, kept = random.Random(seed), list[tuple[int, T]]()
    for position, item in enumerate(items):
        if position < number:
            kept.append((position, item))
        elif (slot := draw.randrange(position + 1)) < number:
            kept[slot] = (position, item)
    return [item for _, item in sorted(kept, key=lambda kept: kept[0])]

"""Which completions of a prompt are compared with each other. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from iterdpo.judging.comparisons import UNCOMPARED, PairResult
from iterdpo.types import Comparison, CompletionGroup, Judgment

LOST_COIN_FLIP = "left the knock-out by a tie"


def random_pairs(count: int, number: int, *, seed: int) -> list[tuple[int, int]]:
    """`number` of the pairs of `count` completions, drawn so that each is in one before any is in many.

    Rings through all completions in random orders, one after the other, without repeats: with `number >= count - 1`
    every completion is linked to every other, with less as many as possible take part.
    """
    drawn: dict[tuple[int, int], None] = {}
    generator = random.Random(seed)
    while len(drawn) < min(number, count * (count - 1) // 2):
        ring = generator.sample(range(count), count)
        for i, j in zip(ring, [*ring[1:], ring[0]], strict=True):
            if len(drawn) < number and i != j:
                drawn.setdefault((min(i, j), max(i, j)))
    return list(drawn)


class Knockout:
    """A knock-out among `count` completions: losers leave, and a completion's score is the number of its wins.

    `matches()` are the next two completions each, `record` takes their results; it is over when `matches()` is empty. A
    completion without an opponent goes on unopposed. After a tie a coin decides which one goes on; the other abstains,
    since it did not lose.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        self._generator = random.Random(seed)
        self.standing = self._generator.sample(range(count), count)
        self.won = [0] * count
        self.reasons: list[str | None] = [None] * count
        self.failure: str | None = None

    def matches(self) -> list[tuple[int, int]]:
        if self.failure is not None or len(self.standing) < 2:
            return []
        return list(zip(self.standing[::2], self.standing[1::2], strict=False))

    def record(self, results: Sequence[PairResult]) -> None:
        out = set()
        for result in results:
            if result.reason is not None:
                self.failure = result.reason
                return
            if result.share == 0.5:
                loser = self._generator.choice([result.i, result.j])
                self.reasons[loser] = LOST_COIN_FLIP
            else:
                loser = result.j if result.share > 0.5 else result.i
                self.won[result.i + result.j - loser] += 1
            out.add(loser)
        self.standing = [k for k in self.standing if k not in out]

    def judgment(self, group: CompletionGroup, comparisons: Sequence[Comparison]) -> Judgment:
        """If a match was not judged, all completions abstain: every score depends on which ones went on."""
        count = len(group.completions)
        reasons = self.reasons if self.failure is None else [self.failure] * count
        if count == 1:
            reasons = [UNCOMPARED]
        scores = [None if reason else float(won) for reason, won in zip(reasons, self.won, strict=True)]
        return Judgment(group.prompt.id, scores, list(reasons), list(comparisons))

"""Which completions of a prompt are compared, and the scores that follow from the comparisons. Pure."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Literal

from iterdpo.judging.stats import Met, meetings
from iterdpo.types import Comparison, CompletionGroup, Judgment

BY_LOT = "left the knock-out by a tie"
NOT_MET = "nothing to compare it with"
Aggregate = Literal["win_rate", "bradley_terry"]


def random_pairs(count: int, number: int, *, seed: int) -> list[tuple[int, int]]:
    """`number` of the pairs of `count` completions, drawn so that everyone meets somebody before anyone meets many.

    Rings through all completions in random orders, one after the other, without repeats: with `number >= count - 1`
    every completion is linked to every other, with less as many as possible take part.
    """
    every = count * (count - 1) // 2
    drawn: dict[tuple[int, int], None] = {}
    generator = random.Random(seed)
    while len(drawn) < min(number, every):
        ring = generator.sample(range(count), count)
        for i, j in zip(ring, [*ring[1:], ring[0]], strict=True):
            if len(drawn) < number and i != j:
                drawn.setdefault((min(i, j), max(i, j)))
    return list(drawn)


def judgment_from_comparisons(
    group: CompletionGroup,
    comparisons: Sequence[Comparison],
    *,
    aggregate: Aggregate = "win_rate",
    lasting: Callable[[str], bool] = lambda reason: True,
) -> Judgment:
    """Scores from comparisons, each two completions in one order or in both.

    Two completions that met give each other points: 1 for a win in every order, 0 for a loss in every order, 0.5 for
    anything else; of soft verdicts the mean probability. `win_rate` is a completion's mean over those it met.
    `bradley_terry` is its log-strength, see there.

    A completion that was judged against nobody abstains, and is nobody's opponent, if the reasons for it are `lasting`:
    another time they would be the same. Where any other comparison was not judged, a mean over the rest would not be
    comparable: both of its completions abstain. Of `bradley_terry`, where every score depends on every comparison, the
    whole group does.
    """
    count = len(group.completions)
    met = meetings(comparisons)
    involved = {k for m in met if m.reason is None or not lasting(m.reason) for k in (m.i, m.j)}
    alone = {k: m.reason for m in met for k in (m.i, m.j) if k not in involved}
    met = [m for m in met if not {m.i, m.j} & alone.keys()]
    broken = {k: m.reason for m in met if m.reason is not None for k in (m.i, m.j)}
    if broken and aggregate == "bradley_terry":
        broken = dict.fromkeys(range(count), next(iter(broken.values())))
    unmet = set(range(count)).difference(*((m.i, m.j) for m in met))
    reasons = {**dict.fromkeys(unmet, NOT_MET), **alone, **broken}
    scores = (bradley_terry if aggregate == "bradley_terry" else win_rates)(count, [(m.i, m.j, m.points) for m in met])
    return Judgment(
        group.prompt.id,
        [None if k in reasons else score for k, score in enumerate(scores)],
        [reasons.get(k) for k in range(count)],
        list(comparisons),
    )


def win_rates(count: int, results: Sequence[tuple[int, int, float]]) -> list[float]:
    """The mean of a completion's points; `results` as of `bradley_terry`. 0 for one that met nobody."""
    points: list[list[float]] = [[] for _ in range(count)]
    for i, j, of_i in results:
        points[i].append(of_i)
        points[j].append(1 - of_i)
    return [sum(own) / max(1, len(own)) for own in points]


def bradley_terry(count: int, results: Sequence[tuple[int, int, float]], *, prior: float = 0.1) -> list[float]:
    """Log-strengths, of mean 0, by P(i beats j) = sigmoid(s_i - s_j) (Bradley and Terry 1952).

    `results` are (i, j, the points of i against j in [0, 1]). Each completion also meets an average one, which counts
    `prior` of a meeting and is a tie: without it, one that always wins would be infinitely strong. Maximum likelihood
    by the MM algorithm of Hunter (2004, Annals of Statistics 32), Eq. 3.
    """
    strengths = [1.0] * count
    wins = [prior / 2] * count
    for i, j, points in results:
        wins[i] += points
        wins[j] += 1 - points
    for _ in range(1_000):
        rates = [prior / (s + 1.0) for s in strengths]
        for i, j, _points in results:
            rate = 1.0 / (strengths[i] + strengths[j])
            rates[i] += rate
            rates[j] += rate
        fresh = [w / r for w, r in zip(wins, rates, strict=True)]
        moved = max((abs(math.log(a / b)) for a, b in zip(fresh, strengths, strict=True)), default=0.0)
        strengths = fresh
        if moved < 1e-9:
            break
    logs = [math.log(s) for s in strengths]
    return [value - sum(logs) / count for value in logs]


class Knockout:
    """A knock-out among `count` completions: losers leave, and a completion's score is how many meetings it won.

    `matches()` are the next meetings, `record` takes how they ended; when `matches()` is empty it is over. One without
    an opponent goes on unopposed. Of a tie one goes on by lot, and the other abstains, since it did not lose.
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

    def record(self, ended: Sequence[Met]) -> None:
        out = set()
        for met in ended:
            if met.reason is not None:
                self.failure = met.reason
                return
            if met.points == 0.5:
                loser = self._generator.choice([met.i, met.j])
                self.reasons[loser] = BY_LOT
            else:
                loser = met.j if met.points > 0.5 else met.i
                self.won[met.i + met.j - loser] += 1
            out.add(loser)
        self.standing = [k for k in self.standing if k not in out]

    def judgment(self, group: CompletionGroup, comparisons: Sequence[Comparison]) -> Judgment:
        """Where a meeting was not judged, nobody has a score: everyone's depends on who went on."""
        count = len(group.completions)
        reasons = self.reasons if self.failure is None else [self.failure] * count
        if count == 1:
            reasons = [NOT_MET]
        scores = [None if reason else float(won) for reason, won in zip(reasons, self.won, strict=True)]
        return Judgment(group.prompt.id, scores, list(reasons), list(comparisons))


def all_pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))

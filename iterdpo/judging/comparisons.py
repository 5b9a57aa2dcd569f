"""What the comparisons of a prompt's completions say together, and the scores that follow from them. Pure."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from iterdpo.types import Comparison, CompletionGroup, Judgment

Aggregate = Literal["win_rate", "bradley_terry"]
UNCOMPARED = "nothing to compare it with"
SHARES = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""What a hard verdict gives the completion that was shown first; the other one has the rest of 1."""


class PairResult(NamedTuple):
    """How completions i < j fared against each other over all orders: `PairResult(0, 2, share=1.0, reason=None)`.

    `share` is that of i; j has the rest of 1. If a comparison was not judged, `reason` says why.
    """

    i: int
    j: int
    share: float
    reason: str | None = None


def judgment_from_comparisons(
    group: CompletionGroup,
    comparisons: Sequence[Comparison],
    *,
    aggregate: Aggregate = "win_rate",
    is_permanent: Callable[[str], bool] = lambda reason: True,
) -> Judgment:
    """Scores from comparisons, each two completions in one order or in both.

    Two completions that were compared share 1: a win in every order gives 1, a loss in every order 0, anything else 0.5;
    of soft verdicts it is the mean probability. `win_rate` is a completion's mean share. `bradley_terry` is its
    log-strength, see there.

    A completion whose comparisons all failed for permanent reasons abstains, and its opponents are scored without it.
    If any other comparison was not judged, a mean over the rest would not be comparable: both of its completions
    abstain. With `bradley_terry`, every score depends on every comparison, so the whole group does.
    """
    count = len(group.completions)
    results = resolve_comparisons(comparisons)
    involved = {k for r in results if r.reason is None or not is_permanent(r.reason) for k in (r.i, r.j)}
    alone = {k: r.reason for r in results for k in (r.i, r.j) if k not in involved}
    results = [r for r in results if not {r.i, r.j} & alone.keys()]
    broken = {k: r.reason for r in results if r.reason is not None for k in (r.i, r.j)}
    if broken and aggregate == "bradley_terry":
        broken = dict.fromkeys(range(count), next(iter(broken.values())))
    uncompared = set(range(count)).difference(*((r.i, r.j) for r in results))
    reasons = {**dict.fromkeys(uncompared, UNCOMPARED), **alone, **broken}
    shares = [(r.i, r.j, r.share) for r in results]
    scores = (bradley_terry if aggregate == "bradley_terry" else win_rates)(count, shares)
    return Judgment(
        group.prompt.id,
        [None if k in reasons else score for k, score in enumerate(scores)],
        [reasons.get(k) for k in range(count)],
        list(comparisons),
    )


def win_rates(count: int, results: Sequence[tuple[int, int, float]]) -> list[float]:
    """Each completion's mean share; `results` are those of `bradley_terry`. 0 for one that was not compared."""
    shares: list[list[float]] = [[] for _ in range(count)]
    for i, j, of_i in results:
        shares[i].append(of_i)
        shares[j].append(1 - of_i)
    return [sum(own) / max(1, len(own)) for own in shares]


def bradley_terry(count: int, results: Sequence[tuple[int, int, float]], *, prior: float = 0.1) -> list[float]:
    """Log-strengths, of mean 0, by P(i beats j) = sigmoid(s_i - s_j) (Bradley and Terry 1952).

    `results` are (i, j, the share of i against j in [0, 1]). Each completion also ties with an average one, which counts
    as `prior` of a comparison: without it, one that always wins would be infinitely strong. Maximum likelihood by the
    MM algorithm of Hunter (2004, Annals of Statistics 32), Eq. 3.
    """
    strengths, wins = [1.0] * count, [prior / 2] * count
    for i, j, share in results:
        wins[i] += share
        wins[j] += 1 - share
    for _ in range(1_000):
        rates = [prior / (s + 1.0) for s in strengths]
        for i, j, _ in results:
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


def resolve_comparisons(comparisons: Sequence[Comparison]) -> list[PairResult]:
    """One `PairResult` for each two completions that were compared.

    Hard verdicts that contradict each other are a tie; of probabilities it is the mean.
    """
    by_pair: dict[tuple[int, int], list[Comparison]] = {}
    for c in comparisons:
        by_pair.setdefault((min(c.first, c.second), max(c.first, c.second)), []).append(c)
    results = []
    for (i, j), shown in by_pair.items():
        if unjudged := [c for c in shown if c.winner is None]:
            results.append(PairResult(i, j, 0.5, unjudged[0].reason or "the judge gave no reason"))
            continue
        shares = [_share(c) if c.first == i else 1 - _share(c) for c in shown]
        if all(c.probability is not None for c in shown):
            results.append(PairResult(i, j, sum(shares) / len(shares)))
        else:
            results.append(PairResult(i, j, shares[0] if len(set(shares)) == 1 else 0.5))
    return results


def count_cycles(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """(cycles, triads): of the three completions that were all compared decisively, how many are i > j > k > i."""
    decisive = [r for r in resolve_comparisons(comparisons) if r.share != 0.5]
    beats = {(r.i, r.j) if r.share > 0.5 else (r.j, r.i) for r in decisive}
    involved = sorted({k for pair in beats for k in pair})
    cycles = triads = 0
    for i, j, k in itertools.combinations(involved, 3):
        wins = Counter(a for a, b in beats if {a, b} <= {i, j, k})
        if wins.total() == 3:
            triads += 1
            cycles += max(wins.values()) == 1
    return cycles, triads


def _share(comparison: Comparison) -> float:
    assert comparison.winner is not None
    return SHARES[comparison.winner] if comparison.probability is None else comparison.probability

"""What comparisons say together, and what a stage's judgments tell about the judge that made them. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from iterdpo.types import Comparison, CompletionGroup, Judgment

POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}


class Met(NamedTuple):
    """How completions i < j fared against each other over all orders: `Met(0, 2, points=1.0, reason=None)`.

    `points` are those of i; j has the rest of 1. Where a comparison was not judged, `reason` says why.
    """

    i: int
    j: int
    points: float
    reason: str | None = None


def meetings(comparisons: Sequence[Comparison]) -> list[Met]:
    """One `Met` for each two completions that were compared.

    Hard verdicts that contradict each other are a tie; of probabilities the mean counts.
    """
    by_pair: dict[tuple[int, int], list[Comparison]] = {}
    for c in comparisons:
        by_pair.setdefault((min(c.first, c.second), max(c.first, c.second)), []).append(c)
    met = []
    for (i, j), shown in by_pair.items():
        unjudged = next((c for c in shown if c.winner is None), None)
        if unjudged is not None:
            met.append(Met(i, j, 0.5, unjudged.reason or "the judge gave no reason"))
            continue
        points = [_points(c) if c.first == i else 1 - _points(c) for c in shown]
        if all(c.probability is not None for c in shown):
            met.append(Met(i, j, sum(points) / len(points)))
        else:
            met.append(Met(i, j, points[0] if len(set(points)) == 1 else 0.5))
    return met


def count_cycles(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """(cycles, triads): of the three completions that all met decisively, how many are i > j > k > i."""
    beats = {(m.i, m.j) if m.points > 0.5 else (m.j, m.i) for m in meetings(comparisons) if m.points != 0.5}
    involved = sorted({k for pair in beats for k in pair})
    cycles = triads = 0
    for i, j, k in itertools.combinations(involved, 3):
        wins = Counter(a for a, b in beats if {a, b} <= {i, j, k})
        if wins.total() == 3:
            triads += 1
            cycles += max(wins.values()) == 1
    return cycles, triads


def judge_metrics(groups: Sequence[CompletionGroup], judgments: Sequence[Judgment]) -> dict[str, float | None]:
    """How the judge behaved; None where nothing is there to tell by. See docs/metrics.md.

    abstained           share of completions without a score
    flip_rate           of the pairs shown in both orders and judged in both, the share whose winner changed with the
                        order; from or to a tie counts
    first_position      of the single comparisons with a winner, the share that went to the one shown first; 0.5 is fair
    longer_wins         of the pairs of a prompt with different scores and lengths, the share where the longer has the
                        higher score
    length_correlation  Pearson's, of score and tokens, each minus its mean over the prompt's judged completions
    intransitive        of three completions that all met decisively, the share that beat each other in a circle
    """
    completions = sum(len(j.scores) for j in judgments)
    comparisons = [c for j in judgments for c in j.comparisons]
    decided = [c.winner for c in comparisons if c.winner in ("first", "second")]
    flips = [flip for j in judgments for flip in _flips(j.comparisons)]
    cycles = [count_cycles(j.comparisons) for j in judgments if len(j.scores) > 2]
    longer, scores, lengths = _lengths(groups, judgments)
    return {
        "abstained": _share([s is None for j in judgments for s in j.scores]) if completions else None,
        "flip_rate": _share(flips),
        "first_position": _share([w == "first" for w in decided]),
        "longer_wins": _share(longer),
        "length_correlation": _correlation(scores, lengths),
        "intransitive": sum(c for c, _ in cycles) / triads if (triads := sum(n for _, n in cycles)) else None,
    }


def _flips(comparisons: Sequence[Comparison]) -> list[bool]:
    shown = {(c.first, c.second): c for c in comparisons if c.winner is not None}
    both = [(c, shown[b, a]) for (a, b), c in shown.items() if a < b and (b, a) in shown]
    return [POINTS[one.winner] + POINTS[other.winner] != 1 for one, other in both if one.winner and other.winner]


def _lengths(
    groups: Sequence[CompletionGroup], judgments: Sequence[Judgment]
) -> tuple[list[bool], list[float], list[float]]:
    longer: list[bool] = []
    scores: list[float] = []
    lengths: list[float] = []
    for group, judgment in zip(groups, judgments, strict=True):
        judged = [
            (score, len(c.token_ids))
            for score, c in zip(judgment.scores, group.completions, strict=True)
            if score is not None
        ]
        for (s, m), (t, n) in itertools.combinations(judged, 2):
            if s != t and m != n:
                longer.append((s > t) == (m > n))
        if len(judged) > 1:
            values, tokens = np.array(judged, dtype=float).T
            scores += list(values - values.mean())
            lengths += list(tokens - tokens.mean())
    return longer, scores, lengths


def _correlation(x: list[float], y: list[float]) -> float | None:
    if not x or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _points(comparison: Comparison) -> float:
    assert comparison.winner is not None
    return POINTS[comparison.winner] if comparison.probability is None else comparison.probability


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def printable(reason: str) -> str:
    """A reason for a terminal: it may quote a completion, and that may hold control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in reason)


def abstention_counts(judgments: Sequence[Judgment], *, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The counts of a manifest: completions, those without a score, and the commonest reasons."""
    given = (reason for j in judgments for reason in j.abstentions if reason is not None)
    reasons = Counter(reason for reason in given if reason not in leave_out)
    return {
        "completions": sum(len(j.scores) for j in judgments),
        "unjudged": reasons.total(),
        "abstentions": dict(reasons.most_common(20)),
    }

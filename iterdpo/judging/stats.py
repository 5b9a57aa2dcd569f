"""Metrics of a judge, from the judgments that it made in a stage. Pure."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from iterdpo.judging.comparisons import SHARES, count_cycles
from iterdpo.types import Comparison, CompletionGroup, Judgment

FloatArray = npt.NDArray[np.float64]
BLOCK = 1 << 17
"""Completions whose scores and lengths are kept, 16 bytes each, until they are summed up."""
MOST_REASONS = 10_000
"""Maximum number of distinct reasons. A reason may quote its completion, and is then different for each."""


class JudgeMetrics:
    """How a stage's judge behaved, counted shard by shard: `JudgeMetrics().add(groups, judgments).result()`.

    It holds counts, and the scores and lengths of at most `BLOCK` completions.
    """

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._lengths = _Correlation()

    def add(self, groups: Iterable[CompletionGroup], judgments: Iterable[Judgment]) -> JudgeMetrics:
        n = self._count
        judged: list[list[tuple[float, int]]] = []
        for group, judgment in zip(groups, judgments, strict=True):
            n["completions"] += len(judgment.scores)
            n["abstained"] += judgment.scores.count(None)
            if judgment.comparisons:
                winners = [c.winner for c in judgment.comparisons]
                flips = _flips(judgment.comparisons)
                cycles, triads = count_cycles(judgment.comparisons) if len(judgment.scores) > 2 else (0, 0)
                n["first"] += winners.count("first")
                n["decided"] += winners.count("first") + winners.count("second")
                n["flips"] += sum(flips)
                n["in both orders"] += len(flips)
                n["cycles"] += cycles
                n["triads"] += triads
            scored = zip(judgment.scores, group.completions, strict=True)
            judged.append([(score, len(c.answer_ids)) for score, c in scored if score is not None])
        for k, alike in itertools.groupby(judged, key=len):
            if k > 1:
                scores, lengths = np.moveaxis(np.array(list(alike), dtype=float), 2, 0).copy()  # [groups, k] each
                self._lengths.add(*((x - x.mean(axis=1, keepdims=True)).ravel() for x in (scores, lengths)))
                i, j = np.triu_indices(k, 1)
                unlike = (scores[:, i] != scores[:, j]) & (lengths[:, i] != lengths[:, j])
                longer_wins = (scores[:, i] > scores[:, j]) == (lengths[:, i] > lengths[:, j])
                n["of unlike length"] += int(unlike.sum())
                n["longer wins"] += int((unlike & longer_wins).sum())
        return self

    def result(self) -> dict[str, float | None]:
        """Each metric, or None without any data for it. See docs/metrics.md.

        abstained           share of completions without a score
        flip_rate           of the pairs shown in both orders and judged in both, the share whose winner changed with
                            the order; from or to a tie counts
        first_position      of the single comparisons with a winner, the share that went to the one shown first; 0.5 is
                            fair
        longer_wins         of the pairs of a prompt with different scores and lengths, the share in which the longer has
                            the higher score
        length_correlation  Pearson's, of score and tokens, each minus its mean over the prompt's judged completions
        intransitive        of three completions that were all compared decisively, the share in which each beat another
                            one
        """
        n = self._count

        def share(part: str, whole: str) -> float | None:
            return n[part] / n[whole] if n[whole] else None

        return {
            "abstained": share("abstained", "completions"),
            "flip_rate": share("flips", "in both orders"),
            "first_position": share("first", "decided"),
            "longer_wins": share("longer wins", "of unlike length"),
            "length_correlation": self._lengths.result(),
            "intransitive": share("cycles", "triads"),
        }


class AbstentionCounts:
    """The counts of a manifest, judgment by judgment: completions, those without a score, and the commonest reasons.

    Args:
        leave_out: reasons that are not counted.
    """

    def __init__(self, *, leave_out: Collection[str] = ()) -> None:
        self._leave_out = leave_out
        self._completions = self._unjudged = 0
        self._reasons: Counter[str] = Counter()

    def add(self, judgments: Iterable[Judgment]) -> AbstentionCounts:
        for judgment in judgments:
            self._completions += len(judgment.scores)
            for reason in judgment.abstentions:
                if reason is None or reason in self._leave_out:
                    continue
                self._unjudged += 1
                if reason in self._reasons or len(self._reasons) < MOST_REASONS:
                    self._reasons[reason] += 1
        return self

    def result(self) -> dict[str, Any]:
        """`{"completions": 512, "unjudged": 3, "abstentions": {"timed out after 60 s": 3}}`"""
        reasons = dict(self._reasons.most_common(20))
        return {"completions": self._completions, "unjudged": self._unjudged, "abstentions": reasons}


class _Correlation:
    """Pearson's correlation of x and y, whose means are 0. Up to `BLOCK` points it is numpy's, beyond it is r of sums."""

    def __init__(self) -> None:
        self._x, self._y = array("d"), array("d")
        self._sums = np.zeros(3)  # of x², xy and y² over the blocks that are full

    def add(self, x: FloatArray, y: FloatArray) -> None:
        self._x.extend(x)
        self._y.extend(y)
        if len(self._x) > BLOCK:
            self._sums += self._products()
            self._x, self._y = array("d"), array("d")

    def result(self) -> float | None:
        if not self._sums.any():
            if not self._x or np.ptp(self._x) == 0 or np.ptp(self._y) == 0:
                return None
            return float(np.corrcoef(self._x, self._y)[0, 1])
        xx, xy, yy = self._sums + self._products()
        return float(xy / np.sqrt(xx * yy)) if xx and yy else None

    def _products(self) -> FloatArray:
        x, y = np.array(self._x), np.array(self._y)
        return np.array([x @ x, x @ y, y @ y])


def _flips(comparisons: Sequence[Comparison]) -> list[bool]:
    shown = {(c.first, c.second): c for c in comparisons if c.winner is not None}
    both = [(c, shown[b, a]) for (a, b), c in shown.items() if a < b and (b, a) in shown]
    return [SHARES[one.winner] + SHARES[other.winner] != 1 for one, other in both if one.winner and other.winner]

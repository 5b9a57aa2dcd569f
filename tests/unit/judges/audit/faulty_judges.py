"""Judges whose faults are known by construction, pairs for them, and whether intervals hold a truth."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iterdpo.judging.judge import JudgeBase
from iterdpo.stats import Estimate
from iterdpo.types import Comparison, Completion, CompletionGroup, Judgment, Prompt
from judges.audit.labelled import LabelledGroup

PAIRS = 4_000


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def labelled(
    count: int, *, longer: float = 0.5, ties: float = 0.0, subsets: Sequence[str] = (), seed: int = 0
) -> Iterator[LabelledGroup]:
    """Pairs whose completions say whether they are the chosen one; the chosen is the longer one with P = `longer`."""
    rng = random.Random(f"pairs {seed}")
    for row in range(1, count + 1):
        long = rng.random() < longer
        chosen, rejected = (
            f"{name} {'x' * (60 if more else 20)}" for name, more in (("good", long), ("evil", not long))
        )
        yield LabelledGroup(
            Prompt(f"p-{row}", f"question {row}"),
            [1],
            [Completion(text, [1], [], "stop") for text in (chosen, rejected)],
            1,
            tie=rng.random() < ties,
            subset=rng.choice(subsets) if subsets else None,
            row=row,
        )


class Faulty(JudgeBase):
    """Knows the truth of a pair with P = `right` (by whether the better is the longer), and tells it, except that with
    P = `blind` in each single look it names what comes first without reading."""

    name, version, comparative = "faulty", "1", True

    def __init__(self, *, right: dict[bool, float], blind: float, compares: bool = True, seed: int = 0) -> None:
        self.right, self.blind, self.compares, self.seed = right, blind, compares, seed

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [self.judge_one(group) for group in groups]

    def judge_one(self, group: CompletionGroup) -> Judgment:
        texts = [c.text for c in group.completions]
        good = 0 if texts[0].startswith("good") else 1
        knows = (
            random.Random(f"{self.seed} {group.prompt.id}").random()
            < self.right[len(texts[good]) > len(texts[1 - good])]
        )
        better = good if knows else 1 - good

        def verdict(first: int) -> int:
            shown = random.Random(f"{self.seed} {group.prompt.id} {texts[first]}")
            return first if shown.random() < self.blind else better

        if not self.compares:
            won = verdict(0)
            return Judgment(group.prompt.id, [float(won == 0), float(won == 1)], [None, None])
        wins = [verdict(0), verdict(1)]
        scores = [wins.count(0) / 2, wins.count(1) / 2]
        comparisons = [
            Comparison(0, 1, "first" if wins[0] == 0 else "second"),
            Comparison(1, 0, "first" if wins[1] == 1 else "second"),
        ]
        return Judgment(group.prompt.id, scores, [None, None], comparisons)


class Scores(JudgeBase):
    """Scores by a function of (group, a generator of the prompt's own)."""

    name, version = "scores", "1"

    def __init__(self, score: Any, seed: int = 0) -> None:
        self.score, self.seed = score, seed

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [
            Judgment(
                g.prompt.id,
                list(self.score(g, random.Random(f"{self.seed} {g.prompt.id}"))),
                [None] * len(g.completions),
            )
            for g in groups
        ]


def covered(draw: Any, truth: float, *, seeds: int) -> float:
    return float(np.mean([holds(draw(np.random.default_rng(seed)), truth) for seed in range(seeds)]))


def groups(count: int, size: int) -> list[CompletionGroup]:
    return [
        CompletionGroup(Prompt(f"p-{i}", f"q {i}"), [1], [Completion(f"c {k}", [1], [], "stop") for k in range(size)])
        for i in range(count)
    ]

"""Rows of published benchmarks of judges, as they are distributed, and RewardBench 2's own score.

| benchmark | a row |
| --- | --- |
| RewardBench 2 (arXiv:2506.01937) | `prompt`, `chosen` and `rejected` (lists of texts), `num_correct`, `subset`, `id` |
| LLMBar (arXiv:2310.07641) | `input`, `output_1`, `output_2`, `label`: 1 or 2 |
| JudgeBench (arXiv:2410.12784) | `question`, `response_A`, `response_B`, `label`: `A>B` or `B>A`, `source` |

Every row counts, as in the published figures: also one whose completions are empty or alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from iterdpo.data.rows import column_value, shown
from iterdpo.errors import DataError
from iterdpo.stats import Estimate, clustered_mean

Published = Literal["RewardBench 2", "LLMBar", "JudgeBench"]

COLUMNS: dict[Published, set[str]] = {
    "RewardBench 2": {"chosen", "rejected", "num_correct", "num_incorrect", "total_completions", "models"},
    "LLMBar": {"input", "output_1", "output_2", "label"},
    "JudgeBench": {"question", "response_A", "response_B", "label"},
}
"""The columns that are the row's texts, or tell the label. A judge does not see them."""
LABELS: dict[Published, dict[str, int | None]] = {
    "LLMBar": {"1": 0, "2": 1},
    "JudgeBench": {"A>B": 0, "B>A": 1, "A=B": None},
}
"""Which of the two completions a label names; None is a tie."""
SOURCES = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math"}
SOURCES |= {"livecodebench": "coding"}
"""JudgeBench's categories, by the beginnings of its sources."""
TIES = "ties"
"""The subset of RewardBench 2 whose prompts have several right answers."""


class Parts(NamedTuple):
    """What a row says: its first `right` completions are better than the others, or all are as good if it is a `tie`."""

    prompt: Any
    completions: list[str]
    right: int
    tie: bool
    subset: str | None
    name: str


def published_format(row: dict[str, Any]) -> Published | None:
    """The benchmark that a row belongs to by its columns; None if it is none of these."""
    if _texts(row.get("chosen")) and _texts(row.get("rejected")):
        return "RewardBench 2"
    for name in ("LLMBar", "JudgeBench"):
        if COLUMNS[name] <= row.keys():
            return name
    return None


def parse_published(row: dict[str, Any], format: Published, where: str) -> Parts:
    """The parts of a row.

    Raises:
        DataError: a column that is missing or of the wrong type, with its place.
    """
    if format == "RewardBench 2":
        right, wrong = (_listed(row, name, where) for name in ("chosen", "rejected"))
        count = row.get("num_correct")
        if count is not None and count != len(right):
            raise DataError(f"{where}: num_correct is {shown(count)}, but chosen has {len(right)} texts")
        subset = row.get("subset")
        prompt = column_value(row, "prompt", where, "rows with lists of texts have prompt, chosen and rejected")
        return Parts(prompt, right + wrong, len(right), False, subset and str(subset), str(row.get("id") or ""))
    names = ("input", "output_1", "output_2") if format == "LLMBar" else ("question", "response_A", "response_B")
    remedy = f"{format}'s rows have {', '.join(names)} and label"
    prompt, *both = (column_value(row, name, where, remedy) for name in names)
    for name, text in zip(names[1:], both, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{where}, column {name!r} is {shown(text)}; it must be text")
    labels, label = LABELS[format], column_value(row, "label", where, remedy)
    if isinstance(label, bool) or str(label) not in labels:
        raise DataError(f"{where}, column 'label' is {shown(label)}; it must be {' or '.join(labels)}")
    better = labels[str(label)]
    source = str(row.get("source") or "")
    subset = next((kind for begin, kind in SOURCES.items() if source.startswith(begin)), source) or None
    return Parts(prompt, both[::-1] if better == 1 else both, 1, better is None, subset, str(row.get("pair_id") or ""))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _listed(row: dict[str, Any], name: str, where: str) -> list[str]:
    texts = column_value(row, name, where, "rows with lists of texts have prompt, chosen and rejected")
    if not _texts(texts):
        raise DataError(f"{where}, column {name!r} is {shown(texts)}; it must be a list of one text or more")
    return list(texts)


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """The scores of a prompt's completions, of which the first `right` are right ones; None for one that was not judged.

    `JudgedGroup(row=3, prompt_id="p-1f0c…", name="tied:17", subset="Ties", right=2, scores=[0.9, 0.8, 0.1])`
    """

    row: int
    prompt_id: str
    name: str
    subset: str | None
    right: int
    scores: list[float | None]


def measure_groups(groups: Sequence[JudgedGroup], *, confidence: float = 0.95) -> dict[str, Any] | None:
    """RewardBench 2's figures of groups that were judged whole; None if there is no group of more than two.

    best_of   the share of prompts whose best score is that of a right completion; if n share it, a right one counts 1/n
    subsets   the same of each subset; of `Ties` its own score (see `ties_score`)
    ties      the parts of that score
    score     the mean of the subsets, each with the same weight, as on the leaderboard
    """
    if not any(len(group.scores) > 2 for group in groups):
        return None
    ties, rest = ([g for g in groups if ((g.subset or "").casefold() == TIES) is tied] for tied in (True, False))
    by_subset: dict[str, list[JudgedGroup]] = {}
    for group in rest:
        by_subset.setdefault(group.subset or "all", []).append(group)
    subsets: dict[str, Any] = {name: _best_of(some, confidence) for name, some in sorted(by_subset.items())}
    parts = ties_score(ties) if ties else None
    if parts is not None:
        subsets[str(ties[0].subset)] = Estimate(parts["score"], None, None, len(ties))
    values = [estimate.value for estimate in subsets.values()]
    score = None if None in values else sum(values) / len(values)
    return {
        "groups": len(groups),
        "best_of": _best_of(rest, confidence),
        "subsets": subsets,
        "ties": parts,
        "score": score,
    }


def _best_of(groups: Sequence[JudgedGroup], confidence: float) -> Estimate:
    judged = [(scores, g) for g in groups if (scores := _whole(g)) is not None]
    credit = [scores[: g.right].count(max(scores)) / scores.count(max(scores)) for scores, g in judged]
    return clustered_mean(credit, [g.prompt_id for _, g in judged], confidence=confidence)


def _whole(group: JudgedGroup) -> list[float] | None:
    scores = [score for score in group.scores if score is not None]
    return scores if len(scores) == len(group.scores) else None


def ties_score(groups: Sequence[JudgedGroup]) -> dict[str, float | None]:
    """RewardBench 2's score of its subset Ties (arXiv:2506.01937, section 3), whose ids are `tied:17` and `ref:17`.

    ref_accuracy, tied_accuracy  the share of prompts whose lowest right score is above the highest wrong one: `gap` > 0
    preferred                    of the tied ones, `gap` > `spread`, the highest right score minus the lowest
    preferred_hard               min(gap, the gap of its reference prompt) > `spread`
    margin                       mean of tanh(min(…) / spread - 1)

        score = 0.3 tied_accuracy + 0.3 ref_accuracy + 0.2 preferred + 0.2 preferred_hard + 0.01 margin

    None of those for which no prompt was judged whole.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for group in groups:
        kind, _, number = group.name.partition(":")
        if kind in found and (scores := _whole(group)) is not None and len(scores) > group.right:
            right, wrong = scores[: group.right], scores[group.right :]
            found[kind][number] = min(right) - max(wrong), max(right) - min(right)
    both = [(*found["tied"][n], found["ref"][n][0]) for n in found["tied"] if n in found["ref"]]
    parts = {
        "tied_accuracy": _mean([gap > 0 for gap, _ in found["tied"].values()]),
        "ref_accuracy": _mean([gap > 0 for gap, _ in found["ref"].values()]),
        "preferred": _mean([gap > spread for gap, spread, _ in both]),
        "preferred_hard": _mean([min(gap, ref) > spread for gap, spread, ref in both]),
        "margin": _mean([_margin(min(gap, ref), spread) for gap, spread, ref in both]),
    }
    weights = (0.3, 0.3, 0.2, 0.2, 0.01)
    terms = [weight * value for weight, value in zip(weights, parts.values(), strict=True) if value is not None]
    return {"score": sum(terms) if len(terms) == len(weights) else None, **parts}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _margin(gap: float, spread: float) -> float:
    """Without a spread the ratio is an infinity, or (without a gap too) not defined, which counts 0."""
    if spread == 0:
        return float((gap > 0) - (gap < 0))
    return math.tanh(gap / spread - 1)

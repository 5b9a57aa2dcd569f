"""Groups and judgments in, preference pairs out. Pure.

With scores s_k of the K completions of a prompt, a pair (chosen i, rejected j) needs s_i - s_j > 0 and
s_i - s_j >= `min_margin`, and completions that differ. Ties, abstentions and twins are left out and counted:
a tie trained as if the first had won teaches noise.

A thought without an end is no answer, whatever its score: it may be rejected, but is never chosen.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from iterdpo.seeds import derive_seed
from iterdpo.types import Completion, CompletionGroup, Judgment, PreferencePair

Strategy = Literal["best_worst", "best_random", "all_pairs"]


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Counts of groups by outcome: `PairCounts(groups=128, kept=121, tied=4, unjudged=2, identical=1, truncated=0, …)`.

    A group that gives at least one pair counts in `groups_paired`; every other counts once, under the first of
    these that leaves it without a pair: `truncated`, `unfinished_thoughts`, `unjudged`, `identical`, `tied`. `kept`
    counts pairs.
    """

    groups: int = 0
    groups_paired: int = 0
    kept: int = 0
    tied: int = 0
    unjudged: int = 0
    identical: int = 0
    truncated: int = 0
    completions_unjudged: int = 0
    completions_truncated: int = 0
    unfinished_thoughts: int = 0

    def __add__(self, later: PairCounts) -> PairCounts:
        """The counts of both: groups may be paired a few at a time."""
        return PairCounts(*map(sum, zip(astuple(self), astuple(later), strict=True)))

    def summary(self) -> str:
        """`kept 121 pairs of 128 groups (4 tied, 2 unjudged, 1 identical)`."""
        reasons = ("tied", "unjudged", "identical", "truncated", "unfinished_thoughts")
        counts = {reason: getattr(self, reason) for reason in reasons}
        left = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items() if count)
        return f"kept {self.kept:,} pairs of {self.groups:,} groups" + (f" ({left})" if left else "")


def build_pairs(
    groups: Sequence[CompletionGroup],
    judgments: Sequence[Judgment],
    *,
    strategy: Strategy = "best_worst",
    min_margin: float = 0.0,
    max_pairs_per_prompt: int | None = None,
    drop_truncated: bool = False,
    answers_alone: bool = False,
    by_reasoning: bool = False,
    seed: int = 0,
) -> tuple[list[PreferencePair], PairCounts]:
    """The pairs of each group, in the order of the groups, and the account of what was left out.

    best_worst   the highest score against the lowest
    best_random  the highest score against one of the completions that it beats by the margin, drawn at random
    all_pairs    every two completions that differ by the margin, largest margins first

    Among equal scores the order of sampling decides, except that `best_random` draws from `seed` and the prompt's id.

    With `drop_truncated`, completions that reached the limit of tokens are left out, and thoughts that have no end. With
    `answers_alone`, so are completions whose answer has no token, since nothing of them would be trained on. Completions
    of one text are twins; with `by_reasoning`, those whose reasoning is the same too.
    """
    pairs: list[PreferencePair] = []
    counts: Counter[str] = Counter(groups=len(groups))
    for group, judgment in zip(groups, judgments, strict=True):
        assert group.prompt.id == judgment.prompt_id
        counts["completions_unjudged"] += judgment.scores.count(None)
        counts["completions_truncated"] += sum(completion.truncated for completion in group.completions)
        scores = _candidates(
            group,
            judgment,
            drop_truncated=drop_truncated,
            answers_alone=answers_alone,
            by_reasoning=by_reasoning,
        )
        if isinstance(scores, str):
            counts[scores] += 1
            continue
        ordered = [
            (i, j) for i in scores for j in scores if scores[i] > scores[j] and scores[i] - scores[j] >= min_margin
        ]
        if not ordered:
            counts["tied"] += 1
            continue
        ordered = [(i, j) for i, j in ordered if not group.completions[i].unfinished]
        if not ordered:
            counts["unfinished_thoughts"] += 1
            continue
        match strategy:
            case "best_worst":
                selected = [max(ordered, key=lambda ij: scores[ij[0]] - scores[ij[1]])]
            case "best_random":
                best = max(scores[i] for i, _ in ordered)
                of_best = [(i, j) for i, j in ordered if scores[i] == best]
                selected = [random.Random(derive_seed(seed, "pairing", group.prompt.id)).choice(of_best)]
            case "all_pairs":
                selected = sorted(ordered, key=lambda ij: scores[ij[1]] - scores[ij[0]])
        counts["groups_paired"] += 1
        pairs.extend(
            PreferencePair(
                group.prompt, group.prompt_ids, group.completions[i], group.completions[j], scores[i], scores[j]
            )
            for i, j in selected[:max_pairs_per_prompt]
        )
    return pairs, PairCounts(kept=len(pairs), **counts)


def _candidates(
    group: CompletionGroup, judgment: Judgment, *, drop_truncated: bool, answers_alone: bool, by_reasoning: bool
) -> dict[int, float] | str:
    """The scores of those that may enter a pair: whole, judged, one of each text; or why fewer than two are left."""
    whole = [k for k, completion in enumerate(group.completions) if not (drop_truncated and completion.truncated)]
    if drop_truncated and len(whole) < 2:
        return "truncated"
    thoughts = {k for k in whole if group.completions[k].unfinished}
    if answers_alone:
        thoughts |= {k for k in whole if not group.completions[k].answer_ids}
    if drop_truncated or answers_alone:
        whole = [k for k in whole if k not in thoughts]
    if thoughts and (len(whole) < 2 or thoughts.issuperset(whole)):
        return "unfinished_thoughts"
    scores = {k: score for k in whole if (score := judgment.scores[k]) is not None}
    if len(scores) < 2:
        return "unjudged"
    # By text: twins that differ in tokens alone look the same to every judge and every reader.
    seen = {k: _seen(group.completions[k], by_reasoning=by_reasoning) for k in scores}
    first = {seen[k]: k for k in reversed(scores)}
    scores = {k: score for k, score in scores.items() if first[seen[k]] == k}
    return scores if len(scores) >= 2 else "identical"


def _seen(completion: Completion, *, by_reasoning: bool) -> tuple[str, bool]:
    """What a judge sees of it, and whether it is an answer."""
    return completion.whole_text if by_reasoning else completion.text, completion.unfinished

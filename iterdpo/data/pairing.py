"""Groups and judgments in, preference pairs out. Pure.

With scores s_k of the K completions of a prompt, a pair (chosen i, rejected j) needs s_i - s_j > 0 and
s_i - s_j >= `min_margin`, and completions that differ. Ties, abstentions and twins are left out and counted:
a tie trained as if the first had won teaches noise.

A thought without an end is no answer, whatever its score: it may be rejected, but is never chosen.

With completions of another source, one a prompt, one side of each pair is that completion, which has no score.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from statistics import mean, pstdev
from typing import Literal

from iterdpo.seeds import derive_seed
from iterdpo.types import Completion, CompletionGroup, Judgment, PreferencePair

Strategy = Literal["best_worst", "best_random", "best_mean_2sd", "all_pairs"]
Side = Literal["chosen", "rejected"]


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Counts of groups by outcome: `PairCounts(groups=128, kept=121, tied=4, unjudged=2, identical=1, truncated=0, …)`.

    A group that gives at least one pair counts in `groups_paired`; every other counts once, under the first of
    these that leaves it without a pair: `unmatched` (the other source has no completion), `truncated`,
    `unfinished_thoughts`, `unjudged`, `identical`, `tied`. `kept` counts pairs.
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
    unmatched: int = 0

    def __add__(self, later: PairCounts) -> PairCounts:
        """The counts of both: groups may be paired a few at a time."""
        return PairCounts(*map(sum, zip(astuple(self), astuple(later), strict=True)))

    def summary(self) -> str:
        """`kept 121 pairs of 128 groups (4 tied, 2 unjudged, 1 identical)`."""
        reasons = ("tied", "unjudged", "identical", "truncated", "unfinished_thoughts", "unmatched")
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
    others: Sequence[Completion | None] | None = None,
    others_are: Side = "rejected",
    second_is_other: bool = False,
    seed: int = 0,
) -> tuple[list[PreferencePair], PairCounts]:
    """The pairs of each group, in the order of the groups, and the account of what was left out.

    best_worst     the highest score against the lowest
    best_random    the highest score against one of the completions that it beats by the margin, drawn at random
    best_mean_2sd  the highest score against the one of these that is closest to the mean - 2 standard deviations of the
                   prompt's scores (arXiv:2502.16825)
    all_pairs      every two completions that differ by the margin, largest margins first

    Among equal scores the order of sampling decides, except that `best_random` draws from `seed` and the prompt's id.

    With `drop_truncated`, completions that reached the limit of tokens are left out, and thoughts that have no end. With
    `answers_alone`, so are completions whose answer has no token, since nothing of them would be trained on. Completions
    of one text are twins; with `by_reasoning`, those whose reasoning is the same too.

    `others` are completions of another source, one a group, or None. If they are rejected, each group's highest score is
    chosen, and with `all_pairs` every completion. If they are chosen, the strategy says which of the group are rejected,
    of all that have scores. With `second_is_other`, each group has two completions, and the second is another source's.
    """
    pairs: list[PreferencePair] = []
    counts: Counter[str] = Counter(groups=len(groups))
    each = [None] * len(groups) if others is None else others
    for group, judgment, other in zip(groups, judgments, each, strict=True):
        assert group.prompt.id == judgment.prompt_id
        counts["completions_unjudged"] += judgment.scores.count(None)
        counts["completions_truncated"] += sum(completion.truncated for completion in group.completions)
        if others is not None and other is None:
            counts["unmatched"] += 1
            continue
        scores = _candidates(
            group,
            judgment,
            drop_truncated=drop_truncated,
            answers_alone=answers_alone,
            by_reasoning=by_reasoning,
            least=2 if other is None else 1,
        )
        if isinstance(scores, str):
            counts[scores] += 1
            continue
        draw = partial(_draw, seed, group.prompt.id)
        if other is None:
            found = _among(group, scores, strategy=strategy, min_margin=min_margin, draw=draw)
        else:
            unfit = drop_truncated and (other.truncated or other.unfinished)
            if unfit or (answers_alone and not other.answer_ids):
                counts["unfinished_thoughts" if not other.truncated else "truncated"] += 1
                continue
            found = _with_other(
                group, scores, other, side=others_are, strategy=strategy, by_reasoning=by_reasoning, draw=draw
            )
        if isinstance(found, str):
            counts[found] += 1
            continue
        counts["groups_paired"] += 1
        if second_is_other:
            of_other = group.completions[1]
            found = [replace(pair, other="chosen" if pair.chosen is of_other else "rejected") for pair in found]
        pairs.extend(found[:max_pairs_per_prompt])
    return pairs, PairCounts(kept=len(pairs), **counts)


def _among(
    group: CompletionGroup,
    scores: dict[int, float],
    *,
    strategy: Strategy,
    min_margin: float,
    draw: Callable[[], random.Random],
) -> list[PreferencePair] | str:
    """The pairs of the group's own completions, those with the largest margins first; or why there are none."""
    ordered = [(i, j) for i in scores for j in scores if scores[i] > scores[j] and scores[i] - scores[j] >= min_margin]
    if not ordered:
        return "tied"
    ordered = [(i, j) for i, j in ordered if not group.completions[i].unfinished]
    if not ordered:
        return "unfinished_thoughts"
    best = max(scores[i] for i, _ in ordered)
    of_best = [(i, j) for i, j in ordered if scores[i] == best]
    match strategy:
        case "best_worst":
            selected = [max(ordered, key=lambda ij: scores[ij[0]] - scores[ij[1]])]
        case "best_random":
            selected = [draw().choice(of_best)]
        case "best_mean_2sd":
            low = _mean_2sd(scores)
            selected = [min(of_best, key=lambda ij: (abs(scores[ij[1]] - low), scores[ij[1]]))]
        case "all_pairs":
            selected = sorted(ordered, key=lambda ij: scores[ij[1]] - scores[ij[0]])
    ys = group.completions
    return [PreferencePair(group.prompt, group.prompt_ids, ys[i], ys[j], scores[i], scores[j]) for i, j in selected]


def _with_other(
    group: CompletionGroup,
    scores: dict[int, float],
    other: Completion,
    *,
    side: Side,
    strategy: Strategy,
    by_reasoning: bool,
    draw: Callable[[], random.Random],
) -> list[PreferencePair] | str:
    """The pairs of the group's completions with that of another source; or why there are none."""
    ys, same = group.completions, _seen(other, by_reasoning=by_reasoning)
    scores = {k: score for k, score in scores.items() if _seen(ys[k], by_reasoning=by_reasoning) != same}
    if not scores:
        return "identical"
    if side == "rejected":
        if not (finished := [k for k in scores if not ys[k].unfinished]):
            return "unfinished_thoughts"
        ranked = sorted(finished, key=lambda k: -scores[k])
        selected = ranked if strategy == "all_pairs" else ranked[:1]
        return [
            PreferencePair(group.prompt, group.prompt_ids, ys[k], other, scores[k], None, "rejected") for k in selected
        ]
    if other.unfinished:
        return "unfinished_thoughts"
    ranked = sorted(scores, key=lambda k: scores[k])
    match strategy:
        case "best_worst":
            selected = ranked[:1]
        case "best_random":
            selected = [draw().choice(ranked)]
        case "best_mean_2sd":
            low = _mean_2sd(scores)
            selected = [min(ranked, key=lambda k: (abs(scores[k] - low), scores[k]))]
        case "all_pairs":
            selected = ranked
    return [PreferencePair(group.prompt, group.prompt_ids, other, ys[k], None, scores[k], "chosen") for k in selected]


def _draw(seed: int, prompt_id: str) -> random.Random:
    """What a prompt's random choice is drawn by."""
    return random.Random(derive_seed(seed, "pairing", prompt_id))


def _mean_2sd(scores: dict[int, float]) -> float:
    """The mean - 2 standard deviations of the scores themselves, which are no sample of others."""
    return mean(scores.values()) - 2 * pstdev(scores.values())


def _candidates(
    group: CompletionGroup,
    judgment: Judgment,
    *,
    drop_truncated: bool,
    answers_alone: bool,
    by_reasoning: bool,
    least: int,
) -> dict[int, float] | str:
    """The scores of those that may enter a pair: whole, judged, one of each text; or why fewer than `least` are left."""
    whole = [k for k, completion in enumerate(group.completions) if not (drop_truncated and completion.truncated)]
    if drop_truncated and len(whole) < least:
        return "truncated"
    thoughts = {k for k in whole if group.completions[k].unfinished}
    if answers_alone:
        thoughts |= {k for k in whole if not group.completions[k].answer_ids}
    if drop_truncated or answers_alone:
        whole = [k for k in whole if k not in thoughts]
    if thoughts and (len(whole) < least or thoughts.issuperset(whole)):
        return "unfinished_thoughts"
    scores = {k: score for k in whole if (score := judgment.scores[k]) is not None}
    if len(scores) < least:
        return "unjudged"
    # By text: twins that differ in tokens alone look the same to every judge and every reader.
    seen = {k: _seen(group.completions[k], by_reasoning=by_reasoning) for k in scores}
    first = {seen[k]: k for k in reversed(scores)}
    scores = {k: score for k, score in scores.items() if first[seen[k]] == k}
    return scores if len(scores) >= least else "identical"


def _seen(completion: Completion, *, by_reasoning: bool) -> tuple[str, bool]:
    """What a judge sees of it, and whether it is an answer."""
    return completion.whole_text if by_reasoning else completion.text, completion.unfinished

"""What all judges are made with: abstentions with a reason, and checks of arguments."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import judgment_from_scores
from iterdpo.types import CompletionGroup, Judgment


class Abstention(str):
    """Why there is no score: `Abstention("TimeoutError: 30 s")` takes the place of a raw score."""


def judgment_from_outcomes(group: CompletionGroup, outcomes: Sequence[object]) -> Judgment:
    """`judgment_from_scores`, but an `Abstention` among the raw scores gives its own reason."""
    judgment = judgment_from_scores(group, outcomes)
    own = [str(o) if isinstance(o, Abstention) else None for o in outcomes]
    return replace(judgment, abstentions=[a or b for a, b in zip(own, judgment.abstentions, strict=True)])


def judgments_from_outcomes(groups: Sequence[CompletionGroup], outcomes: Iterable[object]) -> list[Judgment]:
    """`judgment_from_outcomes` of each group; `outcomes` are those of all completions, one group after the other."""
    rest = iter(outcomes)
    return [judgment_from_outcomes(g, list(itertools.islice(rest, len(g.completions)))) for g in groups]


def check_choice(what: str, name: str, value: object, choices: Collection[object]) -> None:
    """Refuse a `value` that is not one of `choices`. `what` begins the message: `"judge 'pairwise'"`."""
    if value not in choices:
        raise JudgeError(f"{what}: {name} is {value!r}; it is one of {', '.join(map(str, choices))}")


def is_number(value: object) -> bool:
    """Whether it is a finite int or float. True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def nearest(wrong: str, known: Iterable[str], listing: str) -> str:
    """`did you mean 'x'?`, or everything that is known, after `listing`."""
    known = list(known)
    near = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"{listing}: {', '.join(known) or 'nothing'}"

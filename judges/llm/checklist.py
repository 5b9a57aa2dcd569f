"""Rubrics per prompt: a column of weighted items that a language model checks one by one.

    {"prompt": "I cut my finger. What now?",
     "rubrics": [{"criterion": "Says to press a clean cloth on the cut", "points": 5},
                 {"criterion": "Recommends butter or toothpaste", "points": -8}]}

The score is the sum of the points of the items that a completion meets, divided by the sum of all points above 0: at
most 1, and below 0 if faults outweigh. HealthBench (arXiv:2505.08775) scores an example so, and clips the mean of many.
Items may have HealthBench's keys, those of Rubrics as Rewards (arXiv:2507.17746), or be texts.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from iterdpo.types import CompletionGroup, Judgment, Prompt
from judges.base import Abstention, is_number, judgment_from_outcomes
from judges.llm.judges import LLMJudge
from judges.llm.parsing import OPEN, SHUT, Form, Unclear, frame_of, only_explains, read_with

TEXT = ("criterion", "description", "title")
WEIGHT = ("points", "weight")
"""Keys of an item, the first that it has."""
BOTH = Unclear("both yes and no")
SCHEMA = {
    "type": "object",
    "properties": {"met": {"type": "boolean"}},
    "required": ["met"],
    "additionalProperties": False,
}
_FRAME = frame_of(
    r"(?:criteri(?:on|a)\s+)?met(?!\s*\Z)|satisfied|(?P<weak>criterion|verdict|answer|decision|conclusion)"
)
_SAYS = re.compile(
    rf"(?i){OPEN}(?:(?P<yes>yes|true|met)|no|false|not met|unmet|(?:the|this)\s+(?:completion|response|answer)\s+"
    rf"(?:(?P<meets>meets)|does(?:\s+not|n['’]t)\s+meet|fails)\s+(?:the|this)\s+criterion)(?!\w){SHUT}"
)


class Item(NamedTuple):
    """`Item("Says to press a clean cloth on the cut", 5.0)`; negative weights are those of faults."""

    text: str
    weight: float


@dataclass(kw_only=True, eq=False, repr=False)
class ChecklistJudge(LLMJudge):
    """The weighted share of the items of a prompt's rubric that a completion meets. Each item is a call.

    Abstentions: a prompt without a rubric, one that cannot be read or has no weight above 0, and a completion with an
    item that could not be judged, since a share of fewer items is not comparable. Each judgment's `details["met"]` has
    for each completion a list of true, false or null, an item each.
    """

    kind = "checklist"
    statement = "Met"
    prompt: str = "checklist"
    column: str = "rubrics"
    """The prompt's column with the items."""

    async def _judge_group(self, group: CompletionGroup) -> Judgment:
        items = read_rubric(group.prompt.columns.get(self.column), self.column)
        if isinstance(items, Abstention):
            return judgment_from_outcomes(group, [items] * len(group.completions))
        asked = [self._check(group.prompt, c.text, item) for c in group.completions for item in items]
        said = list(await asyncio.gather(*asked))
        answers = [said[i : i + len(items)] for i in range(0, len(said), len(items))]
        judgment = judgment_from_outcomes(group, [_score(items, met) for met in answers])
        judgment.details["met"] = [[None if isinstance(m, Unclear) else m for m in met] for met in answers]
        return judgment

    async def _check(self, prompt: Prompt, completion: str, item: Item) -> bool | Unclear:
        values = {**self._values(prompt), "completion": completion, "criterion": item.text}
        form = self._limits(choices=["yes", "no"], schema=SCHEMA)
        return await self._ask(self._whole(parse_met), values, **form)


def read_rubric(value: Any, column: str) -> list[Item] | Abstention:
    """The items in a prompt's column: a list of texts, or of mappings with a text and a weight (1 by default); also as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value] if value.strip() else None
    if value is None or value == []:
        return Abstention(f"the prompt's column {column!r} is missing or empty")
    if not isinstance(value, list):
        return Abstention(f"the prompt's column {column!r} is no list of items")
    items = []
    for number, given in enumerate(value, 1):
        item = {"criterion": given} if isinstance(given, str) else given
        if not isinstance(item, dict):
            return Abstention(f"the prompt's column {column!r}: item {number} is neither a text nor a mapping")
        text = next((item[key] for key in TEXT if item.get(key)), None)
        weight = next((item[key] for key in WEIGHT if item.get(key) is not None), 1)
        if not isinstance(text, str) or not text.strip():
            return Abstention(f"the prompt's column {column!r}: item {number} has no text; name it {TEXT[0]!r}")
        if not is_number(weight) or weight == 0:
            return Abstention(
                f"the prompt's column {column!r}: item {number}: its weight must be a number other than 0"
            )
        items.append(Item(text, float(weight)))
    if not any(item.weight > 0 for item in items):
        return Abstention(f"the prompt's column {column!r} has no item with a weight above 0")
    return items


def _score(items: Sequence[Item], met: Sequence[bool | Unclear]) -> float | Abstention:
    if (unclear := next((m for m in met if isinstance(m, Unclear)), None)) is not None:
        return Abstention(f"an item of the rubric: {unclear}")
    points = sum(item.weight for item, yes in zip(items, met, strict=True) if yes)
    return points / sum(item.weight for item in items if item.weight > 0)


def parse_met(reply: str) -> bool | Unclear:
    """Whether a reply says that the criterion is met.

    Read are JSON with a key such as `met`, `Met: yes`, `No.`, `Yes, because …`, and `The criterion is not met.`
    """
    return read_with(reply, lambda text: _FORM.decide(_FORM.lines(text)), several=BOTH)


def _said(text: str, concludes: bool = False) -> bool | Unclear | None:
    """What a sentence says, or what stands after `Met: `."""
    if (found := _SAYS.match(text)) is None:
        return None
    yes, rest = bool(found["yes"] or found["meets"]), text[found.end() :]
    if re.search(rf"(?i)\b(?:{'no|not met|unmet|false' if yes else 'yes|true|(?<!not )met'})\b", rest):
        return BOTH
    unsure = re.search(r"(?i)\b(?:but|however|partly|partially|in part)\b", rest) or not only_explains(rest)
    return None if unsure else yes


_FORM: Form[bool] = Form("answer", BOTH, _FRAME, _said, re.compile("(?!)"), _said)

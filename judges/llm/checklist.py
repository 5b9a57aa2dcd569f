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
from judges.llm.parsing import Unclear, read_with

TEXT = ("criterion", "description", "title")
WEIGHT = ("points", "weight")
"""Keys of an item, the first that it has."""
NOTHING = Unclear("neither yes nor no")
BOTH = Unclear("both yes and no")
SCHEMA = {
    "type": "object",
    "properties": {"met": {"type": "boolean"}},
    "required": ["met"],
    "additionalProperties": False,
}
_KEYS = ("met", "criteria_met", "criterion_met", "verdict", "answer", "satisfied")
_SAYS = {"yes": True, "true": True, "met": True, "no": False, "false": False, "not met": False, "unmet": False}
_SAID = "|".join(sorted(_SAYS, key=len, reverse=True))
_STATEMENT = re.compile(
    rf"(?:(?:(?:my|the|final)\s+)*(?:met|verdict|answer|criteri(?:on|a) met|decision|conclusion)\s*(?::|=|\bis\b)\s*)?"
    rf"[\"'(\[]?(?P<said>{_SAID})[\"')\]]?(?P<rest>[.!]?|(?:[.,;:!]|\s[-–—(]|\s+(?:because|since|as)\b).*)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?:(?:so|thus|therefore|hence|overall)\W+)?(?:the\s+criterion\s+is\s+(?P<not>not\s+)?met"
    r"|(?:the|this)\s+(?:completion|response|answer)\s+(?:meets|(?P<fails>does(?:\s+not|n['’]t)\s+meet|fails))\s+(?:the|this)"
    r"\s+criterion)[.!]?",
    re.IGNORECASE,
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

    Read are JSON with a key such as `met`, and a statement that is the last line, or the first with the reasons after it:
    `Met: yes`, `No.`, `Yes, because …`, `The criterion is not met.` Two next to each other that differ are Unclear, and
    so is everything else.
    """
    return read_with(reply, _met, several=BOTH)


def _met(text: str) -> bool | Unclear:
    lines = [re.sub(r"^[\s#*_`-]+|[\s*_`]+$", "", line.replace("**", "")) for line in _plain(text).splitlines()]
    said = [_line(line) for line in lines if line]
    if not said:
        return NOTHING
    if said[-1] is not None:
        return BOTH if said[-2:-1] == [not said[-1]] else said[-1]
    if said[0] is None or not all(s is None for s in said[1:]):
        return NOTHING  # a statement elsewhere may be a quotation
    return said[0]


def _line(line: str) -> bool | None:
    if sentence := _SENTENCE.fullmatch(line):
        return not (sentence["not"] or sentence["fails"])
    if (match := _STATEMENT.fullmatch(line)) is None:
        return None
    said = _SAYS[match["said"].casefold()]
    takes_back = re.search(
        rf"\b(?:{'no|not met|false' if said else 'yes|true'}|but|however|wait)\b", match["rest"], re.IGNORECASE
    )
    return None if takes_back else said


def _plain(text: str) -> str:
    """The text with a line `Met: yes` for each JSON object that says so."""
    decoder, done, position = json.JSONDecoder(), "", 0
    for found in re.finditer(r"\{", text):
        if found.start() < position:
            continue
        try:
            value, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        given = next((value[key] for key in _KEYS if key in value), None)
        said = given if isinstance(given, bool) else _SAYS.get(str(given).casefold())
        if said is not None:
            done += f"{text[position : found.start()]}\nMet: {'yes' if said else 'no'}\n"
            position = end
    return done + text[position:]

"""The order in which a reply ranks completions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from judges.llm.parsing.text import (
    CUT_OFF,
    NOUN,
    OPEN,
    PLACEHOLDER,
    SHUT,
    Form,
    Scope,
    Unclear,
    decide,
    frame_of,
    lines_of,
    read_with,
)

NO_RANKING = Unclear("no ranking")
SEVERAL_RANKINGS = Unclear("several rankings")
UNREADABLE_RANKING = Unclear("an unreadable ranking")
TIED_RANKING = Unclear("a tie in the ranking")
NOT_ALL_RANKED = Unclear("not every completion ranked once")
_FRAME = frame_of(
    r"(?:rankings?|ranked list|rank order|order|result|排名|排序|(?:from\s+)?best to worst)\b"
    r"(?:(?!worst\s+(?:first|to)|ascending)[^:\n\"0-9]){0,60}?",
    r":|(?=\(worst)",
)
_LABEL = rf"{OPEN}(?:{NOUN}\s*)?#?([0-9]{{1,3}}|[A-Z])(?!\w){SHUT}"
_LISTED = re.compile(rf"(?:{_LABEL}[,;>=<~≈]+\s*)+{_LABEL}")
_PLACE = re.compile(rf"(?:#|rank\s+)?([0-9]{{1,3}})(?:st|nd|rd|th)?\s*[.):-]\s*{_LABEL}", re.IGNORECASE)
_KEYS = ("final ranking", "ranking", "order", "ranked", "rankings", "rank")


def parse_ranking(reply: str, count: int) -> list[int] | Unclear:
    """The `count` completions as shown, by index from 0, best first: `Ranking: 2 > 1 > 3` is `[1, 0, 2]`.

    Labels are numbers from 1 or letters from A. Separators are `>`, `,`, `;` and `->`; `<` and `=` are Unclear. JSON
    lists and numbered lines (`1. Completion 2`) are read too, if nothing follows the labels: else they may be a
    discussion, one completion after the other.
    """
    return read_with(reply, lambda text: _ranking_in(text, count), contradiction=SEVERAL_RANKINGS)


def _ranking_in(text: str, count: int) -> list[int] | Unclear:
    value = partial(_value, count=count)

    def bare(line: str, scope: Scope) -> list[int] | Unclear | None:
        ranking = value(line)
        return ranking if not isinstance(ranking, Unclear) or _LISTED.fullmatch(line) else None

    form = Form(_FRAME, _fields, value, bare, NO_RANKING, UNREADABLE_RANKING, SEVERAL_RANKINGS)
    lines = lines_of(text, form)
    decided = decide(lines, form)
    places = [place.groups() for line in lines if (place := _PLACE.fullmatch(line))]
    numbered = _permutation([label for _, label in places], count)
    if [number for number, _ in places] != [str(k + 1) for k in range(count)] or isinstance(numbered, Unclear):
        return decided
    if decided in (NO_RANKING, CUT_OFF):
        return numbered
    return decided if isinstance(decided, Unclear) or decided == numbered else SEVERAL_RANKINGS


def _fields(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if key := next((key for key in _KEYS if key in found), None):
        ranking = found[key]
        yield "Ranking", " > ".join(map(str, ranking)) if isinstance(ranking, list) else ranking


def _value(text: str, count: int) -> list[int] | Unclear:
    """What stands after `Ranking: `."""
    text = re.split(r"\s+(?:because|since)\b", text.strip())[0].rstrip(" .!。")
    if re.search(r"[=~≈]", text.replace("=>", "")):
        return TIED_RANKING
    if not text.strip(" [](){}\"'"):
        return CUT_OFF
    parts = re.split(r"\s*(?:=>|->|→|>+|≻|,?\s+and\s+|,|;)\s*", text.strip(" [](){}\"'"))
    labels = [label[1] for part in parts if (label := re.fullmatch(_LABEL, part))]
    if len(labels) < len(parts):
        return NO_RANKING if re.fullmatch(PLACEHOLDER, text) else UNREADABLE_RANKING
    return _permutation(labels, count)


def _permutation(labels: list[str], count: int) -> list[int] | Unclear:
    numbers = [str(i + 1) for i in range(count)]
    letters = [chr(ord("A") + i) for i in range(min(count, 26))]
    for shown in (numbers, letters):
        if sorted(labels) == sorted(shown):
            return [shown.index(label) for label in labels]
    known = set(labels) <= set(numbers) or set(labels) <= set(letters)
    return NOT_ALL_RANKED if known else UNREADABLE_RANKING

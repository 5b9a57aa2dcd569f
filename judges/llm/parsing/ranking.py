"""The order in which a reply ranks completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from judges.llm.parsing.text import (
    CUT_OFF,
    NOUN,
    OPEN,
    SHUT,
    Unclear,
    decide,
    in_line,
    is_stated,
    lines_of,
    read_with,
    unwrapped,
)

NO_RANKING = Unclear("no ranking")
SEVERAL_RANKINGS = Unclear("several rankings")
UNREADABLE_RANKING = Unclear("an unreadable ranking")
TIED_RANKING = Unclear("a tie in the ranking")
NOT_ALL_RANKED = Unclear("not every completion ranked once")
_RANKING = re.compile(
    r"(?<![\w\"'“‘])(?:(?:my|the|final|overall|complete)\s+)*(?:ranking|rankings|ranked list|rank order|order|排名|排序"
    r"|(?:from\s+)?best to worst)\b(?P<how>[^:\n\"0-9]{0,60}?)\s*(?:is\s*:?|:|=>|->|→|=)\s*",
    re.IGNORECASE,
)
_RANKING_HEADING = re.compile(
    r"(?:[^:\n]{0,80}\b(?:rank\w*|best to worst|order)\b[^:\n]{0,40}|.{0,20}(?:排名|排序).{0,20}):?", re.IGNORECASE
)
_RANKED = re.compile(rf"{OPEN}(?:{NOUN}\s*)?#?([0-9]{{1,3}}|[A-Z]){SHUT}")
_PLACE = re.compile(
    rf"\s*(?:#|rank\s+)?([0-9]{{1,3}})(?:st|nd|rd|th)?(?:\s+place)?\s*[.):\-]\s*{OPEN}"
    rf"(?:(?P<noun>{NOUN})\s*#?)?([0-9]{{1,3}}|[A-Z])(?!\w){SHUT}(?P<rest>.*)",
    re.IGNORECASE,
)
_RANKING_KEYS = ("final ranking", "ranking", "order", "ranked", "rankings", "rank")


def parse_ranking(reply: str, count: int) -> list[int] | Unclear:
    """The `count` completions as shown, by index from 0, best first: `Ranking: 2 > 1 > 3` is `[1, 0, 2]`.

    Labels are numbers from 1 or letters from A. Separators are `>`, `,`, `;` and `->`; `<` and `=` are Unclear. JSON
    lists and numbered lines (`1. Completion 2`) are read too. Numbered lines with words after the label, in the order
    shown and under no heading that speaks of a ranking, are Unclear: they may be a discussion, one completion after
    the other.
    """
    return read_with(reply, lambda text: _ranking_in(text, count), contradiction=SEVERAL_RANKINGS)


def _ranking_in(text: str, count: int) -> list[int] | Unclear:
    def spell(value: dict[str, Any]) -> list[str]:
        key = next((key for key in _RANKING_KEYS if key in value), None)
        if key is None:
            return []
        ranking = value[key]
        listed = isinstance(ranking, list) and all(isinstance(r, str | int) for r in ranking)
        return [f"Ranking: {' > '.join(map(str, ranking)) if listed else in_line(ranking)}"]

    def explicit(line: str) -> list[int] | Unclear | None:
        frames = list(_RANKING.finditer(line))
        if not frames or not is_stated(line[: frames[0].start()]):
            return None
        if len(frames) > 1:
            return SEVERAL_RANKINGS
        value = line[frames[0].end() :]
        if re.search(r"worst\s+(?:first|to)|ascending", line, re.IGNORECASE):
            return UNREADABLE_RANKING
        if re.fullmatch(r"<[^<>]*>[.]?|\.\.\.|\[[a-z ,.]+\]", value):
            return None
        return _ranking_value(value, count, spaced=True)

    def bare(line: str) -> list[int] | None:
        value = _ranking_value(line, count, spaced=False)
        return None if isinstance(value, Unclear) else value

    lines = lines_of(unwrapped(text, spell))
    numbered = _numbered(lines, count)
    heading = re.compile(r"(?:(?:my|the|final|overall)\s+)*ranking\s*:?", re.IGNORECASE)
    if numbered is not None:
        said = [value for line in lines if (value := explicit(line)) is not None and not line.endswith(":")]
        if not said:
            return numbered
    decided = decide(lines, explicit, bare, heading=heading, none=NO_RANKING, contradiction=SEVERAL_RANKINGS)
    if decided == NO_RANKING and lines:
        value = _ranking_value(lines[-1], count, spaced=False)
        listed = re.fullmatch(rf"(?:{_RANKED.pattern}\s?[>,;=<~≈]+){{1,99}}{_RANKED.pattern}", lines[-1])
        return value if listed and isinstance(value, Unclear) else decided
    return decided


def _ranking_value(text: str, count: int, *, spaced: bool) -> list[int] | Unclear:
    text = re.split(r"\s+(?:because|since)\b|\.\s+(?=[A-Z][a-z])|\s\((?=[a-z]{3})", text.strip())[0].rstrip(" .!。")
    if not text:
        return CUT_OFF
    if re.search(r"[=~≈]", text.replace("=>", "")):
        return TIED_RANKING
    text = text.strip(" [](){}\"'")
    parts = re.split(r"\s*(?:=>|->|→|>+|≻|,?\s+and\s+|,|;)\s*", text)
    if len(parts) == 1 and spaced:
        parts = text.split()
    labels = [_RANKED.fullmatch(part) for part in parts]
    if not all(labels):
        return UNREADABLE_RANKING
    return _permutation([label[1] for label in labels if label], count)


def _permutation(labels: Sequence[str], count: int) -> list[int] | Unclear:
    numbers = [str(i + 1) for i in range(count)]
    letters = [chr(ord("A") + i) for i in range(min(count, 26))]
    for shown in (numbers, letters):
        if sorted(labels) == sorted(shown):
            return [shown.index(label) for label in labels]
    known = set(labels) <= set(numbers) or set(labels) <= set(letters)
    return NOT_ALL_RANKED if known else UNREADABLE_RANKING


def _numbered(lines: list[str], count: int) -> list[int] | None:
    """The ranking of lines `1. Completion 2`, if there are `count` of them, numbered so, and no others."""
    places = [(i, match) for i, line in enumerate(lines) if (match := _PLACE.fullmatch(line))]
    if [match[1] for _, match in places] != [str(k + 1) for k in range(count)] or count < 2:
        return None
    for _, match in places:
        if not match["noun"] and not re.match(r"\s*(?:[:(,.–—]|-\s|$)", match["rest"]):
            return None  # "1. A good answer", "2. 3 mistakes"
    ranking = _permutation([match[3] for _, match in places], count)
    if isinstance(ranking, Unclear):
        return None
    first = places[0][0]
    headed = first > 0 and bool(_RANKING_HEADING.fullmatch(lines[first - 1]))
    discussion = ranking == list(range(count)) and any(match["rest"].strip(" .") for _, match in places)
    return ranking if headed or not discussion else None

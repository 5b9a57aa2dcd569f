"""The scores that a reply gives, and the order in which it ranks completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from judges.llm.parsing import NOUN, OPEN, SHUT, Form, Unclear, frame_of, only_explains, read_with

SEVERAL_SCORES, SEVERAL_RANKINGS = Unclear("several scores"), Unclear("several rankings")
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?"
_GIVING = r"(?:i|we)(?:['’]d|\s+would|\s+will)?\s+(?:give|rate|score|assign)\b[^.0-9]{0,60}"
_SCORED = re.compile(
    rf"(?i)(?:{_GIVING}\s)?{OPEN}(?P<score>{_NUMBER}){SHUT}(?:[(\[]?(?:/|out\s+of|von|sur|de|из)\s*(?P<of>{_NUMBER}))?"
    rf"\s*(?:(?P<percent>%)|points?|stars?|分)?(?![\w%+/½¼¾]){SHUT}"
)
_ANOTHER = re.compile(r"(?i)\s*(?:or|to|and|bis|[-–—~→>,;.:]+)\s*[-+]?[0-9]")
_NAMES = r"scores?|ratings?|overall|result|grade|punktzahl|bewertung|puntuaci[oó]n|not[ae]|оценка|评分|得分|分数|スコア"
_ORDER = frame_of(
    r"(?:rankings?|ranked list|rank order|order|result|排名|排序|(?:from\s+)?best to worst)\b"
    r"(?:(?!worst\s+(?:first|to)|ascending)[^:\n\"0-9]){0,60}?",
    r":|(?=\(worst)",
)
_LABEL = rf"{OPEN}(?:{NOUN}\s*)?#?([0-9]{{1,3}}|[A-Z])(?!\w){SHUT}"
_LISTED = re.compile(rf"(?:{_LABEL}[,;>=<~≈→-]+\s*)+{_LABEL}")
_PLACE = re.compile(rf"(?:#|rank\s+)?([0-9]{{1,3}})(?:st|nd|rd|th)?\s*[.):-]\s*{_LABEL}", re.IGNORECASE)


def parse_scores(reply: str, criteria: Sequence[str], *, low: float, high: float) -> dict[str, float] | Unclear:
    """The score on each criterion, from `low` to `high`.

    A single one may be called `Score` or `Rating`, or be a last line of a number alone; several are named: lines, or JSON.
    `7/10` is Unclear on a scale that ends elsewhere, and so are `7 or 8`, `7-8`, `about 7`, `7,5`, and a number off the scale.
    """
    names = [re.escape(" ".join(criterion.replace("_", " ").split())) for criterion in criteria]
    words = [f"(?P<named>{name})" for name in names] if len(names) > 1 else [f"{names[0]}|{_NAMES}|{_GIVING}(?=:|\\Z)"]
    frames = [frame_of(rf"(?:{word})(?:\s+(?:score|rating))?", r":|\|") for word in words]
    label = re.compile("(?!)" if len(names) > 1 else f"{_SCORED.pattern}[.!]?")
    apart = re.compile(rf"(?:[,;|]|(?<=[0-9])\s+and)\s+(?=(?:{'|'.join(names)})\b)", re.IGNORECASE)

    def parse(text: str) -> dict[str, float] | Unclear:
        text = apart.sub("\n", text) if len(names) > 1 else text
        said: dict[str, float | Unclear] = {}
        for criterion, frame in zip(criteria, frames, strict=True):
            form = Form("score", SEVERAL_SCORES, frame, partial(_number, low=low, high=high), label)
            lines = [line for line in form.lines(text) if not any(f.match(line) for f in frames if f is not frame)]
            said[criterion] = form.decide(lines)
        missing = [criterion for criterion, score in said.items() if score == "no score"]
        if 0 < len(missing) < len(said):
            return Unclear(f"no score for {missing[0]}")
        unclear = next((score for score in said.values() if isinstance(score, Unclear)), None)
        return unclear or {c: score for c, score in said.items() if not isinstance(score, Unclear)}

    return read_with(reply, parse, several=SEVERAL_SCORES)


def parse_ranking(reply: str, count: int) -> list[int] | Unclear:
    """The `count` completions as shown, by index from 0, best first: `Ranking: 2 > 1 > 3` is `[1, 0, 2]`.

    Labels are numbers from 1 or letters from A, separated by `>`, `,`, `;` or `->`; `<` and `=` are Unclear. JSON lists
    are read too, and numbered lines of nothing but labels: others may discuss one completion after the other.
    """
    form = Form("ranking", SEVERAL_RANKINGS, _ORDER, partial(_ranking, count=count), _LISTED)

    def parse(text: str) -> list[int] | Unclear:
        lines = form.lines(text)
        places = [place.groups() for line in lines if (place := _PLACE.fullmatch(line))]
        if [number for number, _ in places] == [str(k + 1) for k in range(count)]:
            lines = [line for line in lines if not _PLACE.fullmatch(line)]
            lines.append(" > ".join(name for _, name in places))
        return form.decide(lines)

    return read_with(reply, parse, several=SEVERAL_RANKINGS)


def _number(text: str, low: float, high: float) -> float | Unclear | None:
    """What stands after `Score: `."""
    if re.fullmatch(rf"{OPEN}{low:g}\s*(?:-|–|to)\s*{high:g}{SHUT}[.\s]*", text):
        return Unclear("no score")
    if not (match := _SCORED.match(text)):
        return None
    rest = text[match.end() :]
    # "7 - 8": what looks like the end of the number may be the beginning of a range.
    if _ANOTHER.match(rest):
        return SEVERAL_SCORES
    if not only_explains(rest):
        return None
    if (match["of"] and float(match["of"]) != high) or (match["percent"] and high != 100):
        return Unclear("a score on another scale")
    score = float(match["score"])
    return score if low <= score <= high else Unclear("a score off the scale")


def _ranking(text: str, count: int) -> list[int] | Unclear | None:
    """What stands after `Ranking: `."""
    text = re.split(r"\s+(?:because|since)\b", text)[0].rstrip(" .!。")
    if re.search(r"[=~≈]", text.replace("=>", "")):
        return Unclear("a tie in the ranking")
    parts = re.split(r"\s*(?:=>|->|→|>+|≻|,?\s+and\s+|,|;)\s*", text.strip(" [](){}\"'"))
    labels = [label[1] for part in parts if (label := re.fullmatch(_LABEL, part))]
    if len(labels) < len(parts):
        return None
    numbers, letters = [str(k + 1) for k in range(count)], [chr(ord("A") + k) for k in range(min(count, 26))]
    shown = next((shown for shown in (numbers, letters) if set(labels) <= set(shown)), [])
    if sorted(labels) == sorted(shown):
        return [shown.index(label) for label in labels]
    return Unclear("not every completion ranked once") if shown else None

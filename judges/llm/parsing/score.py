"""The scores that a reply gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from judges.llm.parsing.text import (
    CUT_OFF,
    FENCE,
    INTRO,
    OPEN,
    QUOTED,
    SHUT,
    TURN,
    Unclear,
    decide,
    in_line,
    is_stated,
    lines_of,
    read_with,
    unwrapped,
)

NO_SCORE = Unclear("no score")
SEVERAL_SCORES = Unclear("several scores")
UNREADABLE_SCORE = Unclear("an unreadable score")
OFF_SCALE = Unclear("a score off the scale")
OTHER_SCALE = Unclear("a score on another scale")
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?"
_SCORED = re.compile(
    rf"{OPEN}(?P<score>{_NUMBER}){SHUT}(?:(?:/|out\s+of|von|sur|de|из)\s*(?P<of>{_NUMBER}))?\s*(?:(?P<percent>%)|points?|stars?|分)?"
    rf"(?![\w%+/½¼¾]){SHUT}",
    re.IGNORECASE,
)
_ANOTHER = re.compile(r"\s*(?:or|to|and|bis|[-–—~→>,;.:]+)\s*[-+]?[0-9]", re.IGNORECASE)
_GENERIC = (
    r"scores?|ratings?|grade|mark|punktzahl|bewertung|puntuación|puntuacion|note|nota|оценка|评分|得分|分数|スコア"
)
_GIVEN = re.compile(r"(?:i|we)(?:['’]d|\s+would|\s+will)?\s+(?:give|rate|score|assign)\b[^.0-9]{0,60}\s", re.IGNORECASE)


def parse_scores(reply: str, criteria: Sequence[str], *, low: float, high: float) -> dict[str, float] | Unclear:
    """The score on each criterion, from `low` to `high`.

    Of a single criterion, `Score: 7` and `Rating: 7` are it, whatever its name, and so is a last line of a number
    alone; of several, each is named: lines `Helpfulness: 7`, or JSON. `7/10` and `7 out of 10` are read on a scale to
    10, and Unclear on any other. So are `7 or 8`, `7-8`, `about 7`, `seven`, `7,5`, and a number off the scale.
    """
    if len(criteria) == 1:
        score = read_with(reply, lambda text: _score_in(text, criteria[0], low, high), contradiction=SEVERAL_SCORES)
        return score if isinstance(score, Unclear) else {criteria[0]: score}
    return read_with(reply, lambda text: _scores_in(text, criteria, low, high), contradiction=SEVERAL_SCORES)


def _score_in(text: str, criterion: str, low: float, high: float) -> float | Unclear:
    name = _spaced(criterion)
    generic = {"score", "rating", "final score", "overall score", "overall", "overall rating"}

    def spell(value: dict[str, Any]) -> list[str]:
        values = _flat_scores(value)
        keys = [key for key in values if key == name] or [key for key in values if key in generic]
        return [f"Score: {in_line(values[key])}" for key in keys]

    words = rf"{re.escape(name)}|{_GENERIC}"
    frame, heading = (
        _score_frame(words),
        re.compile(rf"(?:(?:my|the|final|overall|total)\s+)*(?:{words})\s*:?", re.IGNORECASE),
    )
    tag = re.compile(rf"<({words}|final_score)>([^<>]{{0,50}})</\1>", re.IGNORECASE)

    def explicit(line: str) -> float | Unclear | None:
        frames = list(frame.finditer(line))
        if not frames or not is_stated(line[: frames[0].start()]):
            return None
        ends = [f.start() for f in frames[1:]] + [len(line)]
        values = [_number(line[f.end() : end], low, high) for f, end in zip(frames, ends, strict=True)]
        return values[0] if all(value == values[0] for value in values) else SEVERAL_SCORES

    def bare(line: str) -> float | None:
        given = _GIVEN.match(line)
        value = _SCORED.fullmatch(line.rstrip(".!"), given.end() if given else 0)
        number = _number(value[0], low, high) if value else None
        return None if isinstance(number, Unclear) else number

    text = tag.sub(
        lambda m: f"\nScore: {m[2].strip()}\n" if is_stated(text[: m.start()].rpartition("\n")[2]) else QUOTED, text
    )
    lines = [line for line in lines_of(unwrapped(text, spell)) if not _placeholder(line, frame, low, high)]
    last = next((_SCORED.fullmatch(line) for line in reversed(lines) if line != FENCE), None)
    none = _number(last[0], low, high) if last else NO_SCORE
    return decide(
        lines,
        explicit,
        bare,
        heading=heading,
        none=none if isinstance(none, Unclear) else NO_SCORE,
        contradiction=SEVERAL_SCORES,
    )


def _scores_in(text: str, criteria: Sequence[str], low: float, high: float) -> dict[str, float] | Unclear:
    names = {_spaced(criterion): criterion for criterion in criteria}
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))  # "clarity of style" first
    frame = _score_frame(rf"(?P<criterion>{either})")
    apart = re.compile(rf"(?:[,;|]|(?<=[0-9])\s+(?:and\s+)?)\s*(?=(?:{either})\b)", re.IGNORECASE)

    def spell(value: dict[str, Any]) -> list[str]:
        values = _flat_scores(value)
        return [f"{name}: {in_line(values[name])}" for name in names if name in values]

    found: dict[str, list[tuple[int, float | Unclear]]] = {criterion: [] for criterion in criteria}
    pieces = [piece for line in lines_of(unwrapped(text, spell)) for piece in apart.split(line)]
    for position, piece in enumerate(pieces):
        match = frame.search(piece)
        if match and is_stated(piece[: match.start()]) and not _placeholder(piece, frame, low, high):
            found[names[_spaced(match["criterion"])]].append((position, _number(piece[match.end() :], low, high)))
    missing = [criterion for criterion, said in found.items() if not said]
    if missing:
        return NO_SCORE if len(missing) == len(criteria) else Unclear(f"no score for {missing[0]}")
    # A judge that begins anew states every criterion again; one that it states twice in one list is a contradiction.
    earlier = [(at, value != said[-1][1]) for said in found.values() for at, value in said[:-1]]
    if any(differs for _, differs in earlier):
        equally_often = len({len(said) for said in found.values()}) == 1
        if not equally_often or max(earlier)[0] > min(said[-1][0] for said in found.values()):
            return SEVERAL_SCORES
    scores: dict[str, float] = {}
    for criterion, said in found.items():
        value = said[-1][1]
        if isinstance(value, Unclear):
            return value
        scores[criterion] = value
    return scores


def _score_frame(words: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?<![\w\"'“‘-])(?:(?:my|the|final|overall|total)\s+)*(?:{words})(?:\s+(?:score|rating))?\s*(?:\([^()]{{0,60}}\)\s*)?"
        r"(?:is(?!\w)\s*:?|:|=>|->|→|=|\||\s[-–—]\s)\s*",
        re.IGNORECASE,
    )


def _flat_scores(value: dict[str, Any]) -> dict[str, Any]:
    """`{"scores": {"Clarity": {"score": 7, …}}}` as `{"clarity": 7}`."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and key in ("scores", "ratings", "criteria", "evaluation"):
            flat |= _flat_scores({_spaced(str(k)): v for k, v in inner.items()})
        elif isinstance(inner, dict):
            flat[key] = inner.get("score", inner.get("rating"))
        else:
            flat[key] = inner
    return flat


def _number(text: str, low: float, high: float) -> float | Unclear:
    text = text.strip()
    match = _SCORED.match(text)
    if not match:
        return UNREADABLE_SCORE if text.strip(" .:-") else CUT_OFF
    rest = text[match.end() :]
    # "7 - 8": what looks like the end of the number may be the beginning of a range.
    if _ANOTHER.match(rest):
        return SEVERAL_SCORES
    if not re.fullmatch(r"[.!。,;|]?", rest) and (not INTRO.match(rest) or "?" in rest or rest.startswith("..")):
        return UNREADABLE_SCORE
    if TURN.search(rest):
        return Unclear("a score taken back")
    if (match["of"] and float(match["of"]) != high) or (match["percent"] and high != 100):
        return OTHER_SCALE
    score = float(match["score"])
    return score if low <= score <= high else OFF_SCALE


def _placeholder(line: str, frame: re.Pattern[str], low: float, high: float) -> bool:
    """Whether a line repeats the instructions: `Score: <1-10>`."""
    match = frame.search(line)
    value = line[match.end() :] if match else ""
    scale = rf"{OPEN}{low:g}\s*(?:-|–|to)\s*{high:g}{SHUT}[.\s]*"
    return bool(re.fullmatch(rf"{scale}|<[^<>0-9]*>|\[[^\]0-9]+\]|_+|\.\.\.|X|N", value)) if match else False


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())

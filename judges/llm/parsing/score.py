"""The scores that a reply gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from judges.llm.parsing.text import (
    CUT_OFF,
    OPEN,
    PLACEHOLDER,
    SHUT,
    Form,
    Scope,
    Unclear,
    decide,
    frame_of,
    is_stated,
    lines_of,
    only_explains,
    read_with,
    token_mass,
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
_GENERIC = r"scores?|ratings?|result|grade|mark|punktzahl|bewertung|puntuación|puntuacion|note|nota|оценка|评分|得分|分数|スコア"
_GIVEN = re.compile(
    r"^(?:i|we)(?:['’]d|\s+would|\s+will)?\s+(?:give|rate|score|assign)\b[^.0-9]{0,60}\s", re.IGNORECASE
)
_KEYS = ("score", "rating", "final score", "overall score", "overall", "overall rating")


def parse_scores(reply: str, criteria: Sequence[str], *, low: float, high: float) -> dict[str, float] | Unclear:
    """The score on each criterion, from `low` to `high`.

    Of a single criterion, `Score: 7` and `Rating: 7` are it, whatever its name, and so is a last line of a number
    alone; of several, each is named: lines `Helpfulness: 7`, or JSON. `7/10` and `7 out of 10` are read on a scale to
    10, and Unclear on any other. So are `7 or 8`, `7-8`, `about 7`, `seven`, `7,5`, and a number off the scale.
    """
    number = partial(_number, low=low, high=high)
    if len(criteria) > 1:
        return read_with(reply, lambda text: _scores_in(text, criteria, number), contradiction=SEVERAL_SCORES)
    score = read_with(reply, lambda text: _score_in(text, criteria[0], number), contradiction=SEVERAL_SCORES)
    return score if isinstance(score, Unclear) else {criteria[0]: score}


def expected_score(top_logprobs: Mapping[str, float], low: int, high: int) -> float | Unclear:
    """The mean of the scores `low` to `high` under the probabilities of their tokens, renormalised.

    Raises:
        ValueError: the scale leaves 0 to 9: a score could be several tokens, and "1" the beginning of "10".
    """
    if not 0 <= low < high <= 9:
        raise ValueError(f"expected scores need a scale within 0 to 9, of single digits, not {low} to {high}")
    mass = token_mass(top_logprobs, {str(s) for s in range(low, high + 1)})
    return sum(int(s) * p for s, p in mass.items()) / sum(mass.values()) if mass else NO_SCORE


def _score_in(text: str, criterion: str, number: Callable[[str], float | Unclear]) -> float | Unclear:
    name = _spaced(criterion)

    def fields(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        values = _flat(found)
        for key in [name] if name in values else [key for key in _KEYS if key in values]:
            yield "Score", values[key]

    def bare(line: str, scope: Scope) -> float | Unclear | None:
        line = _GIVEN.sub("", line)
        return number(line) if scope != "sentence" and _SCORED.fullmatch(line.rstrip(".!")) else None

    frame = frame_of(rf"(?:{re.escape(name)}|{_GENERIC})(?:\s+(?:score|rating))?", r":|\|")
    form = Form(frame, fields, number, bare, NO_SCORE, UNREADABLE_SCORE, SEVERAL_SCORES)
    return decide(lines_of(text, form), form)


def _scores_in(
    text: str, criteria: Sequence[str], number: Callable[[str], float | Unclear]
) -> dict[str, float] | Unclear:
    names = {_spaced(criterion): criterion for criterion in criteria}
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))  # "clarity of style" first
    frame = frame_of(rf"(?P<criterion>{either})(?:\s+(?:score|rating))?", r":|\|")
    apart = re.compile(rf"(?:[,;|]|(?<=[0-9])\s+(?:and\s+)?)\s*(?=(?:{either})\b)", re.IGNORECASE)

    def fields(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        values = _flat(found)
        return ((name, values[name]) for name in names if name in values)

    said: list[tuple[str, float | Unclear]] = []
    form = Form(frame, fields, number, lambda sentence, scope: None, NO_SCORE, UNREADABLE_SCORE, SEVERAL_SCORES)
    for piece in (piece for line in lines_of(text, form) for piece in apart.split(line)):
        match = frame.search(piece)
        if (
            match
            and match["criterion"]
            and is_stated(piece[: match.start()])
            and (value := number(piece[match.end() :])) != NO_SCORE
        ):
            said.append((names[_spaced(match["criterion"])], value))
    if not said:
        return NO_SCORE
    # A judge that begins anew states every criterion again; one that it states twice in one list is a contradiction.
    rounds = [dict(said[i : i + len(criteria)]) for i in range(0, len(said), len(criteria))]
    if len(set(said)) > len(criteria) and any(len(stated) < len(criteria) for stated in rounds):
        return SEVERAL_SCORES
    scores: dict[str, float] = {}
    for criterion in criteria:
        score = dict(said).get(criterion, Unclear(f"no score for {criterion}"))
        if isinstance(score, Unclear):
            return score
        scores[criterion] = score
    return scores


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """`{"scores": {"Clarity": {"score": 7, …}}}` as `{"clarity": 7}`."""
    flat: dict[str, Any] = {}
    for key, inner in found.items():
        if isinstance(inner, dict) and key in ("scores", "ratings", "criteria", "evaluation"):
            flat |= _flat({_spaced(k): v for k, v in inner.items()})
        else:
            flat[key] = inner.get("score", inner.get("rating")) if isinstance(inner, dict) else inner
    return flat


def _number(text: str, low: float, high: float) -> float | Unclear:
    """What stands after `Score: `."""
    text = text.strip()
    if re.fullmatch(rf"(?:{OPEN}{low:g}\s*(?:-|–|to)\s*{high:g}{SHUT}|{PLACEHOLDER}|[XN])[.\s]*", text):
        return NO_SCORE
    match = _SCORED.match(text)
    if not match:
        return UNREADABLE_SCORE if text.strip(" .:-") else CUT_OFF
    rest = text[match.end() :]
    # "7 - 8": what looks like the end of the number may be the beginning of a range.
    if _ANOTHER.match(rest):
        return SEVERAL_SCORES
    if not only_explains(rest):
        return UNREADABLE_SCORE
    if (match["of"] and float(match["of"]) != high) or (match["percent"] and high != 100):
        return OTHER_SCALE
    score = float(match["score"])
    return score if low <= score <= high else OFF_SCALE


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())

"""Which of two completions a reply prefers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

from judges.llm.parsing.text import (
    BECAUSE,
    CONCLUDES,
    CUT_OFF,
    LEAD,
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
    only_explains,
    read_with,
    token_mass,
)

ReplyVerdict = Literal["first", "second", "tie"]
NOTHING = Unclear("no verdict")
BOTH = Unclear("both verdicts")
UNREADABLE = Unclear("an unreadable verdict")
LOOK_ALIKE = Unclear("a look-alike letter")
_FRAME = frame_of(
    r"verdict|winner|(?P<weak>decision|choice|judge?ment|preference|pick|selection|vote|answer|conclusion|result"
    rf"|(?:better|best|preferred|stronger|superior|winning)\s+(?:one|{NOUN})"
    r"|veredicto|veredito|ganador|vencedor|urteil|gewinner|вердикт|победитель|判决|裁决|判定|结论|最终判断|最终答案|答案"
    r"|結論|勝者|优胜者|الحكم|फैसला)"
)
_LABEL = rf"{OPEN}(?:(?i:the)\s+)?(?:{NOUN}\s*)?{OPEN}([AB])(?:\+{{1,3}})?(?!\w|['’]\w){SHUT}"
_COMPARED = re.compile(rf"{OPEN}(?:{NOUN}\s+)?([AB])\s*(>+|<+|=+|≈|≻)\s*(?:{NOUN}\s+)?([AB])(?!\w){SHUT}\s*")
_VERY = r"(?:(?:clearly|slightly|much|far|significantly|marginally|definitely|substantially|overall|still)\s+)"
_BETTER = (
    rf"(?:(?:(?:is|was|would be)\s+{_VERY}?|{_VERY})"
    rf"(?:the\s+)?(?:better|best|winner|preferred|preferable|superior|stronger|winning)(?:\s+(?:one|overall|{NOUN}))?"
    r"|wins)"
)
_CHOICE = re.compile(
    r"((?i:(?:i|we)(?:\s+would|['’]d|\s+will|['’]ll)?\s+(?:prefer|choose|pick|select|vote for|go with|favou?r)\s+))?"
    rf"{_LABEL}\s*((?i:{_BETTER}))?(?:\s*,?\s*(?i:than|over|rather than|not)\s+{_LABEL})?"
)
_TIE = re.compile(
    rf"{OPEN}(?:(?:it['’]?s|it is|this is|we have|they(?: are|['’]re)|the two(?: {NOUN}s)? are"
    rf"|both(?: {NOUN}s| of them)?(?: are)?|(?:{NOUN}s? )?A and (?:{NOUN} )?B are)\s+)?"
    r"(?:(?:an?\s+|the\s+)?(?:tie(?:, relatively the same)?|draw|tied)|equally\s+\w+|equal in quality|of equal quality|no (?:clear )?winner|no preference"
    rf"|neither(?:\s+(?:one|{NOUN}))?\s+is\s+(?:clearly\s+)?(?:better|superior|preferred|the winner)"
    r"|empate|unentschieden|égalité|平局|平手|引き分け|ничья|تعادل|(?P<framed>neither|equal|the same|identical|even))"
    rf"(?!\w|-\w){SHUT}",
    re.IGNORECASE,
)
_PURPOSE = re.compile(r"\s*(?:,\s*)?(?:for|at|in|to|by|of)\b(?!.*\b(?:but|however|though|although|if|unless|only)\b)")
_KEYS = [
    "final verdict", "verdict", "winner", "preference", "preferred", "decision", "choice", "judgment", "judgement",
    "better", "final answer", "answer",
]  # fmt: skip
_LOOK_ALIKE = re.compile(rf"{OPEN}(?:\w+\s*:?\s+)?[АВΑΒавᎪᏴꓮꓐᗅᗷ]{SHUT}[.!]?")  # with or without a noun
_ECHO = re.compile(rf"(?:{PLACEHOLDER}|\W*A\W+B\W+(?:or\W+)?(?:tie|draw|equal|C)\W*|A\|B)[.\s]*", re.IGNORECASE)


@lru_cache(maxsize=64)  # a reply is read twice, and those of a judge that is held to its form are one of three
def parse_verdict(reply: str) -> ReplyVerdict | Unclear:
    r"""Which of the completions A (the first) and B (the second) a reply prefers.

    The shipped prompts ask for a last line `Verdict: A`, `Verdict: B` or `Verdict: tie`. Others that are read: JSON
    and XML with such a key, `[[A]]` (`[[C]]` is MT-bench's tie), `\boxed{A}`, `Answer: (B)`, `Winner: Assistant A`,
    `A > B`, and what the package's docstring says of last lines. A lower-case `a` counts only after `Verdict:` and the
    like. `A or B`, `A/B` and `both` are Unclear: the prompt offers "tie" for a tie. `neither` after `Verdict:` is a
    tie, since no completion wins.
    """
    reply = re.sub(r"\[\[\s*C\s*\]\]", "[[tie]]", reply)
    reply = re.sub(rf"({NOUN}\s*\()([ab])(?=\))", lambda label: label[1] + label[2].upper(), reply)
    form: Form[ReplyVerdict] = Form(_FRAME, _fields, _value, _bare, NOTHING, UNREADABLE, BOTH)
    return read_with(reply, lambda text: decide(lines_of(text, form), form), contradiction=BOTH)


def verdict_probability(top_logprobs: Mapping[str, float]) -> float | Unclear:
    """P(first) from the alternatives for a verdict's token: the mass of `A` over that of `A` and `B`.

    All other tokens are left out of the sum. If only one of both is among the alternatives, it has all of the mass.
    """
    mass = token_mass(top_logprobs, {"A", "B"})
    return mass["A"] / (mass["A"] + mass["B"]) if mass else NOTHING


def _fields(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    keys = [key for key in _KEYS if key in found]
    # "verdict" next to "answer" is the verdict; of two others, neither is the verdict more than the other.
    for key in [key for key in keys if "verdict" in key or key == "winner"] or keys:
        yield "Verdict", found[key]


def _value(text: str) -> ReplyVerdict | Unclear:
    """What stands after `Verdict: `."""
    text = text.strip()
    if text.count('"') % 2 or text.count("”") > text.count("“"):
        return UNREADABLE  # the end of a quotation that began in a line above
    if lower := re.fullmatch(rf"{OPEN}(?:{NOUN}\s+)?([ab]){SHUT}[.!]?", text):
        return "first" if lower[1] == "a" else "second"
    if (said := _said(text)) and _only_explains(*said[:2]):
        return said[0]
    if _ECHO.fullmatch(text):
        return NOTHING
    if not text.strip(" .:-*"):
        return CUT_OFF
    if _LOOK_ALIKE.fullmatch(text):
        return LOOK_ALIKE
    return BOTH if {"A", "B"} <= set(re.findall(r"\b[AB]\b", text)) or re.match("(?i)both", text) else UNREADABLE


def _said(text: str) -> tuple[ReplyVerdict, str, bool] | None:
    """The verdict that `text` begins with, the rest of it, and whether the words are a verdict by themselves."""
    if found := _COMPARED.match(text):
        left, sign, right = found.groups()
        tie, first = sign[0] in "=≈", (left == "A") == (sign[0] in ">≻")
        return None if left == right else ("tie" if tie else "first" if first else "second", text[found.end() :], True)
    if found := _TIE.match(text):
        return "tie", text[found.end() :], not found["framed"]
    if (found := _CHOICE.match(text)) and found[2] != found[4]:
        return "first" if found[2] == "A" else "second", text[found.end() :], any(found.group(1, 3, 4))
    return None


def _only_explains(verdict: ReplyVerdict, rest: str, *, goes_on: bool = False) -> bool:
    """Whether what follows a verdict in its line leaves it as it is: nothing, or reasons."""
    other = r"\bB\b" if verdict == "first" else r"\bA\b"
    if verdict == "tie":
        mind = r"(?i)\b(?:but|though|although|however|slight\w*|lean\w*|prefer\w*|better|edge|or)\b"
    elif re.match(r"(?i)\s*(?:because|since|due to|as)\b|\s*,\s*because\b", rest):
        mind = rf"(?:[,;.]|\b(?:and|or|but)\b)\s*(?:{NOUN}\s+)?{other}"
    else:
        mind = rf"{other}|(?i:\b(?:tie|or)\b)"
    return (goes_on or only_explains(rest)) and not re.search(mind, rest)


def _bare(sentence: str, scope: Scope) -> ReplyVerdict | Unclear | None:
    """What a sentence says that is nothing but a verdict. `Completion A` may be a heading, and `so A` is none."""
    if scope != "sentence" and _LOOK_ALIKE.fullmatch(sentence):
        return LOOK_ALIKE
    mere = r"\W*[AB]\W*" if scope == "line" else rf"\W*(?:{NOUN}\s*\([AB]\)|[AB])\W*" if scope == "reply" else "(?!)"
    commas = [c.end() for c in re.finditer(r",\s*", sentence) if LEAD.fullmatch(sentence[: c.end()])]
    for start in (0, *([lead.end()] if (lead := LEAD.match(sentence)) else ()), *commas):
        said = _said(sentence[start:])
        if said and (said[2] or re.fullmatch(mere, sentence)):
            goes_on = CONCLUDES.match(sentence) and _PURPOSE.match(said[1])
            explains = (goes_on or BECAUSE.match(said[1])) and _only_explains(*said[:2], goes_on=True)
            if explains or re.fullmatch(r"[.!。:]?", said[1]):
                return said[0]
    return None

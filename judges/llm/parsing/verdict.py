"""Which of two completions a reply prefers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from judges.llm.parsing.text import (
    CUT_OFF,
    FENCE,
    INTRO,
    LEAD,
    NOUN,
    OPEN,
    QUOTED,
    SHUT,
    TAG,
    TURN,
    Unclear,
    decide,
    in_line,
    is_stated,
    lines_of,
    read_with,
    unwrapped,
)

ReplyVerdict = Literal["first", "second", "tie"]
NOTHING = Unclear("no verdict")
BOTH = Unclear("both verdicts")
UNREADABLE = Unclear("an unreadable verdict")
LOOK_ALIKE = Unclear("a look-alike letter")
_LABEL = rf"{OPEN}(?:(?i:the)\s+)?(?:{NOUN}\s*)?{OPEN}([AB])(?!\w|['’]\w){SHUT}"
_BETTER = (
    r"(?:(?:is|was|would be)\s+(?:(?:clearly|slightly|much|far|significantly|marginally|definitely|overall|still)\s+)?"
    rf"(?:the\s+)?(?:better|best|winner|preferred|preferable|superior|stronger|winning)(?:\s+(?:one|overall|{NOUN}))?"
    r"|wins)"
)
_CHOICE = re.compile(
    rf"{_LABEL}\s*(?:(?i:{_BETTER})(?:\s+(?i:than|over)\s+{_LABEL})?|,?\s*(?i:over|rather than|not)\s+{_LABEL})?"
)
_CHOSEN = re.compile(
    r"(?i:(?:i|we)(?:\s+would|['’]d|\s+will|['’]ll)?\s+(?:prefer|choose|pick|select|vote for|go with|favou?r)"
    rf"|(?:better|preferred|best|winner)\s*[:=])\s+{_LABEL}(?:\s+(?i:over)\s+{_LABEL})?"
)
_COMPARED = re.compile(rf"{OPEN}(?:{NOUN}\s+)?([AB])\s*(>+|<+|=+|≈|≻)\s*(?:{NOUN}\s+)?([AB]){SHUT}\s*")
_TIE = re.compile(
    rf"{OPEN}(?:(?:it['’]?s|it is|this is|we have|i call it|they(?: are|['’]re)|the two(?: {NOUN}s)? are"
    rf"|both(?: {NOUN}s| of them)?(?: are)?|(?:{NOUN}s? )?A and (?:{NOUN} )?B are)\s+)?(?:an?\s+|the\s+)?"
    r"(?:(?:tie|draw)(?:\s+between\s+(?:the two|A and B))?|tied|equally\s+\w+|equal in quality|of equal quality"
    r"|empate|unentschieden|égalité|平局|平手|引き分け|ничья|تعادل)"
    rf"(?!\w){SHUT}",
    re.IGNORECASE,
)
_NO_WINNER = re.compile(
    rf"{OPEN}(?:neither(?:\s+(?:one|{NOUN}))?(?:\s+is\s+(?:clearly\s+)?(?:better|superior|preferred|the winner))"
    rf"|no (?:clear )?winner|no preference){SHUT}",
    re.IGNORECASE,
)
_FRAMED_TIE = re.compile(
    rf"{OPEN}(?:neither(?: A nor B)?|(?:both(?: are)?\s+)?(?:equal|the same|same|identical)|even){SHUT}",
    re.IGNORECASE,
)
_FRAME_WORD = (
    r"(?:(?:my|the|our|final|overall|ultimate)\s+)*(?P<word>verdict|winner|decision|choice|judge?ment|preference|pick"
    r"|selection|vote|answer|conclusion|(?:better|best|preferred|stronger|superior|winning)\s+"
    rf"(?:one|{NOUN})|veredicto|veredito|ganador|vencedor|urteil|gewinner|вердикт|победитель|判决|裁决|判定|结论|最终判断"
    r"|最终答案|答案|結論|勝者|优胜者|الحكم|फैसला)"
)
_FRAME = re.compile(
    rf"(?<![\w\"'“‘「]){_FRAME_WORD}\s*(?:\([^()]{{0,40}}\)\s*)?"
    r"(?:(?:is|would be|goes to|是|为)(?![a-z])\s*:?|:|=>|->|→|=|\s[-–—]\s)\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(rf"{_FRAME_WORD}\s*(?:is)?\s*:?", re.IGNORECASE)
_STRONG = {"verdict", "winner"}
_ECHO = re.compile(
    rf"{OPEN}(?:A{{0}}B(?:{{0}}(?:tie|draw|equal|C))|<[^<>]*>|\[(?:your|insert|choose|one of)[^\]]*\]|\.\.\.|A\|B)"
    rf"{SHUT}[.\s]*".replace("{0}", r"[\"'”’`,|/\s]*(?:or)?[\"'“‘`,|/\s]*"),
    re.IGNORECASE,
)
_VERDICT_KEYS = [
    "final verdict", "verdict", "winner", "preference", "preferred", "decision", "choice", "judgment", "judgement",
    "better", "final answer", "answer",
]  # fmt: skip
_VERDICT_TAGS = "verdict|winner|answer|final_answer|final_verdict|choice|decision|preference|judge?ment"
_VERDICT_TAG = re.compile(rf"<({_VERDICT_TAGS})>([^<>:]{{0,80}})</\1>", re.IGNORECASE)
_UNCLOSED_TAG = re.compile(rf"<({_VERDICT_TAGS})>(?!.*</\1>)", re.IGNORECASE | re.DOTALL)


@lru_cache(maxsize=64)  # a reply is read twice, and those of a judge that is held to its form are one of three
def parse_verdict(reply: str) -> ReplyVerdict | Unclear:
    r"""Which of the completions A (the first) and B (the second) a reply prefers.

    The shipped prompts ask for a last line `Verdict: A`, `Verdict: B` or `Verdict: tie`. Others that are read: JSON
    and XML with such a key, `[[A]]` (`[[C]]` is MT-bench's tie), `\boxed{A}`, `Answer: (B)`, `Winner: Assistant A`,
    `A > B`, and what the module's docstring says of last lines. A lower-case `a` counts only after `Verdict:` and the
    like. `A or B`, `A/B` and `both` are Unclear: the prompt offers "tie" for a tie. `neither` after `Verdict:` is a
    tie, since no completion wins.
    """
    return read_with(reply, _verdict_in, contradiction=BOTH)


def _verdict_in(text: str) -> ReplyVerdict | Unclear:
    text = re.sub(r"\[\[\s*C\s*\]\]", "[[tie]]", text)
    text = unwrapped(text, _spelled_verdict)
    text = _UNCLOSED_TAG.sub("\nVerdict: (cut off) ", text)
    text = "\n".join(_untagged(line) for line in _joined_tags(text).split("\n"))
    lines = [line for line in lines_of(text) if not _is_echo(line)]
    alone = sum(line != FENCE for line in lines) == 1
    return decide(
        lines,
        _framed_verdict,
        lambda line: _bare_verdict(line, alone=alone),
        heading=_HEADING,
        none=LOOK_ALIKE if alone and _looks_alike(lines[0]) else NOTHING,
        contradiction=BOTH,
    )


def _spelled_verdict(value: dict[str, Any]) -> list[str]:
    keys = [key for key in _VERDICT_KEYS if key in value]
    if not keys:
        return []
    # "verdict" next to "answer" is the verdict; of two others, neither is the verdict more than the other.
    strong = [key for key in keys if "verdict" in key or key == "winner"] or keys
    return [f"Verdict: {in_line(value[key])}" for key in strong]


def _joined_tags(text: str) -> str:
    return _VERDICT_TAG.sub(lambda m: f"<{m[1]}>{' '.join(m[2].split())}</{m[1]}>", text)


def _untagged(line: str) -> str:
    """A line with `<verdict>A</verdict>` as lines `Verdict: A`; a tag that the line only mentions becomes a quotation."""

    def spell(match: re.Match[str]) -> str:
        own = is_stated(TAG.sub("", _VERDICT_TAG.sub(".", line[: match.start()])))
        alone = re.fullmatch(r"[\s.!]*", TAG.sub("", _VERDICT_TAG.sub("", line[match.end() :])))
        return f"\nVerdict: {match[2]}\n" if own and alone else QUOTED

    return _VERDICT_TAG.sub(spell, line)


def _is_echo(line: str) -> bool:
    """Whether a line repeats the instructions: `Verdict: <A, B or tie>`."""
    frame = _FRAME.search(line)
    return bool(frame and _ECHO.fullmatch(line[frame.end() :]) and not _bracketed_label(line[frame.end() :]))


def _bracketed_label(value: str) -> bool:
    return bool(re.fullmatch(rf"{_LABEL}|{OPEN}[ab]{SHUT}|{OPEN}(?:tie|draw){SHUT}", value, re.IGNORECASE))


def _framed_verdict(line: str) -> ReplyVerdict | Unclear | None:
    """What `Verdict: …` in the line says. None if there is none, or an `Answer: …` that is no verdict."""
    frames = list(_FRAME.finditer(line))
    if not frames or not is_stated(line[: frames[0].start()]):
        bracketed = re.search(r"\[\[\s*(\w+)\s*\]\][\s.!]*$", line)
        return _verdict_value(bracketed[1]) if bracketed and is_stated(line[: bracketed.start()]) else None
    ends = [frame.start() for frame in frames[1:]] + [len(line)]
    *before, value = [_verdict_value(line[frame.end() : end]) for frame, end in zip(frames, ends, strict=True)]
    if any(other not in (value, CUT_OFF) for other in before):  # "Verdict: the winner is A" says one thing
        return BOTH
    readable = not isinstance(value, Unclear) or value in (BOTH, LOOK_ALIKE)
    return value if readable or any(frame["word"].lower() in _STRONG for frame in frames) else None


def _verdict_value(text: str) -> ReplyVerdict | Unclear:
    text = text.strip()
    if text.count('"') % 2 or text.count("”") > text.count("“"):
        return UNREADABLE  # the end of a quotation that began in a line above
    if lower := re.fullmatch(rf"{OPEN}(?:{NOUN}\s+)?([ab]){SHUT}[.!]?", text):
        return "first" if lower[1] == "a" else "second"
    if compared := _COMPARED.match(text):
        rest = text[compared.end() :]
        if isinstance(value := _compared(*compared.groups()), Unclear):
            return value
    elif tie := _TIE.match(text) or _NO_WINNER.match(text) or _FRAMED_TIE.match(text):
        value, rest = "tie", text[tie.end() :]
    elif choice := _CHOICE.match(text) or _CHOSEN.match(text):
        label, *others = [group for group in choice.groups() if group]
        if label in others:
            return UNREADABLE
        value, rest = "first" if label == "A" else "second", text[choice.end() :]
    else:
        return _why_unreadable(text)
    return value if _only_explains(value, rest) else _why_unreadable(text)


def _compared(left: str, sign: str, right: str) -> ReplyVerdict | Unclear:
    if left == right:
        return UNREADABLE
    if sign[0] in "=≈":
        return "tie"
    return "first" if (left == "A") == (sign[0] in ">≻") else "second"


def _only_explains(verdict: ReplyVerdict, rest: str) -> bool:
    """Whether what follows a verdict in its line leaves it as it is: nothing, or reasons."""
    rest = rest.rstrip()
    if re.fullmatch(r"[.!。,;]?", rest):
        return True
    intro = INTRO.match(rest)
    if not intro or (rest.startswith((".", "…")) and rest[:2] in ("..", "…")) or "?" in rest or TURN.search(rest):
        return False
    reasons = rest[intro.end() :]
    if verdict == "tie":
        return not re.search(
            r"\b(?:but|though|although|however|slight\w*|lean\w*|prefer\w*|better|edge|or)\b", reasons, re.I
        )
    # "A" followed by a small letter is the article, except before the verbs that a completion has.
    other = r"\bB\b" if verdict == "first" else r"\bA\b(?!\s+(?!is\b|was\b|has\b|and\b|or\b|wins\b|but\b|if\b)[a-z])"
    if not intro["because"]:
        return not re.search(rf"{other}|(?i:\b(?:tie|or)\b)", reasons)
    return not re.search(rf"(?:[,;.]|\b(?:and|or|but)\b)\s*(?:{NOUN}\s+)?{other}", reasons)


def _why_unreadable(text: str) -> Unclear:
    if not text.strip(" .:-*"):
        return CUT_OFF
    if _looks_alike(text):
        return LOOK_ALIKE
    both = re.search(r"\bA\b(?!\s+(?!and\b|or\b|is\b|because\b)[a-z])", text) and re.search(r"\bB\b", text)
    return BOTH if both or re.match(rf"{OPEN}both\b", text, re.IGNORECASE) else UNREADABLE


def _looks_alike(text: str) -> bool:
    """Whether the text is a letter that only looks like A or B, with or without a noun."""
    return bool(re.fullmatch(rf"{OPEN}(?:\w+\s*:?\s+)?[АВΑΒавᎪᏴꓮꓐᗅᗷ]{SHUT}[.!]?", text))


def _bare_verdict(line: str, *, alone: bool) -> ReplyVerdict | None:
    """What a line says that is nothing but a verdict. `Completion A` may be a heading, except if it is `alone`."""
    line = line.strip()
    if lead := re.match(r"(?:[-•·]\s+|[0-9]{1,2}[.)]\s+)", line):
        line = line[lead.end() :]
    stated = line
    for pattern in (_CHOICE, _CHOSEN, _COMPARED):
        opening = LEAD.match(line)
        for start in {0, opening.end() if opening else 0}:
            if match := re.compile(pattern.pattern + r"[.!。]?").fullmatch(line, start):
                if pattern is _COMPARED:
                    value = _compared(*match.groups()[:3])
                    return None if isinstance(value, Unclear) else value
                label, *others = [group for group in match.groups() if group]
                if label in others or (start and match[0].strip(" .!()[]'\"") == label):
                    continue  # "so A", "Finally: A": an enumeration, as likely as a verdict
                heading = pattern is _CHOICE and re.fullmatch(
                    rf"{OPEN}(?:the\s+)?{NOUN}\s*{OPEN}[AB]{SHUT}[.!]?", stated
                )
                return None if heading and not alone else "first" if label == "A" else "second"
    opening = LEAD.match(line)
    for start in {0, opening.end() if opening else 0}:
        for pattern in (_TIE, _NO_WINNER):
            if re.compile(pattern.pattern + r"[.!。]?", re.IGNORECASE).fullmatch(line, start):
                return "tie"
    return None

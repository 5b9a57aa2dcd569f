"""Which of two completions a reply prefers."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Literal

from judges.llm.parsing import NOUN, OPEN, SHUT, Form, Unclear, frame_of, only_explains, read_with

ReplyVerdict = Literal["first", "second", "tie"]
BOTH = Unclear("both verdicts")
_FRAME = frame_of(
    r"verdict|winner|απόφαση|ετυμηγορία|(?P<weak>decision|choice|judge?ment|preference|pick|selection|vote|answer|conclusion|result"
    rf"|(?:better|best|preferred|stronger|superior|winning)(?:\s+(?:one|{NOUN}))?"
    r"|veredicto|veredito|ganador|vencedor|urteil|gewinner|вердикт|победитель|判决|裁决|判定|结论|最终判断|最终答案|答案"
    r"|結論|勝者|优胜者|الحكم|फैसला)"
)
_LABEL = rf"{OPEN}(?:(?i:the)\s+)?(?:{NOUN}\s*)?{OPEN}([AB])(?:\+{{1,3}}|['’]s\s+{NOUN})?(?!\w)"
_VERY = r"(?:(?:clearly|slightly|much|far|significantly|marginally|definitely|substantially|overall|still)\s+)"
_BETTER = (
    rf"(?:(?:(?:is|as|was|would be|does|did|performs|gives|provides|offers)\s+{_VERY}?|{_VERY})"
    rf"(?:(?:the|a)\s+)?(?:better|best|(?:clear\s+)?winner|preferred|preferable|superior|stronger|winning)(?:\s+(?:one|overall|{NOUN}))?"
    r"|wins)"
)
_CHOICE = re.compile(
    r"((?i:(?:i|we)(?:\s+would|['’]d|\s+will|['’]ll)?\s+(?:prefer|choose|pick|select|vote for|go with|favou?r)\s+))?"
    rf"{_LABEL}(?!['’]\w)(?:\s*(>+|<+|=+|≈|≻)\s*{_LABEL}"
    rf"|{SHUT}((?i:{_BETTER}))?(?:\s*,?\s*(?i:than|over|rather than|not|to|beats|outperforms)\s+{_LABEL}(?:['’]s)?)?){SHUT}"
)
_TIE = re.compile(
    rf"(?i){OPEN}(?:(?:it['’]?s|it is|this is|we have|they(?: are|['’]re)|the two(?: {NOUN}s)? are"
    rf"|both(?: {NOUN}s| of them)?(?: are)?|(?:{NOUN}s? )?A and (?:{NOUN} )?B are)\s+)?"
    r"(?:(?:an?\s+|the\s+)?(?:tie(?:, relatively the same)?|draw|tied)|equally\s+\w+|equal in quality|of equal quality|no (?:clear )?winner|no preference"
    rf"|neither(?:\s+(?:one|{NOUN}))?\s+is\s+(?:clearly\s+)?(?:better|superior|preferred|the winner)"
    r"|C(?=\s*\]\])|empate|unentschieden|égalité|平局|平手|引き分け|ничья|تعادل|(?P<framed>neither|equal|(?:relatively )?the same|identical|even))"
    rf"(?!\w|-\w){SHUT}"
)
_LOOK_ALIKE = rf"{OPEN}(?:\w+\s*:?\s+)?[АВΑΒавᎪᏴꓮꓐᗅᗷ]{SHUT}[.!]?"  # with or without a noun
_ECHO = r"(?i:\W*A\W+B\W+(?:or\W+)?(?:tie|draw|equal|C)\W*|A\|B[.\s]*)"
_OTHER = rf"(?:[,;:.–—-]|\b(?:and|or|but|then|not)\b){OPEN}(?:the\s+)?(?:{NOUN}\s+)?{OPEN}"


@lru_cache(maxsize=64)  # a reply is read twice, and those of a judge that is held to its form are one of three
def parse_verdict(reply: str) -> ReplyVerdict | Unclear:
    r"""Which of the completions A (the first) and B (the second) a reply prefers.

    The shipped prompts ask for a last line `Verdict: A`, `Verdict: B` or `Verdict: tie`. JSON, tags, `[[A>>B]]` (and MT-bench's
    tie, `[[C]]`), `\boxed{A}`, `Winner: Assistant A`, `A > B` and `I prefer A.` are read too. `A or B`, `A/B` and `both` are
    Unclear: the prompt offers "tie". `Verdict: neither` is a tie, since no completion wins.
    """
    lower = re.compile(rf"(?m)((?:{NOUN}|[:=]){OPEN})([ab])(?={SHUT}[.!]?$|\))")
    reply = lower.sub(lambda label: label[1] + label[2].upper(), reply)
    reply = re.sub(rf"\A\W*{NOUN}\s*\(([AB])\)\W*\Z|(?<=: \[\[C\]\]) for a tie\b", r"\1", reply)
    return read_with(reply, lambda text: _FORM.decide(_FORM.lines(text)), several=BOTH)


def _value(text: str) -> ReplyVerdict | Unclear | None:
    """What stands after `Verdict: `."""
    if said := _said(text):
        return said
    if re.fullmatch(rf"{_ECHO}|{_LOOK_ALIKE}", text):
        return Unclear("no verdict" if re.fullmatch(_ECHO, text) else "a look-alike letter")
    return BOTH if {"A", "B"} <= set(re.findall(r"\b[AB]\b", text)) or re.match("(?i)both", text) else None


def _said(text: str, concludes: bool = False, *, alone: bool = False) -> ReplyVerdict | None:
    """The verdict that a text is, with its reasons if any. If it stands `alone`, without a frame, `A` says nothing."""
    verdict: ReplyVerdict = "tie"
    doubt = r"(?i)\b(?:if|unless|but|though|although|however|slight\w*|lean\w*|prefer\w*|better|edge|or)\b"
    if found := _TIE.match(text):
        says = not found["framed"]
    elif (found := _CHOICE.match(text)) and found[2] not in found.group(4, 6):
        says, sign = any(found.group(1, 4, 5, 6)), (found[3] or ">")[0]
        if sign not in "=≈":
            verdict = "first" if (found[2] == "A") == (sign in ">≻") else "second"
            other = "B" if verdict == "first" else "A"
            doubt = rf"(?i:\b(?:if|unless|were|tie)\b)|{_OTHER}{other}\b|\b{other}\b{SHUT}(?i:{_BETTER})"
    else:
        return None
    rest = text[found.end() :]
    explains = only_explains(rest) or (concludes and re.match(r"\s*,?\s*(?:for|at|in|to|by|of)\b", rest))
    return verdict if explains and (says or not alone) and not re.search(doubt, rest) else None


_LINE = re.compile(rf"\W*[AB]\W*|{_LOOK_ALIKE}")
_FORM: Form[ReplyVerdict] = Form("verdict", BOTH, _FRAME, _value, _LINE, partial(_said, alone=True))

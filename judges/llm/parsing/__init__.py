"""What a judge's reply means: a verdict, scores, a ranking, or `Unclear` with its reason. Nothing is guessed.

What is in `<think>` blocks, and what a reply copies of the prompt in its marks (`judges.llm.templates.fence`), is no part
of it. Full-width letters are ASCII, as Chinese and Japanese keyboards write them; no other look-alike is.

A statement is `Verdict: A`, in prose, JSON or a tag; `[[A]]`; a sentence that is nothing but a verdict; a line `**A**`. It
begins a sentence outside quotes; an echo of the instructions (`Verdict: A|B|tie`) is none. The last one counts, since a
judge may argue with itself: at the end, or at the beginning before its reasons; elsewhere it may be a quotation, unless
it is in brackets or says "my final". One that differs contradicts it, except before other words and a `Verdict: A`.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Unclear(str):
    """Why a reply gives nothing, from a short list, so that reasons can be counted: `Unclear("both verdicts")`."""


CUT_OFF, TAKEN_BACK = Unclear("cut off"), Unclear("a verdict taken back")
MARK = re.compile(r"<(/?)text-([0-9a-f]{8})>")  # of `judges.llm.templates.fence`
SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,50}\|>|<｜[^｜<>\n]{1,50}｜>|<\|[a-z_]{1,30}>|<[a-z_]{1,30}\|>|\[\|[a-z_]{1,30}\|\]"
    r"|</?s>|<(?:bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|image|audio|video)>|<(?:start|end)_of_[a-z]{1,20}>"
    r"|<unused[0-9]{1,3}>|<extra_id_[0-9]{1,3}>|<fim_[a-z]{1,10}>|<seed:[a-z_]{1,20}>|\[e~\[|\]~[a-z]{0,4}\]"
    r"|</?(?:tool_call|tool_response|function_call)>|<</?SYS>>|\[/?(?:INST|SYSTEM_PROMPT|ARGS|THINK|[gs]?MASK|CLS|SEP|PAD"
    r"|UNK|BOS|EOS|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|IMG(?:_END|_BREAK)?)\]"
)
"""What chat templates and tokenizers write as control tokens."""
THINKING = r"(?:think|thinking|thought|reasoning|reflection|scratchpad)"
_BEGIN = rf"<{THINKING}>|\[THINK\]|<\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|>"
_END = rf"</{THINKING}>|\[/THINK\]|<\|channel\|>\s*final[^<]*<\|message\|>"
# Of an object in which a key comes twice, the keys alone.
_JSON = json.JSONDecoder(strict=False, object_pairs_hook=lambda p: dict.fromkeys(d) if p[len(d := dict(p)) :] else d)
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}
QUOTED = "[quoted]"
_RULE = re.compile(r"[\s\-–—_=.,;·()\[\]{}]*|\s*(?:`{3,}|~{3,})\s*[\w+-]*\s*")
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mathit)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[()\[\]]|\$+|[*`\ufe0f]+|</?[biu]>|^\s*[-•·]\s+")
_TAG = re.compile(r"<(?P<name>[A-Za-z]\w+)>(?:(?P<inner>[^<>:]{0,80})</(?P=name)>)?|</?[A-Za-z][A-Za-z_-]+/?>")
_SENTENCE_ENDS = re.compile(r"(?<!^\d\.)(?<!^\d\d\.)(?<!\.\.\.)(?<=[.!?])[\"”’)\]]*\s+|(?<=[。！？])")
_BRACKETS = re.compile(r"(?i)\[\[(?=[^\[\]]{1,80}\]\])|\[result\]\s*:?")
OPEN, SHUT = r"[\s(\[{<\"'“‘«「『【《]{0,9}", r"[\s)\]}>\"'”’»」』】》]{0,9}"
NOUN = (
    r"(?i:completion|response|assistant|answer|option|candidate|model|summary|output|choice|text|version|reply"
    r"|respuesta|antwort|réponse|ответ|回答|回复|答案|选项)"
)
_PLACEHOLDER = re.compile(r"(?:<[^<>0-9]*>|\[[^\[\]\"0-9]+\]|\.\.\.)[.\s]*")  # `Verdict: <yours>`
_CONCLUSION = (
    r"(?:(?:and|so)\s+)?(?:so|thus|therefore|hence|overall|finally|ultimately|conclusion|in conclusion|in summary"
    r"|to conclude|in short|all in all|on balance|επομένως|συνεπώς|συνολικά)\b"
)
_LEAD = re.compile(
    rf"(?i)(?:[0-9]{{1,2}}[.)]\s*)?(?:(?:{_CONCLUSION}|and|but|however|no|yes|in my opinion)\s*[,:]?\s*)?"
    r"(?:(?:after|based on|considering|given|weighing|με βάση)\b(?:(?!\b(?:if|unless|whether|says?|claims?)\b)[^:]){0,100}?[,:]\s*)?"
    r"(?:(?:i|we)\s+(?:would\s+|have\s+)?(?:conclude|decide|think|believe|find|say|rate|determined|come to the conclusion)(?:\s+that)?\s*[,:]?\s*)?"
    r"(?:(?:here|this) is\s+)?(?:(?:json|output|result)\b\s*:?\s*)?"
)
_TURN = re.compile(
    r"(?i)(?:^|[.!?;,–—(-]\s*)(?:wait|no wait|no,|or\b|actually|hmm+|oops|sorry|correction|scratch that|on second thoughts?"
    r"|let me re|i (?:take (?:that|it) back|changed? my mind|was wrong))"
)
LABEL, SENTENCE, FRAMED, SURE = range(1, 5)
"""How much a statement counts: `**A**` as a line, at the end; `A is better.`, also at the beginning; `Verdict: A` or
`Therefore, A is better.`, whatever was said before; `[[A]]` or `My final verdict is A`, anywhere."""


def frame_of(words: str, link: str = ":") -> re.Pattern[str]:
    """What stands before a value: `The final WORDS is: `. What follows those in a group `weak` may be no value."""
    return re.compile(
        r"(?i)(?P<final>my\s+final\s+)?(?:(?:my|the|our|final|overall|ultimate|total|complete|mi|el|mon|le|mein|il|мой|η|μου|τελική)\s+)*"
        rf"(?:{words})\s*(?:(?:final|finale)\s+)?(?:\((?!worst)[^()]{{0,60}}\)\s*)?"
        rf"(?:(?:is|would be|goes to|es|est|è|é|lautet|είναι|是|为)(?![a-z])\s*:?\s*(?:that\b)?|=>|->|→|=|\s[-–—]\s|{link}|\Z)\s*"
    )


def only_explains(rest: str) -> bool:
    """Whether what follows a value in its sentence leaves it as it is: nothing, or reasons."""
    reasons = r"(?i)[.!。:;,|]?\Z|\s*(?:,?\s*(?:because|since|due to|as (?:it|the|they))\b|\.(?!\.)|[;,:(–—#]|-(?=\s))"
    return bool(re.match(reasons, rest)) and "?" not in rest and not _TURN.search(rest)


def read_with(reply: str, parse: Callable[[str], T | Unclear], *, several: Unclear) -> T | Unclear:
    """`parse` of what counts in the reply. Control tokens part it: then what is before may not contradict its end."""
    text = re.sub(rf"(?is)(?:{_BEGIN}).*?(?:{_END})", "\n", reply.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.split(f"(?i){_END}", text)[-1]  # the chat template may have opened the block
    if re.search(f"(?i){_BEGIN}", text):
        return Unclear("reasoning that never ended")
    text = re.sub(r"(?s)<text-([0-9a-f]{8})>.*?</text-\1>|</text-[0-9a-f]{8}>", f"\n{QUOTED}\n", text)
    if MARK.search(text):
        return Unclear("a quotation that never ended")
    # Letters are mapped after this: `＜think＞` is no token.
    parts = [part.translate(_FULL_WIDTH) for part in SPECIAL_TOKEN.split(text) if part.strip()]
    if not parts:
        return Unclear("an empty reply")
    *before, last = [parse(part) for part in parts]
    contradicts = not isinstance(last, Unclear) and any(p != last and not isinstance(p, Unclear) for p in before)
    return several if contradicts else last


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a statement is written: a `frame` and a `value`, a line that is a `label`, or a `sentence` that may conclude."""

    noun: str
    several: Unclear
    frame: re.Pattern[str]
    value: Callable[[str], T | Unclear | None]
    label: re.Pattern[str]
    sentence: Callable[[str, bool], T | Unclear | None] = lambda text, concludes: None

    def lines(self, text: str) -> list[str]:
        """The lines that say something, as plain text; JSON objects and tags as `key: value`, if the key is a frame."""
        spellings = dict.fromkeys((text, text.replace("'", '"'), re.sub(r'\\[^"]', "  ", text)))  # Python's, LaTeX's
        done, position = "", 0
        for brace in re.finditer(r"\{", text):
            for spelled in spellings if brace.start() >= position else ():
                with suppress(ValueError, RecursionError):
                    found, end = _JSON.raw_decode(spelled, brace.start())
                    done += text[position : brace.start()] + (". ".join(self._fields(found)) or QUOTED)
                    position = end
                    break
        lines = map(_plain, _TAG.sub(self._of_tag, done + text[position:]).splitlines())
        return [line for line in lines if not _RULE.fullmatch(line)]

    def _fields(self, found: dict[str, Any]) -> Iterator[str]:
        for key, value in found.items():
            name = " ".join(key.replace("_", " ").split())
            framed = self.frame.fullmatch(f"{name}: ")
            if isinstance(value, dict):  # {"scores": {"Clarity": {"score": 7, …}}}
                score = value.get("score", value.get("rating"))
                yield from self._fields(value if not framed else {} if score is None else {key: score})
            elif framed:
                yield f"{name}: {' '.join(value.split()) if isinstance(value, str) else json.dumps(value)}"

    def _of_tag(self, tag: re.Match[str]) -> str:
        closed_later = tag["inner"] is None and f"</{tag['name']}>" in tag.string[tag.end() :]
        stated = "" if closed_later else "".join(self._fields({tag["name"] or "": tag["inner"]}))
        return f"{stated} " if stated else f"\n{tag['inner'] or ''}\n"

    def decide(self, lines: list[str]) -> T | Unclear:
        """What the lines state last. A framed statement takes the place of all that were made before other words."""
        units = self._units(lines)
        said = [i for i, (_, weight) in enumerate(units) if weight]
        framed = max((i for i in said if units[i][1] >= FRAMED), default=-1)
        unread = framed >= 0 and isinstance(units[framed][0], Unclear) and units[framed][0] != CUT_OFF
        last = units[framed if unread else said[-1]][0] if said else None
        if last is None or isinstance(last, Unclear):
            return last or Unclear(f"no {self.noun}")
        first = next((i + 1 for i in range(framed, -1, -1) if not units[i][1]), 0)
        if any(units[i][0] != last and not isinstance(units[i][0], Unclear) for i in said if i >= first):
            return self.several
        if any(value == TAKEN_BACK for value, _ in units[said[-1] :]):
            return TAKEN_BACK
        at_an_end = said[-1] == len(units) - 1 or (first == 0 and units[0][0] == last and units[0][1] >= SENTENCE)
        if at_an_end or any(weight == SURE for _, weight in units[first:]):
            return last
        return Unclear("a verdict that is not at the end" if framed >= 0 else f"no {self.noun}")

    def _units(self, lines: list[str]) -> list[tuple[T | Unclear | None, int]]:
        """What the sentences of the lines say, and how much it counts; without those that only explain a framed one."""
        units: list[tuple[T | Unclear | None, int]] = []
        for line in lines:
            below = self.value(line) if units and units[-1][0] == CUT_OFF and ":" not in line else None
            if below is not None and not isinstance(below, Unclear):
                units[-1] = below, FRAMED
                continue
            begin = len(units)
            ends = [0, *(end.end() for end in _SENTENCE_ENDS.finditer(line)), len(line)]
            for i, j in itertools.pairwise(ends):
                quoted = line.count('"', 0, i) % 2 or line.count("“", 0, i) > line.count("”", 0, i)
                value, weight = (None, 0) if quoted else self._read(line[i:j].strip())
                explains = value is None and len(units) > begin and units[-1][1] >= FRAMED
                units += [] if explains or i == j else [(value, weight)]
            if self.label.fullmatch(line) and not any(weight for _, weight in units[begin:]):
                units[begin:] = [(self._stated(line), LABEL)]
        return units

    def _read(self, sentence: str) -> tuple[T | Unclear | None, int]:
        """What a sentence says. Brackets have to agree with the statement that is before them."""
        head, *brackets = _BRACKETS.split(sentence.lstrip(" \t-–—•·({`.,:"))
        value, weight = self._said(head.lstrip("["))
        announced = head.rstrip().endswith(":") and value in (f"an unreadable {self.noun}", self.several)
        framed = (self.value(head[frame.end() :]) for frame in self.frame.finditer(head))
        if not isinstance(value, Unclear | None) and any(other not in (None, value) for other in framed):
            value = self.several  # Verdict: A, verdict: B
        if not brackets:
            return (TAKEN_BACK, 0) if value is None and _TURN.match(sentence) else (value, weight)
        last, *others = [self.value(bracket) for bracket in reversed(brackets)]
        if last is None or (value is None and not _LEAD.fullmatch(head)):
            return None, 0
        agreed = all(other == last for other in others) and (announced or value in (None, CUT_OFF, last))
        return last if agreed else self.several, SURE

    def _said(self, sentence: str) -> tuple[T | Unclear | None, int]:
        """What a sentence without brackets says, after words that lead to it."""
        concludes = bool(re.match(f"(?i){_CONCLUSION}", sentence))
        starts = [word.start() for word in re.finditer(r"\S+", sentence[:200])]
        for start in (start for start in starts if _LEAD.fullmatch(sentence[:start])):
            if frame := self.frame.match(sentence, start):
                value = self._stated(sentence[frame.end() :])
                if frame.lastgroup != "weak" or value != f"an unreadable {self.noun}":
                    return value, FRAMED if frame.lastgroup in (None, "weak") else SURE
            elif (said := self.sentence(sentence[start:], concludes)) is not None:
                return said, FRAMED if concludes else SENTENCE
        return None, 0

    def _stated(self, rest: str) -> T | Unclear:
        """What stands after a frame, or as a label."""
        while frame := self.frame.match(rest):
            rest = rest[frame.end() :]
        value = None if rest.count('"') % 2 or rest.count("”") > rest.count("“") else self.value(rest)
        if value is not None:
            return value
        empty = not rest.strip(" .:*-[](){}\"'") and not rest.startswith("...")
        return CUT_OFF if empty else Unclear(f"{'no' if _PLACEHOLDER.fullmatch(rest) else 'an unreadable'} {self.noun}")


def _plain(line: str) -> str:
    if line.lstrip().startswith(">"):
        return QUOTED
    line = _NOISE.sub("", _LATEX.sub(r"\1", _LATEX.sub(r"\1", line))).replace("_", " ")
    # What does not show, and emojis, except in "❌ A", which is no verdict for A.
    line = "".join(c for c in line if unicodedata.category(c) not in ("So", "Cf") or c in "❌✗✘✖🚫👎⛔🙅")
    return line.strip().lstrip("#").strip().strip("|=").strip()

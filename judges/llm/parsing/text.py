"""The part of a reply that counts, its lines, and which statement in it is the last: what all parsers share."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Unclear(str):
    """Why a reply gives nothing, from a short list, so that reasons can be counted: `Unclear("both verdicts")`."""


EMPTY = Unclear("an empty reply")
ENDLESS = Unclear("reasoning that never ended")
ALL_QUOTED = Unclear("a quotation that never ended")
CUT_OFF = Unclear("cut off")
TAKEN_BACK = Unclear("a verdict taken back")
NOT_LAST = Unclear("a verdict that is not at the end")
MARK = re.compile(r"<(/?)text-([0-9a-f]{8})>")
"""An opening or closing mark of `judges.llm.templates.fence`."""
SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,50}\|>|<｜[^｜<>\n]{1,50}｜>|<\|[a-z_]{1,30}>|<[a-z_]{1,30}\|>|\[\|[a-z_]{1,30}\|\]"
    r"|</?s>|<(?:bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|image|audio|video)>|<(?:start|end)_of_[a-z]{1,20}>"
    r"|<unused[0-9]{1,3}>|<extra_id_[0-9]{1,3}>|<fim_[a-z]{1,10}>|<seed:[a-z_]{1,20}>|\[e~\[|\]~[a-z]{0,4}\]"
    r"|</?(?:tool_call|tool_response|function_call)>"
    r"|<</?SYS>>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|THINK|ARGS|IMG)\]"
    r"|\[(?:gMASK|sMASK|MASK|CLS|SEP|PAD|UNK|BOS|EOS|IMG_END|IMG_BREAK)\]"
)
"""What chat templates and tokenizers write as control tokens."""
THINKING = r"(?:think|thinking|thought|reasoning|reflection|scratchpad)"
_THOUGHT = re.compile(rf"<({THINKING})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THOUGHT_BEGINS = re.compile(rf"<{THINKING}>", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"</{THINKING}>", re.IGNORECASE)
_HARMONY = [
    (re.compile(r"<\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|>"), "<think>"),
    (re.compile(r"<\|channel\|>\s*final[^<]*<\|message\|>"), "</think>"),
]
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | dict.fromkeys([0x3000, 0xA0, 0x202F, 0x2009], 0x20)
_INVISIBLE = dict.fromkeys(
    [0xAD, 0xFEFF, 0xFE0F, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)]
)
_CHARACTERS = _FULL_WIDTH | _INVISIBLE
LONGEST_LINE = 2000
"""No statement stands in a longer line, which bounds the time that a hostile one takes."""
QUOTED = "[quoted]"
FENCE = "```"
_CODE_FENCE = re.compile(r"\s*(?:`{3,}|~{3,})\s*[\w+-]*\s*")
_RULE = re.compile(r"[\s\-–—_=.,;·()\[\]{}]*")
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mathit)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[()\[\]]|\$+|[*`]+|</?(?:b|strong|i|em|u|span|p|code|mark)>", re.IGNORECASE)
TAG = re.compile(r"</?[A-Za-z][A-Za-z_-]+/?>")
_DISAPPROVING = "❌✗✘✖🚫👎⛔🙅"  # "❌ A" is no verdict for A
OPEN = r"[\s(\[{<\"'“‘«「『【《]*"
SHUT = r"[\s)\]}>\"'”’»」』】》]*"
NOUN = (
    r"(?i:completion|response|assistant|answer|option|candidate|model|summary|output|choice|text|version|reply"
    r"|respuesta|antwort|réponse|ответ|回答|回复|答案|选项)"
)
_SENTENCE_END = re.compile(r"[.!?](?:\s+|$)|[。！？]\s*")
LEAD = re.compile(
    r"(?:(?:and|so|thus|therefore|hence|overall|finally|ultimately|accordingly|conclusion|in conclusion|in summary"
    r"|to conclude|to summari[sz]e|in short|all in all|on balance|all things considered|in my opinion|as a result"
    r"|for these reasons|(?:after|based on|considering|given|weighing|taking)\b[^:]{0,100}?)\s*[,:]?\s*)?"
    r"(?:(?:i|we)\s+(?:conclude|decide|think|believe|find|feel|would say)(?:\s+that)?\s*[,:]?\s*)?"
    r"(?:(?:here|this) is\b\s*)?",
    re.IGNORECASE,
)
INTRO = re.compile(
    r"\s*(?P<because>(?:because|since|due to|as (?:it|its|the|they|completion|response))\b)|\s*(?:[.;,:(–—#]|-(?=\s))",
    re.I,
)
_REPORTED = re.compile(
    r"\b(?:not|no|if|unless|whether|says?|said|claims?|asks?|asked|writes?|wrote|contains?)\b|n't", re.I
)
_AFTERWARDS = re.compile(
    r"(?:the\s+|my\s+|brief\s+)*(?:reason|reasoning|reasons|explanation|rationale|justification|why|because|confidence"
    r"|note|comments?)\b|let me know|i hope|hope this|please let|feel free|thank|解释|理由|原因",
    re.IGNORECASE,
)
TURN = re.compile(
    r"(?:^|[.!?;,–—(-]\s*)(?:wait|no wait|no,|actually|hmm+|oops|sorry|correction|scratch that|on second thoughts?"
    r"|let me re|i (?:take (?:that|it) back|changed? my mind|was wrong))",
    re.IGNORECASE | re.MULTILINE,
)


def read_with(reply: str, parse: Callable[[str], T | Unclear], *, contradiction: Unclear) -> T | Unclear:
    """`parse` of what counts in the reply. Control tokens part it: then what is before may not contradict its end."""
    if not reply.strip():
        return EMPTY
    text = _without_thoughts(reply.replace("\r\n", "\n").replace("\r", "\n"))
    text = text if isinstance(text, Unclear) else _without_quotations(text)
    if isinstance(text, Unclear):
        return text
    # Letters are mapped after this: `＜think＞` is no token.
    parts = [part.translate(_CHARACTERS) for part in SPECIAL_TOKEN.split(text) if part.strip()]
    if not parts:
        return EMPTY
    *before, last = [parse(part) for part in parts]
    if not isinstance(last, Unclear) and any(not isinstance(p, Unclear) and p != last for p in before):
        return contradiction
    return last


def _without_thoughts(text: str) -> str | Unclear:
    for channel, tag in _HARMONY:
        text = channel.sub(tag, text)
    text = text.replace("[THINK]", "<think>").replace("[/THINK]", "</think>")
    text = _THOUGHT.sub("\n", text)
    # The chat template may have opened the block, so that the reply has only its end.
    text = _THOUGHT_ENDS.split(text)[-1]
    return ENDLESS if _THOUGHT_BEGINS.search(text) else text


def _without_quotations(text: str) -> str | Unclear:
    """`text` without what stands between the marks of a fence. One that never ends may hold all that follows it."""
    kept, position = [], 0
    while opening := MARK.search(text, position):
        closing = opening if opening[1] else re.compile(f"</text-{opening[2]}>").search(text, opening.end())
        if closing is None:
            return ALL_QUOTED
        kept += [text[position : opening.start()], f"\n{QUOTED}\n"]
        position = closing.end()
    return "".join(kept) + text[position:]


def lines_of(text: str) -> list[str]:
    """The lines that say something, without markdown, LaTeX and emojis; code fences stay as they part statements."""
    lines = []
    for line in TAG.sub("\n", text).splitlines():
        if _CODE_FENCE.fullmatch(line):
            lines.append(FENCE)
        elif line.lstrip().startswith(">") or len(line) > LONGEST_LINE:
            lines.append(QUOTED)
        elif not _RULE.fullmatch(line := _plain(line)):
            lines.append(line)
    return lines


def _plain(line: str) -> str:
    while _LATEX.search(line):
        line = _LATEX.sub(r"\1", line)
    line = _NOISE.sub("", line).replace("_", " ")
    line = "".join(c for c in line if unicodedata.category(c) != "So" or c in _DISAPPROVING)
    line = line.strip().lstrip("#").strip().strip("|=").strip()
    if len(line) > 2 and line[0] + line[-1] in ('""', "''", "“”", "‘’", "«»", "「」") and line[0] not in line[1:-1]:
        line = line[1:-1].strip()
    return line


def decide(
    lines: list[str],
    explicit: Callable[[str], T | Unclear | None],
    bare: Callable[[str], T | None],
    *,
    heading: re.Pattern[str],
    none: Unclear,
    contradiction: Unclear,
) -> T | Unclear:
    """The last explicit statement of the lines, else a last line that is a bare one.

    `explicit` gives None for a line without a statement, and why for one that it cannot read; a statement's value may
    stand below a line that `heading` matches.
    """
    said: dict[int, T | Unclear] = {}
    headed = False
    for i, line in enumerate(lines):
        if line == FENCE:
            continue
        below = bare(line) if headed else None
        headed = bool(heading.fullmatch(line))
        value = CUT_OFF if headed else explicit(line) if below is None else below
        if value is not None:
            said[i] = value
    if not said:
        return _decide_bare([line for line in lines if line != FENCE], bare, none, contradiction)
    at = max(said)
    last = said[at]
    if isinstance(last, Unclear):
        return last
    run = at
    while run - 1 in said:  # contradicting statements next to each other are one statement that says both
        run -= 1
        if said[run] != last and said[run] != CUT_OFF:
            return contradiction
    after = [line for line in lines[at + 1 :] if line != FENCE]
    if any((other := bare(line)) is not None and other != last for line in after):
        return contradiction
    if after and TURN.search("\n".join(after)):
        return TAKEN_BACK
    first = not any(line != FENCE and i not in said for i, line in enumerate(lines[:at]))
    return last if not after or first or _AFTERWARDS.match(after[0]) else NOT_LAST


def _decide_bare(
    lines: list[str], bare: Callable[[str], T | None], none: Unclear, contradiction: Unclear
) -> T | Unclear:
    values = [bare(line) for line in lines]
    stated = [value for value in values if value is not None]
    if any(value != stated[0] for value in stated):
        return contradiction
    if not stated:
        return none
    if values[-1] is not None:
        return stated[0]
    reasons_follow = values[0] is not None and _AFTERWARDS.match(lines[1])
    return stated[0] if reasons_follow and not TURN.search("\n".join(lines[1:])) else none


def is_stated(before: str) -> bool:
    """Whether a statement after `before` in its line stands for itself, and is not quoted or reported."""
    if before.count('"') % 2 or before.count("“") > before.count("”") or before.count("‘") > before.count("’"):
        return False
    sentence = _SENTENCE_END.split(before)[-1].strip(" \t-–—•·([{")
    sentence = re.sub(r"^[0-9]{1,2}[.)]?\s*", "", sentence)
    return bool(LEAD.fullmatch(sentence)) and not _REPORTED.search(sentence)


def unwrapped(text: str, spell: Callable[[dict[str, Any]], list[str]]) -> str:
    """`text` with each JSON object for which `spell` has lines replaced by them, or left out if it is a mention."""
    kept, position = [], 0
    for start, end, value in _objects(text):
        if lines := spell(value):
            before, after = text[position:start], text[end:].partition("\n")[0]
            line_before = text[:start].rpartition("\n")[2]
            line_before = re.sub(r"`{3,}\w*|</?\w+>", "", line_before)
            own = is_stated(
                re.sub(
                    r"(?i)(?:my |the |final )*(?:verdict|answer|json|output|result|scores?|ranking)\s*:?\s*$",
                    "",
                    line_before,
                )
            )
            alone = re.fullmatch(r"[\s`;,.\])}]*(?:<.*)?", after)
            kept += [before, "\n" + "\n".join(lines) + "\n" if own and alone else QUOTED]
            position = end
    return "".join(kept) + text[position:]


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The outermost JSON objects in a text, and Python's flat dicts, which models write in their place."""
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    position = 0
    while (start := text.find("{", position)) >= 0:
        position = start + 1
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            flat = re.compile(r"\{[^{}]*\}").match(text, start)
            if not flat or "'" not in flat[0]:
                continue
            try:
                value, end = ast.literal_eval(flat[0]), flat.end()
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
        if isinstance(value, dict):
            yield start, end, {" ".join(str(k).replace("_", " ").casefold().split()): v for k, v in value.items()}
            position = end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice with different values has none."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = value if found.get(key, value) == value else None
    return found


def in_line(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else json.dumps(value, default=str)

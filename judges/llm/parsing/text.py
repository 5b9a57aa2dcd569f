"""The part of a reply that counts, its statements, and which of them is the last: what all parsers share."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
_CHARACTERS = (
    {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms
    | dict.fromkeys([0x3000, 0xA0, 0x202F, 0x2009], 0x20)  # spaces
    | dict.fromkeys([0xAD, 0xFEFF, 0xFE0F, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)])
)
LONGEST_LINE = 2000
"""No statement stands in a longer line, which bounds the time that a hostile one takes."""
QUOTED = "[quoted]"
_RULE = re.compile(r"[\s\-–—_=.,;·()\[\]{}]*|\s*(?:`{3,}|~{3,})\s*[\w+-]*\s*")
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mathit)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[()\[\]]|\$+|[*`]+|</?[biu]>|^\s*[-•·]\s+")
_DISAPPROVING = "❌✗✘✖🚫👎⛔🙅"  # "❌ A" is no verdict for A
_TAG = re.compile(r"</?[A-Za-z][A-Za-z_-]+/?>")
_WRAPPED = re.compile(
    r"\{|\[\[(?P<brackets>[^\[\]\n]{1,80})\]\]|<(?P<tag>\w+)>(?:(?P<inner>[^<>:]{0,80})</(?P=tag)>)?", re.IGNORECASE
)
OPEN = r"[\s(\[{<\"'“‘«「『【《]*"
SHUT = r"[\s)\]}>\"'”’»」』】》]*"
NOUN = (
    r"(?i:completion|response|assistant|answer|option|candidate|model|summary|output|choice|text|version|reply"
    r"|respuesta|antwort|réponse|ответ|回答|回复|答案|选项)"
)
PLACEHOLDER = r"<[^<>0-9]*>|\[[^\[\]\"0-9]+\]|\.\.\."
"""What a format has in the place of a value, as in `Score: <1-10>`."""
LEAD = re.compile(
    r"(?:[0-9]{1,2}[.)]\s*)?(?:(?:and|so|thus|therefore|hence|overall|finally|ultimately|conclusion|in conclusion"
    r"|in summary|to conclude|in short|all in all|on balance|in my opinion"
    r"|(?:after|based on|considering|given|weighing)\b[^:]{0,100}?)\s*[,:]?\s*)?"
    r"(?:(?:i|we)\s+(?:conclude|decide|think|believe|find|would say)(?:\s+that)?\s*[,:]?\s*)?(?:(?:here|this) is\b\s*)?",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:not|no|if|unless|whether|says?|said|claims?|asks?|asked|writes?|wrote|contains?)\b|n't", re.IGNORECASE
)
_REASON = re.compile(r"\s*(?:(?:because|since|due to|as (?:it|the|they))\b|[.;,:(–—#]|-(?=\s))", re.IGNORECASE)
_TURN = re.compile(
    r"(?:^|[.!?;,–—(-]\s*)(?:wait|no wait|no,|actually|hmm+|oops|sorry|correction|scratch that|on second thoughts?"
    r"|let me re|i (?:take (?:that|it) back|changed? my mind|was wrong))",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a statement is written. `Verdict: A` is a `frame` with a `value`; `A wins.` is a `bare` one."""

    label: str
    """The key that double brackets stand for: `[[A]]` is `{"verdict": "A"}`."""
    frame: re.Pattern[str]
    """What follows a frame of its group `weak`, an `Answer: `, may be no value."""
    fields: Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]
    """Name and value of what a JSON object, or a tag as `{tag: text}`, states."""
    value: Callable[[str], T | Unclear]
    bare: Callable[[str], T | Unclear | None]
    none: Unclear
    unreadable: Unclear
    contradiction: Unclear


def read_with(reply: str, parse: Callable[[str], T | Unclear], *, contradiction: Unclear) -> T | Unclear:
    """`parse` of what counts in the reply. Control tokens part it: then what is before may not contradict its end."""
    text = reply.replace("\r\n", "\n").replace("\r", "\n")
    for channel, tag in _HARMONY:
        text = channel.sub(tag, text)
    text = _THOUGHT.sub("\n", text.replace("[THINK]", "<think>").replace("[/THINK]", "</think>"))
    # The chat template may have opened the block, so that the reply has only its end.
    text = _THOUGHT_ENDS.split(text)[-1]
    if _THOUGHT_BEGINS.search(text):
        return ENDLESS
    while opening := MARK.search(text):
        closing = opening if opening[1] else re.compile(f"</text-{opening[2]}>").search(text, opening.end())
        if closing is None:
            return ALL_QUOTED  # all that follows may be what it quotes
        text = f"{text[: opening.start()]}\n{QUOTED}\n{text[closing.end() :]}"
    # Letters are mapped after this: `＜think＞` is no token.
    parts = [part.translate(_CHARACTERS) for part in SPECIAL_TOKEN.split(text) if part.strip()]
    if not parts:
        return EMPTY
    *before, last = [parse(part) for part in parts]
    if not isinstance(last, Unclear) and any(not isinstance(p, Unclear) and p != last for p in before):
        return contradiction
    return last


def lines_of(text: str, form: Form[T]) -> list[str]:
    """The lines that say something, without markdown, LaTeX and emojis.

    JSON objects, tags and double brackets become a line for each of their fields, or `QUOTED` if the text only mentions
    them. A frame may stand before them.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    announced = re.compile(rf"(?:{form.frame.pattern}|(?:json|output|result)\s*:\s*)\Z", re.IGNORECASE)
    spellings = (text, text.replace("'", '"'))  # models write Python's dicts too
    done, position = "", 0
    for found in _WRAPPED.finditer(text):
        start, end, tag = found.start(), found.end(), found["tag"]
        unclosed = tag is not None and found["inner"] is None
        if start < position or (unclosed and f"</{tag}>" in text[end:]):
            continue  # within what was read, or around more than a value
        value: Any = {tag or form.label: found["inner"] if tag else found["brackets"]}
        if found[0] == "{":
            for spelled in spellings:
                with suppress(ValueError, RecursionError):
                    value, end = decoder.raw_decode(spelled, start)
                    break
            else:
                continue
        if stated := list(form.fields({" ".join(k.replace("_", " ").casefold().split()): v for k, v in value.items()})):
            done += text[position:start]
            before = re.sub(r"`{3,}\w*", "", _TAG.sub("", done.rpartition("\n")[2]))
            after = _TAG.sub("", _WRAPPED.sub("", text[end:].partition("\n")[0]))
            alone = is_stated(announced.sub("", before)) and re.fullmatch(r"[\s`;,.!$\])}]*", after)
            said = [f"{k}: {' '.join(v.split()) if isinstance(v, str) else json.dumps(v)}\n" for k, v in stated]
            done += "\n" + "".join(said) if unclosed or alone else QUOTED
            position = end
    lines = []
    for line in _TAG.sub("\n", done + text[position:]).splitlines():
        if line.lstrip().startswith(">") or len(line) > LONGEST_LINE:
            lines.append(QUOTED)
        elif not _RULE.fullmatch(line := _plain(line)):
            lines.append(line)
    return lines


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice with different values has none."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = value if found.get(key, value) == value else None
    return found


def _plain(line: str) -> str:
    while _LATEX.search(line):
        line = _LATEX.sub(r"\1", line)
    line = _NOISE.sub("", line).replace("_", " ")
    line = "".join(c for c in line if unicodedata.category(c) != "So" or c in _DISAPPROVING)
    return line.strip().lstrip("#").strip().strip("|=").strip()


def decide(lines: list[str], form: Form[T]) -> T | Unclear:
    """The last framed statement of the lines, else a last line that is a bare one. The value may be the line below."""

    def explicit(line: str) -> T | Unclear | None:
        frames = list(form.frame.finditer(line))
        if not frames or not is_stated(line[: frames[0].start()]):
            return None
        ends = [f.start() for f in frames[1:]] + [len(line)]
        *before, last = [form.value(line[f.end() : end]) for f, end in zip(frames, ends, strict=True)]
        if any(other not in (last, CUT_OFF) for other in before):  # "Verdict: the winner is A" says one thing
            return form.contradiction
        return None if last == form.unreadable and all(f.lastgroup == "weak" for f in frames) else last

    bares = [form.bare(line) for line in lines]
    headings = [bool(form.frame.fullmatch(line.rstrip(": ") + ":")) for line in lines]
    said: dict[int, T | Unclear] = {}
    for i, line in enumerate(lines):
        below = bares[i] if i and headings[i - 1] else None
        stated = CUT_OFF if headings[i] else explicit(line) if below is None else below
        if stated is not None:
            said[i] = stated
    readable: dict[int, T | Unclear] = {
        i: value for i, value in enumerate(bares) if value is not None and not isinstance(value, Unclear)
    }
    framed, said = bool(said), said or readable
    if not said:
        return bares[-1] if bares and isinstance(bares[-1], Unclear) else form.none
    at = max(said)
    last = said[at]
    if isinstance(last, Unclear):
        return last
    # Contradicting statements next to each other are one statement that says both.
    beside = range(next(i for i in range(at, -2, -1) if i not in said) + 1, at) if framed else said
    others = [said[i] for i in beside] + [b for i, b in readable.items() if i > at]
    if any(other not in (last, CUT_OFF, form.none) for other in others):
        return form.contradiction
    after = lines[at + 1 :]
    if _TURN.search("\n".join(after)):
        return TAKEN_BACK if framed else form.none
    first = framed and all(i in said for i in range(at))
    return last if first or not after else NOT_LAST if framed else form.none


def is_stated(before: str) -> bool:
    """Whether a statement after `before` in its line stands for itself, and is not quoted or reported."""
    if before.count('"') % 2 or before.count("“") > before.count("”") or before.count("‘") > before.count("’"):
        return False
    sentence = re.split(r"[.!?](?:\s+|$)|[。！？]\s*", before)[-1].strip(" \t-–—•·([{`")
    return bool(LEAD.fullmatch(sentence)) and not _REPORTED.search(sentence)


def only_explains(rest: str) -> bool:
    """Whether what follows a value in its line leaves it as it is: nothing, or reasons."""
    reasons = _REASON.match(rest) and not rest.startswith(("..", "…")) and "?" not in rest and not _TURN.search(rest)
    return bool(reasons or re.fullmatch(r"[.!。,;|]?", rest))


def token_mass(top_logprobs: Mapping[str, float], wanted: Collection[str]) -> dict[str, float]:
    """Probabilities of the wanted tokens in a reply's first place, up to a common factor; empty if none has any.

    Spaces, quotes and the tokenizers' marks for a space (`▁A`, `ĠA`) around a token are ignored.
    """
    found = [(t.strip(" \t\r\n▁ĠĊ\"'`*([{"), p) for t, p in top_logprobs.items()]
    found = [(t, p) for t, p in found if t in wanted and math.isfinite(p)]
    if not found:
        return {}
    top = max(p for _, p in found)  # relative to the likeliest: exp(-900) alone would be 0
    mass = dict.fromkeys(wanted, 0.0)
    for token, logprob in found:
        mass[token] += math.exp(logprob - top)
    return mass

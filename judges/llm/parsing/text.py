"""The part of a reply that counts, its statements, and which of them is the last: what all parsers share."""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

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
    r"\{|\[\[[^\[\]\n]{1,80}\]\]|\[result\]|<(?P<tag>\w+)>(?:(?P<inner>[^<>:]{0,80})</(?P=tag)>)?", re.IGNORECASE
)
OPEN = r"[\s(\[{<\"'“‘«「『【《]*"
SHUT = r"[\s)\]}>\"'”’»」』】》]*"
NOUN = (
    r"(?i:completion|response|assistant|answer|option|candidate|model|summary|output|choice|text|version|reply"
    r"|respuesta|antwort|réponse|ответ|回答|回复|答案|选项)"
)
PLACEHOLDER = r"<[^<>0-9]*>|\[[^\[\]\"0-9]+\]|\.\.\."
"""What a format has in the place of a value, as in `Score: <1-10>`."""
CONCLUDES = re.compile(
    r"(?:and\s+|so\s+)?(?:so|thus|therefore|hence|overall|finally|ultimately|conclusion|in conclusion|in summary|to conclude"
    r"|in short|all in all|on balance)\b",
    re.IGNORECASE,
)
LEAD = re.compile(
    rf"(?:[0-9]{{1,2}}[.)]\s*)?(?:(?:{CONCLUDES.pattern}|and|in my opinion"
    r"|(?:after|based on|considering|given|weighing)\b[^:]{0,100}?)\s*[,:]?\s*)?"
    r"(?:(?:i|we)\s+(?:conclude|decide|think|believe|find|would say)(?:\s+that)?\s*[,:]?\s*)?(?:(?:here|this) is\b\s*)?",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:not|no|if|unless|whether|says?|said|claims?|asks?|asked|writes?|wrote|contains?)\b|n't", re.IGNORECASE
)
BECAUSE = re.compile(r"\s*,?\s*(?:because|since|due to|as (?:it|the|they))\b", re.IGNORECASE)
_REASON = re.compile(rf"\s*(?:{BECAUSE.pattern}|[.;,:(–—#]|-(?=\s))", re.IGNORECASE)
_TURN = re.compile(
    r"(?:^|[.!?;,–—(-]\s*)(?:wait|no wait|no,|actually|hmm+|oops|sorry|correction|scratch that|on second thoughts?"
    r"|let me re|i (?:take (?:that|it) back|changed? my mind|was wrong))",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(r"(?:[^.!?。！？]|[.!?](?=[^\s\"”’)\]]))+(?:[.!?]+[\"”’)\]]*|[。！？]|$)")
Scope = Literal["sentence", "line", "reply"]
"""How much of a reply something is all of."""


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a statement is written. `Verdict: A` is a `frame` with a `value`; `A wins.` is a `bare` one."""

    frame: re.Pattern[str]
    """Of `frame_of`, or one with a group `weak`: what follows an `Answer: ` may be no value."""
    fields: Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]
    """Name and value of what a JSON object, or a tag as `{tag: text}`, states."""
    value: Callable[[str], T | Unclear]
    bare: Callable[[str, Scope], T | Unclear | None]
    none: Unclear
    unreadable: Unclear
    contradiction: Unclear


def frame_of(words: str, link: str = ":") -> re.Pattern[str]:
    """What stands before a value: `My final WORDS is: `, or a mark that is `sure` wherever it stands, `[[`, `[RESULT]`."""
    return re.compile(
        r"(?P<sure>\[\[|\[result\]\s*:?)\s*|(?<![\w\"'“‘「-])"
        rf"(?:(?:my|the|our|final|overall|ultimate|total|complete)\s+)*(?:{words})\s*(?:\((?!worst)[^()]{{0,60}}\)\s*)?"
        rf"(?:(?:is|would be|goes to|是|为)(?![a-z])\s*:?(?:\s+that\b)?|=>|->|→|=|\s[-–—]\s|{link})\s*",
        re.IGNORECASE,
    )


def read_with(reply: str, parse: Callable[[str], T | Unclear], *, contradiction: Unclear) -> T | Unclear:
    """`parse` of what counts in the reply. Control tokens part it: then what is before may not contradict its end."""
    text = reply.replace("\r\n", "\n").replace("\r", "\n").replace("[THINK]", "<think>").replace("[/THINK]", "</think>")
    for channel, tag in _HARMONY:
        text = channel.sub(tag, text)
    # The chat template may have opened the block, so that the reply has only its end.
    text = _THOUGHT_ENDS.split(_THOUGHT.sub("\n", text))[-1]
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
    contradicted = any(not isinstance(p, Unclear) and p != last for p in before)
    return contradiction if contradicted and not isinstance(last, Unclear) else last


def lines_of(text: str, form: Form[T]) -> list[str]:
    """The lines that say something, without markdown, LaTeX and emojis.

    JSON objects and tags become a line for each of their fields, and `[[A]]` a line of its own; `QUOTED` if the text only
    mentions them. A frame may stand before them, or a statement.
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
        value: dict[str, Any] = {tag: found["inner"]} if tag else {}
        for spelled in spellings if found[0] == "{" else ():
            with suppress(ValueError, RecursionError):
                value, end = decoder.raw_decode(spelled, start)
                break
        stated = form.fields({" ".join(k.replace("_", " ").casefold().split()): v for k, v in value.items()})
        said = [f"{k}: {' '.join(v.split()) if isinstance(v, str) else json.dumps(v)}\n" for k, v in stated]
        if said := [found[0]] if found[0][0] == "[" else said:
            done += text[position:start]
            before = _plain(re.sub(r"`{3,}\w*", "", _TAG.sub("", done.rpartition("\n")[2][-LONGEST_LINE:])))
            after = _plain(_TAG.sub("", _WRAPPED.sub("", text[end:].partition("\n")[0])))
            alone = is_stated(announced.sub("", before))
            if found[0][0] == "[":
                states = _explicit(before, form) or any(ends for *_, ends in _bares(before, form, "line"))
                alone = (alone or bool(states)) and (found[0][1] != "[" or only_explains(after.strip()))
            else:
                alone = alone and not after.strip(" `;,.!$])}")
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
    """The last framed statement of the lines, else a bare one that is their first or last sentence."""
    said: dict[int, tuple[T | Unclear, bool]] = {}
    bares: list[tuple[int, T | Unclear, bool, bool]] = []
    headed = False
    for i, line in enumerate(lines):
        found = _bares(line, form, "line" if len(lines) > 1 else "reply")
        bares += [(i, value, concludes, ends and i == len(lines) - 1) for value, concludes, ends in found]
        stated = _explicit(line, form)
        if headed and stated is None and ":" not in line and not isinstance(value := form.value(line), Unclear):
            stated = value, False
        headed = bool(form.frame.fullmatch(line.rstrip(": ") + ":"))
        if headed or stated is not None:
            said[i] = (CUT_OFF, False) if headed or stated is None else stated
    at = max(said, default=-1)
    last, sure = said.get(at, (form.none, False))
    ended = bool(bares) and bares[-1][3]
    if bares and (at < 0 or last == CUT_OFF) and (ended or (at < 0 and _begins(lines[0], form))):
        _, last, concludes, _ = bares[-1]
        others = [] if concludes and ended else [value for _, value, *_ in bares]
    else:
        # Contradicting statements next to each other are one statement that says both.
        spoken = said.keys() | {i for i, *_ in bares}
        beside = itertools.takewhile(spoken.__contains__, range(at - 1, -1, -1))
        others = [said[i][0] for i in beside if i in said] + [value for i, value, *_ in bares if i > at]
    if isinstance(last, Unclear):
        return last
    if any(other != last and not isinstance(other, Unclear) for other in others):
        return form.contradiction
    if not ended and _TURN.search("\n".join(lines[at + 1 :])):
        return TAKEN_BACK
    return last if ended or sure or at + 1 == len(lines) or all(i in said for i in range(at)) else NOT_LAST


def _begins(line: str, form: Form[T]) -> bool:
    """Whether the first sentence of a line is a statement of more than a label, which may be a heading."""
    first = _SENTENCE.match(line)
    return first is not None and form.bare(first[0].strip(), "sentence") is not None


def _explicit(line: str, form: Form[T]) -> tuple[T | Unclear, bool] | None:
    """What the frames of a line state, and whether it counts wherever the line stands."""
    frames = list(itertools.dropwhile(lambda f: not is_stated(line[: f.start()]), form.frame.finditer(line)))
    ends = [*(f.start() for f in frames), len(line)][1:]
    found = [(form.value(line[f.end() : end]), f.lastgroup) for f, end in zip(frames, ends, strict=True)]
    found = [(value, group) for value, group in found if group is None or value != form.unreadable]
    if not found:
        return None
    *before, (last, group) = found
    contradicts = any(value not in (last, CUT_OFF) for value, _ in before)  # "Verdict: the winner is A" says one thing
    return form.contradiction if contradicts else last, group == "sure"


def _bares(line: str, form: Form[T], scope: Scope) -> Iterator[tuple[T | Unclear, bool, bool]]:
    """The sentences of a line that are statements without a frame, whether they draw a conclusion, and end the line."""
    sentences = list(_SENTENCE.finditer(re.sub(r"^[0-9]{1,2}[.)]\s+", "", line)))
    for sentence in sentences:
        value = form.bare(sentence[0].strip(), scope if len(sentences) == 1 else "sentence")
        if value is not None and is_stated(sentence.string[: sentence.start()]):
            yield value, bool(CONCLUDES.match(sentence[0].strip())), sentence is sentences[-1]


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

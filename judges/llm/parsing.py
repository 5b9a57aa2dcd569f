"""What a judge's reply means: a verdict, scores, a ranking, or `Unclear` with its reason. Nothing is guessed.

A reply is read the same way by all parsers:

- Full-width forms (`Ａ`, `：`) are ASCII: they are what a Chinese or Japanese keyboard writes for the same letter.
  No other look-alike is mapped; a Cyrillic А is not an A. Zero-width and bidirectional marks are dropped.
- Closed `<think>` blocks are dropped, and so is what the reply copies of the prompt in its `<text-1f3c9a2b>` marks
  (`judges.llm.templates.fence`). A block that never ended gives nothing.
- The last explicit statement (`Verdict: A`, `{"verdict": "A"}`, `<verdict>A</verdict>`) counts, since a judge may
  quote the format first, or argue with itself. It has to stand at the end, or in the first line with the reasons after
  it; anywhere else it may be a quotation. It stands for itself: at the start of a line or sentence, outside quotes.
- Statements that contradict each other with nothing but blank lines between them are one statement that says both, and
  so is `A or B`. An echo of the instructions (`Verdict: A|B|tie`) says nothing.
- Without an explicit statement, a last line that is nothing but a verdict counts (`**A**`, `Completion B is better.`).

A reply that its token limit cut off can end in a verdict by chance ("Verdict: A" of "Verdict: A and B are equal"). The
text does not show it: the caller abstains by the reply's finish reason.
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

Verdict = Literal["first", "second", "tie"]
T = TypeVar("T")


class Unclear(str):
    """Why a reply gives nothing, from a short list, so that reasons can be counted: `Unclear("both verdicts")`."""


EMPTY = Unclear("an empty reply")
ENDLESS = Unclear("reasoning that never ended")
ALL_QUOTED = Unclear("a quotation that never ended")
NOTHING = Unclear("no verdict")
BOTH = Unclear("both verdicts")
CUT_OFF = Unclear("cut off")
UNREADABLE = Unclear("an unreadable verdict")
LOOK_ALIKE = Unclear("a look-alike letter")
TAKEN_BACK = Unclear("a verdict taken back")
NOT_LAST = Unclear("a verdict that is not at the end")

NO_SCORE = Unclear("no score")
SEVERAL_SCORES = Unclear("several scores")
UNREADABLE_SCORE = Unclear("an unreadable score")
OFF_SCALE = Unclear("a score off the scale")
OTHER_SCALE = Unclear("a score on another scale")

NO_RANKING = Unclear("no ranking")
SEVERAL_RANKINGS = Unclear("several rankings")
UNREADABLE_RANKING = Unclear("an unreadable ranking")
TIED_RANKING = Unclear("a tie in the ranking")
NOT_ALL_RANKED = Unclear("not every completion ranked once")


@lru_cache(maxsize=64)  # a reply is read twice, and those of a judge that is held to its form are one of three
def parse_verdict(reply: str) -> Verdict | Unclear:
    r"""Which of the completions A (the first) and B (the second) a reply prefers.

    The shipped prompts ask for a last line `Verdict: A`, `Verdict: B` or `Verdict: tie`. Others that are read: JSON
    and XML with such a key, `[[A]]` (`[[C]]` is MT-bench's tie), `\boxed{A}`, `Answer: (B)`, `Winner: Assistant A`,
    `A > B`, and what the module's docstring says of last lines. A lower-case `a` counts only after `Verdict:` and the
    like. `A or B`, `A/B` and `both` are Unclear: the prompt offers "tie" for a tie. `neither` after `Verdict:` is a
    tie, since no completion wins.
    """
    return _read(reply, _verdict_in, contradiction=BOTH)


def parse_scores(reply: str, criteria: Sequence[str], *, low: float, high: float) -> dict[str, float] | Unclear:
    """The score on each criterion, from `low` to `high`.

    Of a single criterion, `Score: 7` and `Rating: 7` are it, whatever its name, and so is a last line of a number
    alone; of several, each is named: lines `Helpfulness: 7`, or JSON. `7/10` and `7 out of 10` are read on a scale to
    10, and Unclear on any other. So are `7 or 8`, `7-8`, `about 7`, `seven`, `7,5`, and a number off the scale.
    """
    if len(criteria) == 1:
        score = _read(reply, lambda text: _score_in(text, criteria[0], low, high), contradiction=SEVERAL_SCORES)
        return score if isinstance(score, Unclear) else {criteria[0]: score}
    return _read(reply, lambda text: _scores_in(text, criteria, low, high), contradiction=SEVERAL_SCORES)


def parse_ranking(reply: str, count: int) -> list[int] | Unclear:
    """The `count` completions as shown, by index from 0, best first: `Ranking: 2 > 1 > 3` is `[1, 0, 2]`.

    Labels are numbers from 1 or letters from A. Separators are `>`, `,`, `;` and `->`; `<` and `=` are Unclear. JSON
    lists and numbered lines (`1. Completion 2`) are read too. Numbered lines with words after the label, in the order
    shown and under no heading that speaks of a ranking, are Unclear: they may be a discussion, one completion after
    the other.
    """
    return _read(reply, lambda text: _ranking_in(text, count), contradiction=SEVERAL_RANKINGS)


def verdict_probability(top_logprobs: Mapping[str, float]) -> float | Unclear:
    """P(first) from the alternatives for a verdict's token: the mass of `A` over that of `A` and `B`.

    Spaces, quotes and the tokenizers' marks for a space (`▁A`, `ĠA`) around the letter are ignored. All other tokens
    are left out of the sum. Where only one of both is among the alternatives, it has all of the mass.
    """
    mass = _mass(top_logprobs, {"A", "B"})
    return mass["A"] / (mass["A"] + mass["B"]) if mass else NOTHING


def expected_score(top_logprobs: Mapping[str, float], low: int, high: int) -> float | Unclear:
    """The mean of the scores `low` to `high` under the probabilities of their tokens, renormalised.

    Raises:
        ValueError: the scale leaves 0 to 9, where a score can be several tokens, and "1" the beginning of "10".
    """
    if not 0 <= low < high <= 9:
        raise ValueError(f"expected scores need a scale within 0 to 9, of single digits, not {low} to {high}")
    mass = _mass(top_logprobs, {str(s) for s in range(low, high + 1)})
    return sum(int(s) * p for s, p in mass.items()) / sum(mass.values()) if mass else NO_SCORE


def _mass(top_logprobs: Mapping[str, float], wanted: Collection[str]) -> dict[str, float]:
    """Probabilities of the wanted tokens, up to a common factor; empty where none has any."""
    found = [(t.strip(" \t\r\n▁ĠĊ\"'`*([{"), p) for t, p in top_logprobs.items()]
    found = [(t, p) for t, p in found if t in wanted and math.isfinite(p)]
    if not found:
        return {}
    top = max(p for _, p in found)  # relative to the likeliest: exp(-900) alone would be 0
    mass = dict.fromkeys(wanted, 0.0)
    for token, logprob in found:
        mass[token] += math.exp(logprob - top)
    return mass


# --- What all parsers share: the text that counts, its lines, and which statement in it is the last. ---

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
_QUOTED = "[quoted]"
_FENCE = "```"
_CODE_FENCE = re.compile(r"\s*(?:`{3,}|~{3,})\s*[\w+-]*\s*")
_RULE = re.compile(r"[\s\-–—_=.,;·()\[\]{}]*")
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mathit)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[()\[\]]|\$+|[*`]+|</?(?:b|strong|i|em|u|span|p|code|mark)>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][A-Za-z_-]+/?>")
_DISAPPROVING = "❌✗✘✖🚫👎⛔🙅"  # "❌ A" is no verdict for A

_OPEN = r"[\s(\[{<\"'“‘«「『【《]*"
_SHUT = r"[\s)\]}>\"'”’»」』】》]*"
_SENTENCE_END = re.compile(r"[.!?](?:\s+|$)|[。！？]\s*")
_LEAD = re.compile(
    r"(?:(?:and|so|thus|therefore|hence|overall|finally|ultimately|accordingly|conclusion|in conclusion|in summary"
    r"|to conclude|to summari[sz]e|in short|all in all|on balance|all things considered|in my opinion|as a result"
    r"|for these reasons|(?:after|based on|considering|given|weighing|taking)\b[^:]{0,100}?)\s*[,:]?\s*)?"
    r"(?:(?:i|we)\s+(?:conclude|decide|think|believe|find|feel|would say)(?:\s+that)?\s*[,:]?\s*)?"
    r"(?:(?:here|this) is\b\s*)?",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:not|no|if|unless|whether|says?|said|claims?|asks?|asked|writes?|wrote|contains?)\b|n't", re.I
)
_AFTERWARDS = re.compile(
    r"(?:the\s+|my\s+|brief\s+)*(?:reason|reasoning|reasons|explanation|rationale|justification|why|because|confidence"
    r"|note|comments?)\b|let me know|i hope|hope this|please let|feel free|thank|解释|理由|原因",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"(?:^|[.!?;,–—(-]\s*)(?:wait|no wait|no,|actually|hmm+|oops|sorry|correction|scratch that|on second thoughts?"
    r"|let me re|i (?:take (?:that|it) back|changed? my mind|was wrong))",
    re.IGNORECASE | re.MULTILINE,
)


def _read(reply: str, parse: Callable[[str], T | Unclear], *, contradiction: Unclear) -> T | Unclear:
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
        kept += [text[position : opening.start()], f"\n{_QUOTED}\n"]
        position = closing.end()
    return "".join(kept) + text[position:]


def _lines(text: str) -> list[str]:
    """The lines that say something, without markdown, LaTeX and emojis; code fences stay as they part statements."""
    lines = []
    for line in _TAG.sub("\n", text).splitlines():
        if _CODE_FENCE.fullmatch(line):
            lines.append(_FENCE)
        elif line.lstrip().startswith(">") or len(line) > LONGEST_LINE:
            lines.append(_QUOTED)
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


def _decide(
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
        if line == _FENCE:
            continue
        below = bare(line) if headed else None
        headed = bool(heading.fullmatch(line))
        value = CUT_OFF if headed else explicit(line) if below is None else below
        if value is not None:
            said[i] = value
    if not said:
        return _decide_bare([line for line in lines if line != _FENCE], bare, none, contradiction)
    at = max(said)
    last = said[at]
    if isinstance(last, Unclear):
        return last
    run = at
    while run - 1 in said:  # contradicting statements next to each other are one statement that says both
        run -= 1
        if said[run] != last and said[run] != CUT_OFF:
            return contradiction
    after = [line for line in lines[at + 1 :] if line != _FENCE]
    if any((other := bare(line)) is not None and other != last for line in after):
        return contradiction
    if after and _TURN.search("\n".join(after)):
        return TAKEN_BACK
    first = not any(line != _FENCE and i not in said for i, line in enumerate(lines[:at]))
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
    return stated[0] if reasons_follow and not _TURN.search("\n".join(lines[1:])) else none


def _stated(before: str) -> bool:
    """Whether a statement after `before` in its line stands for itself, and is not quoted or reported."""
    if before.count('"') % 2 or before.count("“") > before.count("”") or before.count("‘") > before.count("’"):
        return False
    sentence = _SENTENCE_END.split(before)[-1].strip(" \t-–—•·([{")
    sentence = re.sub(r"^[0-9]{1,2}[.)]?\s*", "", sentence)
    return bool(_LEAD.fullmatch(sentence)) and not _REPORTED.search(sentence)


def _unwrapped(text: str, spell: Callable[[dict[str, Any]], list[str]]) -> str:
    """`text` with each JSON object for which `spell` has lines replaced by them, or left out where it is a mention."""
    kept, position = [], 0
    for start, end, value in _objects(text):
        if lines := spell(value):
            before, after = text[position:start], text[end:].partition("\n")[0]
            line_before = text[:start].rpartition("\n")[2]
            line_before = re.sub(r"`{3,}\w*|</?\w+>", "", line_before)
            own = _stated(
                re.sub(
                    r"(?i)(?:my |the |final )*(?:verdict|answer|json|output|result|scores?|ranking)\s*:?\s*$",
                    "",
                    line_before,
                )
            )
            alone = re.fullmatch(r"[\s`;,.\])}]*(?:<.*)?", after)
            kept += [before, "\n" + "\n".join(lines) + "\n" if own and alone else _QUOTED]
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


def _in_line(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else json.dumps(value, default=str)


# --- Verdicts ---

_NOUN = (
    r"(?i:completion|response|assistant|answer|option|candidate|model|summary|output|choice|text|version|reply"
    r"|respuesta|antwort|réponse|ответ|回答|回复|答案|选项)"
)
_LABEL = rf"{_OPEN}(?:(?i:the)\s+)?(?:{_NOUN}\s*)?{_OPEN}([AB])(?!\w|['’]\w){_SHUT}"
_BETTER = (
    r"(?:(?:is|was|would be)\s+(?:(?:clearly|slightly|much|far|significantly|marginally|definitely|overall|still)\s+)?"
    rf"(?:the\s+)?(?:better|best|winner|preferred|preferable|superior|stronger|winning)(?:\s+(?:one|overall|{_NOUN}))?"
    r"|wins)"
)
_CHOICE = re.compile(
    rf"{_LABEL}\s*(?:(?i:{_BETTER})(?:\s+(?i:than|over)\s+{_LABEL})?|,?\s*(?i:over|rather than|not)\s+{_LABEL})?"
)
_CHOSEN = re.compile(
    r"(?i:(?:i|we)(?:\s+would|['’]d|\s+will|['’]ll)?\s+(?:prefer|choose|pick|select|vote for|go with|favou?r)"
    rf"|(?:better|preferred|best|winner)\s*[:=])\s+{_LABEL}(?:\s+(?i:over)\s+{_LABEL})?"
)
_COMPARED = re.compile(rf"{_OPEN}(?:{_NOUN}\s+)?([AB])\s*(>+|<+|=+|≈|≻)\s*(?:{_NOUN}\s+)?([AB]){_SHUT}\s*")
_TIE = re.compile(
    rf"{_OPEN}(?:(?:it['’]?s|it is|this is|we have|i call it|they(?: are|['’]re)|the two(?: {_NOUN}s)? are"
    rf"|both(?: {_NOUN}s| of them)?(?: are)?|(?:{_NOUN}s? )?A and (?:{_NOUN} )?B are)\s+)?(?:an?\s+|the\s+)?"
    r"(?:(?:tie|draw)(?:\s+between\s+(?:the two|A and B))?|tied|equally\s+\w+|equal in quality|of equal quality"
    r"|empate|unentschieden|égalité|平局|平手|引き分け|ничья|تعادل)"
    rf"(?!\w){_SHUT}",
    re.IGNORECASE,
)
_NO_WINNER = re.compile(
    rf"{_OPEN}(?:neither(?:\s+(?:one|{_NOUN}))?(?:\s+is\s+(?:clearly\s+)?(?:better|superior|preferred|the winner))"
    rf"|no (?:clear )?winner|no preference){_SHUT}",
    re.IGNORECASE,
)
_FRAMED_TIE = re.compile(
    rf"{_OPEN}(?:neither(?: A nor B)?|(?:both(?: are)?\s+)?(?:equal|the same|same|identical)|even){_SHUT}",
    re.IGNORECASE,
)
_FRAME_WORD = (
    r"(?:(?:my|the|our|final|overall|ultimate)\s+)*(?P<word>verdict|winner|decision|choice|judge?ment|preference|pick"
    r"|selection|vote|answer|conclusion|(?:better|best|preferred|stronger|superior|winning)\s+"
    rf"(?:one|{_NOUN})|veredicto|veredito|ganador|vencedor|urteil|gewinner|вердикт|победитель|判决|裁决|判定|结论|最终判断"
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
    rf"{_OPEN}(?:A{{0}}B(?:{{0}}(?:tie|draw|equal|C))|<[^<>]*>|\[(?:your|insert|choose|one of)[^\]]*\]|\.\.\.|A\|B)"
    rf"{_SHUT}[.\s]*".replace("{0}", r"[\"'”’`,|/\s]*(?:or)?[\"'“‘`,|/\s]*"),
    re.IGNORECASE,
)
_INTRO = re.compile(
    r"\s*(?P<because>(?:because|since|due to|as (?:it|its|the|they|completion|response))\b)|\s*(?:[.;,:(–—#]|-(?=\s))",
    re.I,
)
_VERDICT_KEYS = [
    "final verdict", "verdict", "winner", "preference", "preferred", "decision", "choice", "judgment", "judgement",
    "better", "final answer", "answer",
]  # fmt: skip
_VERDICT_TAGS = "verdict|winner|answer|final_answer|final_verdict|choice|decision|preference|judge?ment"
_VERDICT_TAG = re.compile(rf"<({_VERDICT_TAGS})>([^<>:]{{0,80}})</\1>", re.IGNORECASE)
_UNCLOSED_TAG = re.compile(rf"<({_VERDICT_TAGS})>(?!.*</\1>)", re.IGNORECASE | re.DOTALL)


def _verdict_in(text: str) -> Verdict | Unclear:
    text = re.sub(r"\[\[\s*C\s*\]\]", "[[tie]]", text)
    text = _unwrapped(text, _spelled_verdict)
    text = _UNCLOSED_TAG.sub("\nVerdict: (cut off) ", text)
    text = "\n".join(_untagged(line) for line in _joined_tags(text).split("\n"))
    lines = [line for line in _lines(text) if not _is_echo(line)]
    alone = sum(line != _FENCE for line in lines) == 1
    return _decide(
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
    # "verdict" beside "answer" is the verdict; of two others, neither is the verdict more than the other.
    strong = [key for key in keys if "verdict" in key or key == "winner"] or keys
    return [f"Verdict: {_in_line(value[key])}" for key in strong]


def _joined_tags(text: str) -> str:
    return _VERDICT_TAG.sub(lambda m: f"<{m[1]}>{' '.join(m[2].split())}</{m[1]}>", text)


def _untagged(line: str) -> str:
    """A line with `<verdict>A</verdict>` as lines `Verdict: A`; a tag that the line only mentions becomes a quotation."""

    def spell(match: re.Match[str]) -> str:
        own = _stated(_TAG.sub("", _VERDICT_TAG.sub(".", line[: match.start()])))
        alone = re.fullmatch(r"[\s.!]*", _TAG.sub("", _VERDICT_TAG.sub("", line[match.end() :])))
        return f"\nVerdict: {match[2]}\n" if own and alone else _QUOTED

    return _VERDICT_TAG.sub(spell, line)


def _is_echo(line: str) -> bool:
    """Whether a line repeats the instructions: `Verdict: <A, B or tie>`."""
    frame = _FRAME.search(line)
    return bool(frame and _ECHO.fullmatch(line[frame.end() :]) and not _bracketed_label(line[frame.end() :]))


def _bracketed_label(value: str) -> bool:
    return bool(re.fullmatch(rf"{_LABEL}|{_OPEN}[ab]{_SHUT}|{_OPEN}(?:tie|draw){_SHUT}", value, re.IGNORECASE))


def _framed_verdict(line: str) -> Verdict | Unclear | None:
    """What `Verdict: …` in the line says. None where there is none, or an `Answer: …` that is no verdict."""
    frames = list(_FRAME.finditer(line))
    if not frames or not _stated(line[: frames[0].start()]):
        bracketed = re.search(r"\[\[\s*(\w+)\s*\]\][\s.!]*$", line)
        return _verdict_value(bracketed[1]) if bracketed and _stated(line[: bracketed.start()]) else None
    ends = [frame.start() for frame in frames[1:]] + [len(line)]
    *before, value = [_verdict_value(line[frame.end() : end]) for frame, end in zip(frames, ends, strict=True)]
    if any(other not in (value, CUT_OFF) for other in before):  # "Verdict: the winner is A" says one thing
        return BOTH
    readable = not isinstance(value, Unclear) or value in (BOTH, LOOK_ALIKE)
    return value if readable or any(frame["word"].lower() in _STRONG for frame in frames) else None


def _verdict_value(text: str) -> Verdict | Unclear:
    text = text.strip()
    if text.count('"') % 2 or text.count("”") > text.count("“"):
        return UNREADABLE  # the end of a quotation that began in a line above
    if lower := re.fullmatch(rf"{_OPEN}(?:{_NOUN}\s+)?([ab]){_SHUT}[.!]?", text):
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


def _compared(left: str, sign: str, right: str) -> Verdict | Unclear:
    if left == right:
        return UNREADABLE
    if sign[0] in "=≈":
        return "tie"
    return "first" if (left == "A") == (sign[0] in ">≻") else "second"


def _only_explains(verdict: Verdict, rest: str) -> bool:
    """Whether what follows a verdict in its line leaves it as it is: nothing, or reasons."""
    rest = rest.rstrip()
    if re.fullmatch(r"[.!。,;]?", rest):
        return True
    intro = _INTRO.match(rest)
    if not intro or (rest.startswith((".", "…")) and rest[:2] in ("..", "…")) or "?" in rest or _TURN.search(rest):
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
    return not re.search(rf"(?:[,;.]|\b(?:and|or|but)\b)\s*(?:{_NOUN}\s+)?{other}", reasons)


def _why_unreadable(text: str) -> Unclear:
    if not text.strip(" .:-*"):
        return CUT_OFF
    if _looks_alike(text):
        return LOOK_ALIKE
    both = re.search(r"\bA\b(?!\s+(?!and\b|or\b|is\b|because\b)[a-z])", text) and re.search(r"\bB\b", text)
    return BOTH if both or re.match(rf"{_OPEN}both\b", text, re.IGNORECASE) else UNREADABLE


def _looks_alike(text: str) -> bool:
    """Whether the text is a letter that only looks like A or B, with or without a noun."""
    return bool(re.fullmatch(rf"{_OPEN}(?:\w+\s*:?\s+)?[АВΑΒавᎪᏴꓮꓐᗅᗷ]{_SHUT}[.!]?", text))


def _bare_verdict(line: str, *, alone: bool) -> Verdict | None:
    """What a line says that is nothing but a verdict. `Completion A` may be a heading, except where it is `alone`."""
    line = line.strip()
    if lead := re.match(r"(?:[-•·]\s+|[0-9]{1,2}[.)]\s+)", line):
        line = line[lead.end() :]
    stated = line
    for pattern in (_CHOICE, _CHOSEN, _COMPARED):
        opening = _LEAD.match(line)
        for start in {0, opening.end() if opening else 0}:
            if match := re.compile(pattern.pattern + r"[.!。]?").fullmatch(line, start):
                if pattern is _COMPARED:
                    value = _compared(*match.groups()[:3])
                    return None if isinstance(value, Unclear) else value
                label, *others = [group for group in match.groups() if group]
                if label in others or (start and match[0].strip(" .!()[]'\"") == label):
                    continue  # "so A", "Finally: A": an enumeration, as likely as a verdict
                heading = pattern is _CHOICE and re.fullmatch(
                    rf"{_OPEN}(?:the\s+)?{_NOUN}\s*{_OPEN}[AB]{_SHUT}[.!]?", stated
                )
                return None if heading and not alone else "first" if label == "A" else "second"
    opening = _LEAD.match(line)
    for start in {0, opening.end() if opening else 0}:
        for pattern in (_TIE, _NO_WINNER):
            if re.compile(pattern.pattern + r"[.!。]?", re.IGNORECASE).fullmatch(line, start):
                return "tie"
    return None


# --- Scores ---

_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?"
_SCORED = re.compile(
    rf"{_OPEN}(?P<score>{_NUMBER}){_SHUT}(?:(?:/|out\s+of|von|sur|de|из)\s*(?P<of>{_NUMBER}))?\s*(?:(?P<percent>%)|points?|stars?|分)?"
    rf"(?![\w%+/½¼¾]){_SHUT}",
    re.IGNORECASE,
)
_ANOTHER = re.compile(r"\s*(?:or|to|and|bis|[-–—~→>,;.:]+)\s*[-+]?[0-9]", re.IGNORECASE)
_GENERIC = (
    r"scores?|ratings?|grade|mark|punktzahl|bewertung|puntuación|puntuacion|note|nota|оценка|评分|得分|分数|スコア"
)
_GIVEN = re.compile(r"(?:i|we)(?:['’]d|\s+would|\s+will)?\s+(?:give|rate|score|assign)\b[^.0-9]{0,60}\s", re.IGNORECASE)


def _score_in(text: str, criterion: str, low: float, high: float) -> float | Unclear:
    name = _spaced(criterion)
    generic = {"score", "rating", "final score", "overall score", "overall", "overall rating"}

    def spell(value: dict[str, Any]) -> list[str]:
        values = _flat_scores(value)
        keys = [key for key in values if key == name] or [key for key in values if key in generic]
        return [f"Score: {_in_line(values[key])}" for key in keys]

    words = rf"{re.escape(name)}|{_GENERIC}"
    frame, heading = (
        _score_frame(words),
        re.compile(rf"(?:(?:my|the|final|overall|total)\s+)*(?:{words})\s*:?", re.IGNORECASE),
    )
    tag = re.compile(rf"<({words}|final_score)>([^<>]{{0,50}})</\1>", re.IGNORECASE)

    def explicit(line: str) -> float | Unclear | None:
        frames = list(frame.finditer(line))
        if not frames or not _stated(line[: frames[0].start()]):
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
        lambda m: f"\nScore: {m[2].strip()}\n" if _stated(text[: m.start()].rpartition("\n")[2]) else _QUOTED, text
    )
    lines = [line for line in _lines(_unwrapped(text, spell)) if not _placeholder(line, frame, low, high)]
    last = next((_SCORED.fullmatch(line) for line in reversed(lines) if line != _FENCE), None)
    none = _number(last[0], low, high) if last else NO_SCORE
    return _decide(
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
        return [f"{name}: {_in_line(values[name])}" for name in names if name in values]

    found: dict[str, list[tuple[int, float | Unclear]]] = {criterion: [] for criterion in criteria}
    pieces = [piece for line in _lines(_unwrapped(text, spell)) for piece in apart.split(line)]
    for position, piece in enumerate(pieces):
        match = frame.search(piece)
        if match and _stated(piece[: match.start()]) and not _placeholder(piece, frame, low, high):
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
    if not re.fullmatch(r"[.!。,;|]?", rest) and (not _INTRO.match(rest) or "?" in rest or rest.startswith("..")):
        return UNREADABLE_SCORE
    if _TURN.search(rest):
        return Unclear("a score taken back")
    if (match["of"] and float(match["of"]) != high) or (match["percent"] and high != 100):
        return OTHER_SCALE
    score = float(match["score"])
    return score if low <= score <= high else OFF_SCALE


def _placeholder(line: str, frame: re.Pattern[str], low: float, high: float) -> bool:
    """Whether a line repeats the instructions: `Score: <1-10>`."""
    match = frame.search(line)
    value = line[match.end() :] if match else ""
    scale = rf"{_OPEN}{low:g}\s*(?:-|–|to)\s*{high:g}{_SHUT}[.\s]*"
    return bool(re.fullmatch(rf"{scale}|<[^<>0-9]*>|\[[^\]0-9]+\]|_+|\.\.\.|X|N", value)) if match else False


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


# --- Rankings ---

_RANKING = re.compile(
    r"(?<![\w\"'“‘])(?:(?:my|the|final|overall|complete)\s+)*(?:ranking|rankings|ranked list|rank order|order|排名|排序"
    r"|(?:from\s+)?best to worst)\b(?P<how>[^:\n\"0-9]{0,60}?)\s*(?:is\s*:?|:|=>|->|→|=)\s*",
    re.IGNORECASE,
)
_RANKING_HEADING = re.compile(
    r"(?:[^:\n]{0,80}\b(?:rank\w*|best to worst|order)\b[^:\n]{0,40}|.{0,20}(?:排名|排序).{0,20}):?", re.IGNORECASE
)
_RANKED = re.compile(rf"{_OPEN}(?:{_NOUN}\s*)?#?([0-9]{{1,3}}|[A-Z]){_SHUT}")
_PLACE = re.compile(
    rf"\s*(?:#|rank\s+)?([0-9]{{1,3}})(?:st|nd|rd|th)?(?:\s+place)?\s*[.):\-]\s*{_OPEN}"
    rf"(?:(?P<noun>{_NOUN})\s*#?)?([0-9]{{1,3}}|[A-Z])(?!\w){_SHUT}(?P<rest>.*)",
    re.IGNORECASE,
)
_RANKING_KEYS = ("final ranking", "ranking", "order", "ranked", "rankings", "rank")


def _ranking_in(text: str, count: int) -> list[int] | Unclear:
    def spell(value: dict[str, Any]) -> list[str]:
        key = next((key for key in _RANKING_KEYS if key in value), None)
        if key is None:
            return []
        ranking = value[key]
        listed = isinstance(ranking, list) and all(isinstance(r, str | int) for r in ranking)
        return [f"Ranking: {' > '.join(map(str, ranking)) if listed else _in_line(ranking)}"]

    def explicit(line: str) -> list[int] | Unclear | None:
        frames = list(_RANKING.finditer(line))
        if not frames or not _stated(line[: frames[0].start()]):
            return None
        if len(frames) > 1:
            return SEVERAL_RANKINGS
        value = line[frames[0].end() :]
        if re.search(r"worst\s+(?:first|to)|ascending", line, re.IGNORECASE):
            return UNREADABLE_RANKING
        if re.fullmatch(r"<[^<>]*>[.]?|\.\.\.|\[[a-z ,.]+\]", value):
            return None
        return _ranking_value(value, count, spaced=True)

    def bare(line: str) -> list[int] | None:
        value = _ranking_value(line, count, spaced=False)
        return None if isinstance(value, Unclear) else value

    lines = _lines(_unwrapped(text, spell))
    numbered = _numbered(lines, count)
    heading = re.compile(r"(?:(?:my|the|final|overall)\s+)*ranking\s*:?", re.IGNORECASE)
    if numbered is not None:
        said = [value for line in lines if (value := explicit(line)) is not None and not line.endswith(":")]
        if not said:
            return numbered
    decided = _decide(lines, explicit, bare, heading=heading, none=NO_RANKING, contradiction=SEVERAL_RANKINGS)
    if decided == NO_RANKING and lines:
        value = _ranking_value(lines[-1], count, spaced=False)
        listed = re.fullmatch(rf"(?:{_RANKED.pattern}\s?[>,;=<~≈]+){{1,99}}{_RANKED.pattern}", lines[-1])
        return value if listed and isinstance(value, Unclear) else decided
    return decided


def _ranking_value(text: str, count: int, *, spaced: bool) -> list[int] | Unclear:
    text = re.split(r"\s+(?:because|since)\b|\.\s+(?=[A-Z][a-z])|\s\((?=[a-z]{3})", text.strip())[0].rstrip(" .!。")
    if not text:
        return CUT_OFF
    if re.search(r"[=~≈]", text.replace("=>", "")):
        return TIED_RANKING
    text = text.strip(" [](){}\"'")
    parts = re.split(r"\s*(?:=>|->|→|>+|≻|,?\s+and\s+|,|;)\s*", text)
    if len(parts) == 1 and spaced:
        parts = text.split()
    labels = [_RANKED.fullmatch(part) for part in parts]
    if not all(labels):
        return UNREADABLE_RANKING
    return _permutation([label[1] for label in labels if label], count)


def _permutation(labels: Sequence[str], count: int) -> list[int] | Unclear:
    numbers = [str(i + 1) for i in range(count)]
    letters = [chr(ord("A") + i) for i in range(min(count, 26))]
    for shown in (numbers, letters):
        if sorted(labels) == sorted(shown):
            return [shown.index(label) for label in labels]
    known = set(labels) <= set(numbers) or set(labels) <= set(letters)
    return NOT_ALL_RANKED if known else UNREADABLE_RANKING


def _numbered(lines: list[str], count: int) -> list[int] | None:
    """The ranking of lines `1. Completion 2`, where there are `count` of them, numbered so, and no others."""
    places = [(i, match) for i, line in enumerate(lines) if (match := _PLACE.fullmatch(line))]
    if [match[1] for _, match in places] != [str(k + 1) for k in range(count)] or count < 2:
        return None
    for _, match in places:
        if not match["noun"] and not re.match(r"\s*(?:[:(,.–—]|-\s|$)", match["rest"]):
            return None  # "1. A good answer", "2. 3 mistakes"
    ranking = _permutation([match[3] for _, match in places], count)
    if isinstance(ranking, Unclear):
        return None
    first = places[0][0]
    headed = first > 0 and bool(_RANKING_HEADING.fullmatch(lines[first - 1]))
    discussion = ranking == list(range(count)) and any(match["rest"].strip(" .") for _, match in places)
    return ranking if headed or not discussion else None

r"""Prepares expressions for math-verify, which finds a number in anything: what is compared is whole, or not at all. Pure.

gold `5\sqrt{2} \text{ cm}`     ->  `5\sqrt{2}` with the unit `cm`
gold `10\text{ or }12`          ->  `10,12`
gold `it depends`               ->  words: comparable with the same words alone
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Expression(NamedTuple):
    r"""`Expression(r"5\sqrt{2}", unit="cm", words=False)`. `words`: it is a text, not mathematics."""

    latex: str
    unit: str
    words: bool


def boxes(text: str) -> list[str]:
    r"""The contents of the last `\boxed{...}` or `\fbox{...}`, and of those before it that belong to it, as in `x =
    \boxed{1}` or `\boxed{2}`. Braces are balanced; a box that is never closed goes on to the end.
    """
    found: list[str] = []
    last = 0
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text):
        if match.start() < last:
            continue  # a box in a box
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        found = found if BETWEEN.fullmatch(text, last, match.start()) else []
        content = text[match.end() : end - 1 if depth == 0 else end]
        found, last = [*(each for each in found if each != content), content], end
    return found


BETWEEN = re.compile(r"(?:\s|[$,;]|\\\(|\\\)|\\text\{|\}|\b(?:and|or)\b|[A-Za-z]\w?\s*=)*")


def gold_expression(text: str) -> Expression | None:
    """The expression of a gold text: what is in its last box, or between its only pair of dollars, or all of it.

    None if the text has several expressions amid words, so that there is no saying which one is the answer.
    """
    if found := boxes(text):
        return expression(",".join(found))
    inner = [next(filter(None, groups)) for groups in MATHS.findall(text)]
    if inner:
        rest = MATHS.sub("", text)
        if len(inner) > 1 and re.search(r"\w", re.sub(r"\b(?:and|or)\b", "", rest)):
            return None
        if len(inner) == 1 and re.search(r"[0-9]", rest):
            return None
        return expression(",".join(inner))
    return expression(text)


MATHS = re.compile(r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
TEXT = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname|rm)\s*\{([^{}]*)\}"
SHORT = "cm|mm|km|dm|nm|kg|mg|ml|mL|cl|dl|kL|ft|in|yd|mi|lb|oz|hr|Hz|kW|kJ|kN|Pa|mA|am|pm|AM|PM|cd"
UNIT = re.compile(
    rf"(?<=[\w}}\])])(?:\s|\\[,;:! ]|~)*(?:{TEXT}|(?<=\s)((?:{SHORT}|[A-Za-z]{{3,12}})\.?))(?:\^\{{?[0-9]\}}?)?\.?$"
)


def expression(text: str) -> Expression:
    r"""`text`, an answer, without what does not count: dollars, spaces, `\left`, its unit, `or` between its parts."""
    text = re.sub(r"(?<!\\)(?:\$|\\\(|\\\)|\\\[|\\\])", " ", text).strip()
    text = re.sub(r"\\(?:left|right|displaystyle|limits|big|Big|bigg)(?![A-Za-z])", "", text)
    text = re.sub(r"(?<!\\)\\[!$]|^[£€¥]", "", text)
    text = re.sub(r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|~", " ", text)
    text = text.replace("{,}", ",")
    text = re.sub(
        r"\\(?:underline|textbf|mathbf|bm|boldsymbol)\s*(?=\{[-+0-9.,]+\})|^\s*(?:\\approx(?![A-Za-z])|≈)", "", text
    )
    text = re.sub(r"^([-+]?[0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,3})$", r"\1 \\cdot 10^{\2}", text)
    if not re.search(r"[(\[]|\\\{", text):  # where a comma divides
        text = re.sub(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|°", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or|,)\s*\}|\s(?:and|or)\s", ",", text).strip().rstrip(".")
    text = re.sub(r"\\varnothing(?![A-Za-z])", r"\\emptyset", text)
    text = REPEATING.sub(_fraction, text)
    unit = ""
    if found := re.search(r"(?<=[0-9}])\s*\\?%$", text):
        text, unit = text[: found.start()], "%"
    elif found := UNIT.search(text):
        before = text[: found.start()]
        named = (found[1] if found[1] is not None else found[2] or "").strip(" .~")
        name, _, value = before.rpartition("=")
        value = value if is_name(name.strip()) else before
        if re.search(r"[0-9]|\\(?:frac|sqrt|pi)", value) and not re.search(
            r"[=<>,]|\\(?:text|[lg]eq?\b)|\\[A-Za-z]+\s*$", value.replace(r"\pi", "1")
        ):
            text, unit = before.strip(), named
    plain = re.sub(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[A-Za-z]+", " ", re.sub(TEXT, r" \1 ", text))
    words = bool(re.search(TEXT, text) and re.search(r"[A-Za-z]", plain)) or bool(
        re.search(r"[A-Za-z]{3}", plain) and "\\" not in text
    )
    return Expression(text, unit.lower().rstrip("s"), words)


REPEATING = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\overline\s*\{?([0-9]+)\}?")


def _fraction(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as `\frac{15}{90}`."""
    whole, once, again = match.groups()
    below = "9" * len(again) + "0" * len(once)
    return rf"\frac{{{int(whole + once + again) - int((whole + once) or 0)}}}{{{below}}}"


CHOICE = re.compile(rf"\(?(?:{TEXT}|([A-Za-z]{{1,5}}))\)?\.?")


def choice(text: str) -> str | None:
    r"""What `\text{(C)}`, `(C)`, `C`, `\text{Yes}` or `true` chooses among options; None of anything else."""
    found = CHOICE.fullmatch(text.strip())
    letter = (found[1] if found[1] is not None else found[2]).strip(" ().") if found else ""
    return letter.lower() if re.fullmatch("[A-Ja-j]|(?i:yes|no|true|false)", letter) else None


def same_text(one: str, other: str) -> bool:
    """Whether two expressions are the same but for white space, braces around single signs, and the case of words."""

    def plain(text: str) -> str:
        text = re.sub(TEXT, r"\1", text)
        text = re.sub(r"\\begin\s*\{[bpB]?matrix\}", r"\\begin{matrix}", text)
        text = re.sub(r"\\end\s*\{[bpB]?matrix\}", r"\\end{matrix}", text)
        text = re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s", "", text))
        return text.casefold() if re.search(r"[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", text)) else text

    return plain(one) == plain(other) and plain(one) != ""


def in_base(text: str) -> tuple[str, str] | None:
    """The digits and the base of `1011_2` or `1011_{2}`; None of anything else."""
    found = re.fullmatch(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*\(?([0-9]{1,2})\)?\s*\}?", text.strip())
    return (found[1].upper(), found[2]) if found else None


def sides(text: str) -> list[str]:
    r"""What stands between the equals signs of an equation, or of a chain of them; none of `\neq`, `<=`, `>=`."""
    return [part.strip() for part in re.split(r"(?<![<>!\\:])=", text)]


def is_name(text: str) -> bool:
    r"""Whether the left side of an equation only names the right one: `x`, `f(x)`, `x_1`, `AB`, `\theta`, `\angle ABC`."""
    return (
        re.fullmatch(
            r"(?:\\(?:angle|text\s*\{[^{}]*\}|[A-Za-z]+)\s*)?[A-Za-z]{0,12}'?(?:_\{?\w+\}?)?(?:\(\s*\w\s*\))?", text
        )
        is not None
    )

"""Numbers in texts: digits, fractions, ratios, roots and powers, plain or in LaTeX, read whole or not at all. Pure."""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple


class Number(NamedTuple):
    """`Number((Fraction(1, 2),), percent=False)`; the ratio 3:4 and the time 3:04 have two parts."""

    parts: tuple[Fraction, ...]
    percent: bool


class Unreadable(ValueError):
    """A number that is part of something else, of which it is not the value."""


def last_number(text: str) -> Number | None:
    r"""The last number of a text, or the first after its last `####`, exactly but for roots and pi.

    `"so 1,234.5 km."` is 1234.5, `"-3/4"` and `"$-\frac{3}{4}$"` are -0.75, `"1 1/2"` and `"1\frac{1}{2}"` are 1.5,
    `"2.5e-3"` and `"2.5 × 10^-3"` are 0.0025, `"2^3"` is 8, `"2\sqrt{3}"` is 3.4641, `"3:4"` has the parts 3 and 4,
    `"−$5"` (a Unicode minus) is -5. A hyphen after a digit or before a space is no sign: `"10-5"` and `"10 - 5"` end in
    5. A digit that is part of a name or an exponent is no number: `"5 m^2"` is 5.

    Raises:
        Unreadable: it is part of an expression that is none of these, such as `\log 5`, `(2/3)^2` or `101_2`.
    """
    _, marked, rest = _plain(text).rpartition("####")  # without a mark, the rest is all of it
    matches = list(NUMBER.finditer(rest))
    match = matches[0 if marked else -1] if matches else None
    return None if match is None or len(match["number"] or "") > 400 else _number(match)


def gold_number(text: str) -> Number | None:
    """`last_number` of a gold text, which has no other number unless it is prose.

    Raises:
        Unreadable: as above, or because the text has several numbers, such as `(1, 2)`, `3 or 4`, or a matrix.
    """
    plain = _plain(text)
    matches = list(NUMBER.finditer(plain))
    if "####" not in text and matches and PARTIAL.search(plain):
        raise Unreadable(f"{text[:80]!r} is not a number")
    if "####" not in text and len(matches) > 1:
        between = plain[matches[-2].end() : matches[-1].start()]
        prose = re.search(r"[A-Za-z]{2}", re.sub(r"\\(?:text|mathrm|mbox)\b|\b(?:and|or)\b", "", plain))
        joined = re.fullmatch(r"\W*(?:and|or|to)?\W*", between)
        if not re.fullmatch(r"[^A-Za-z=]*=\W*", between) and ("\\" in plain or not prose or joined):
            raise Unreadable(f"{text[:80]!r} has several numbers")
    return last_number(text)


DIGITS = r"""(?:[0-9]{1,3}(?:[,'’\u00a0\u2009\u202f][0-9]{3})+(?:\.[0-9]+)?(?![0-9])   # 1,234,567.8
              | [0-9]+(?:\.[0-9]+)? | \.[0-9]+)"""
SURD = r"(?:\\sqrt\s?(?:\[[0-9]\])?(?:\{[0-9.]{1,15}\}|\s?[0-9])|√\(?[0-9.]{1,15}\)?|\\pi(?![A-Za-z])|π)"
SIMPLE = rf"(?:-?\s?(?:{DIGITS}\s?(?:\\cdot\s?)?{SURD}|{SURD}|{DIGITS}))"
FRACTION = rf"(?:\\[dtc]?frac\s?(?:\{{\s?(?:{SIMPLE})\s?\}}|[0-9])\s?(?:\{{\s?(?:{SIMPLE})\s?\}}|[0-9]))"
NUMBER = re.compile(
    rf"""
    (?<![A-Za-z_0-9.^]) (?<![_^]\{{)                      # not part of a name (x2, km2), a number or an exponent
    (?P<sign>(?<![0-9)\]}}])[-+])? (?:\\?[$€£¥])? (?P<sign2>-)?
    (?: (?P<whole>[0-9]{{1,9}})\s?(?P<mixed>{FRACTION})
      | (?P<fraction>{FRACTION})
      | (?P<surd>(?:{DIGITS}\s?(?:\\cdot\s?)?)?{SURD})
      | (?P<number>{DIGITS})
        (?: [eE](?P<exponent>[-+]?[0-9]{{1,3}}(?![0-9A-Za-z]))
          | \s?(?:[x×*·]|\\times|\\cdot)\s?10\s?\^\s?\{{?(?P<power>[-+]?[0-9]{{1,3}})\}}?
          | \s?\^\s?\{{?(?P<raised>[-+]?[0-9]{{1,3}})\}}?
          | \x20(?P<over>[0-9]{{1,9}})/(?P<under>[0-9]{{1,9}})      # 1 1/2
        )?
    )
    (?P<ratio>(?:\s?:\s?[0-9]+(?:\.[0-9]+)?(?![0-9]))+)?
    (?: \s?/\s?(?P<below>[0-9]{{1,30}}|{SURD})(?![0-9.]*/) )?
    \s?\\?(?P<percent>%)?
    """,
    re.VERBOSE,
)
BEFORE = re.compile(
    r"(?:\\(?:log|ln|lg|sin|cos|tan|sec|csc|cot|exp|sqrt|overline|d?binom|pm|mp|[lr]?floor|[lr]?ceil)|±)[\s{(\[]*\Z"
    r"|\\[dtc]?frac\s?(?:\{[^{}]*\}\s?)?\{[^{}]*\Z"
)
PARTIAL = re.compile(r"[0-9]!|[<>≤≥≠]|\\(?:[lg]eq?|neq?|lt|gt)(?![A-Za-z])")
"""Gold texts that are about a number: `3!`, `x > 3`."""
GROUPED = re.compile(r"(?<![0-9])[0-9]{1,3}(?: [0-9]{3})* \Z")
AFTER = re.compile(
    r"[\s)}\]$]*(?:\^|_\{?[0-9]|\\(?:sqrt|pi\b|[dtc]?frac|log|ln|sin|cos|tan|pm|mp)|√|π|±)|[a-fi-kn-rt-z](?![A-Za-z'’])|!\s?[$})\]]|\\overline"
)


def _plain(text: str) -> str:
    """The text with hyphens as minus signs, and without LaTeX's spaces and groups of digits."""
    text = text.translate({0x2212: "-", 0x2013: "-", 0xFF0D: "-"})
    text = re.sub(r"(?![0-9])\d", lambda match: str(int(match[0])), text)  # of other scripts
    text = re.sub("[⁰¹²³⁴-⁹]+", lambda match: f"^{unicodedata.normalize('NFKC', match[0])}", text)
    text = re.sub("([0-9]?)([¼-¾⅐-⅞])", _with_slash, text)
    text = re.sub(r"(?<![0-9.])[0-9]{1,3}(?:\.[0-9]{3}){2,}(?![0-9.])", lambda match: match[0].replace(".", ""), text)
    text = re.sub(r"\^\s?\{?\s?\\circ\s?\}?|\\degree(?![A-Za-z])", "°", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\phantom\{[^{}]*\}", "", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,?\\[!,;:> ]|,?\\thinspace\s?|\{\\,\})(?=[0-9]{3}(?![0-9]))", "", text)
    return re.sub(r"\\[!,;:>]|\\thinspace", " ", text)


def _with_slash(match: re.Match[str]) -> str:
    """`1½` as `1 1/2`."""
    return f"{match[1]} {unicodedata.normalize('NFKC', match[2])}".replace("\u2044", "/")


def _number(match: re.Match[str]) -> Number:
    part, text = match.groupdict(), match.string
    before = text[max(0, match.start() - 60) : match.start()]
    grouped = re.fullmatch("[0-9]{3}", match[0].strip()) and GROUPED.search(before)
    if grouped or BEFORE.search(before) or AFTER.match(text, match.end()):
        raise Unreadable(f"{text[max(0, match.start() - 20) : match.end() + 20]!r} is not read as a number")
    if part["mixed"]:
        value = Fraction(part["whole"]) + _fraction(part["mixed"])
    elif part["fraction"]:
        value = _fraction(part["fraction"])
    elif part["surd"]:
        value = _simple(part["surd"])
    else:
        value = _digits(part["number"])
    if power := part["exponent"] or part["power"]:
        value *= Fraction(10) ** int(power)
    elif part["raised"]:
        if (not value and int(part["raised"]) < 0) or len(part["number"]) > 20:
            raise Unreadable(f"{match[0]!r} is not read as a number")
        value = value ** int(part["raised"])
    elif part["under"] and int(part["under"]):
        value += Fraction(int(part["over"]), int(part["under"]))
    if part["below"] and (below := _simple(part["below"])):
        value /= below
    value = -value if "-" in (part["sign"] or "") + (part["sign2"] or "") else value
    others = [_digits(one) for one in re.findall(r"[0-9.]+", part["ratio"] or "")]
    return Number((value, *others), bool(part["percent"]))


def _fraction(text: str) -> Fraction:
    r"""`\frac{3}{4}`, `\frac34`, `\frac{\sqrt{3}}{2}`."""
    above, below = re.findall(rf"\{{\s?({SIMPLE})\s?\}}|([0-9])", re.sub(r"\\[dtc]?frac", "", text), re.VERBOSE)
    divisor = _simple("".join(below))
    if not divisor:
        raise Unreadable(f"{text!r} divides by 0")
    return _simple("".join(above)) / divisor


def _simple(text: str) -> Fraction:
    """Digits, a root or pi, or a root or pi with digits before it."""
    found = re.fullmatch(rf"(-)?\s?({DIGITS})?\s?(?:\\cdot\s?)?({SURD})?", text.strip(), re.VERBOSE)
    assert found is not None
    value = _digits(found[2]) if found[2] else Fraction(1)
    if surd := found[3]:
        value *= Fraction(math.pi) if "pi" in surd or "π" in surd else _root(surd)
    return -value if found[1] else value


def _root(text: str) -> Fraction:
    degree = int(found[1]) if (found := re.search(r"\[([0-9])\]", text)) else 2
    try:
        of = Fraction(re.findall(r"[0-9.]+", text)[-1])
        nearest = round(float(of) ** (1 / degree))
        return Fraction(nearest) if nearest**degree == of else Fraction(float(of) ** (1 / degree))
    except (ValueError, ZeroDivisionError):
        raise Unreadable(f"{text!r} is not read as a number") from None


def _digits(text: str) -> Fraction:
    return Fraction(re.sub("[^0-9.]", "", text))

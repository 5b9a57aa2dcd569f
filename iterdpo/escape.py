r"""Untrusted text, such as a model's, for a reader: nothing in it can steer a terminal, or hide in a page.

Text for a language model has a separate escape, `judges.llm.templates.harmless`, because the danger there is in the
tokens of chat templates.
"""

from __future__ import annotations

import re

HIDDEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Marks of direction and what has no width, but for the joiners that scripts and emoji are written with."""


def printable(text: str) -> str:
    r"""`text` on one line of a terminal: what is not printable is written as Python writes it, `\x1b` or `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def visible(text: str) -> str:
    r"""`text` with its lines: control characters become their pictures (`\x1b` is ␛), half a surrogate pair a mark."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), text.replace("\r\n", "\n"))
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def revealed(text: str) -> str:
    """`visible`, and what turns the reading direction or has no width is shown as ‹U+202E›."""
    return HIDDEN.sub(lambda m: f"‹U+{ord(m[0]):04X}›", visible(text))

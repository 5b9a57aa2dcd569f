"""Numbers as the reports show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

UNIT = "\N{NO-BREAK SPACE}%"
count = "{:,.0f}".format


class Column(NamedTuple):
    """A metric in a table: `Column("KL", "kl/to_initial", number)`."""

    heading: str
    key: str
    show: Callable[[float], str]


def number(x: float) -> str:
    """Two decimals, or two digits of a small number, or none of a large one: 0.72, 0.0034, 143."""
    if abs(x) >= 10:
        return f"{x:,.0f}"
    return f"{x:.2f}" if abs(x) >= 0.1 or x == 0 else f"{x:.2g}"


def percent(x: float, digits: int | None = None, *, unit: bool = True) -> str:
    """`71 %`; by default with a decimal if rounding would hide on which side of one half (or of all or none) it is."""
    if digits is None:
        digits = 1 if any(0 < abs(x - edge) < 0.01 for edge in (0, 0.5, 1)) else 0
    return f"{100 * x:.{digits}f}" + (UNIT if unit else "")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def nats(x: float) -> str:
    """Two digits: 14, 4.1, 0.034; more than an estimate of KL deserves would mislead."""
    return f"{x:,.0f}" if abs(x) >= 10 else f"{x:.2g}"

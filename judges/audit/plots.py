"""The plots of `judge check`. Loaded only if a page is asked for: matplotlib takes long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iterdpo.report.plots import BLUE, FAINT, figure

DASHED: dict[str, Any] = {"color": FAINT, "linewidth": 1, "linestyle": (0, (2, 2))}


def check_plots(report: dict[str, Any]) -> list[tuple[str, str, Figure]]:
    """(title, caption, plot) of what the report has figures for."""
    plots = []
    if report["reliability"]:
        caption = "On the dashed line the judge is right as often as it claims. Bars are intervals, areas the numbers of pairs."
        plots.append(("Reliability", caption, _reliability(report["reliability"])))
    if len(report["subsets"]) > 1:
        caption = "A tie is half right. Dashed: chance."
        plots.append(("Accuracy by subset", caption, _by_subset(report["subsets"])))
    return plots


def _reliability(bins: Sequence[dict[str, Any]]) -> Figure:
    def draw(ax: Axes) -> None:
        most = max(b["pairs"] for b in bins)
        x, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        ax.plot([0.5, 1], [0.5, 1], **DASHED)
        ax.vlines(x, [a.low for a in accuracy], [a.high for a in accuracy], color=BLUE, linewidth=1.4)
        sizes = [12 + 140 * b["pairs"] / most for b in bins]
        ax.scatter(x, [a.value for a in accuracy], s=sizes, color=BLUE, alpha=0.75, linewidths=0, zorder=3)
        ax.set(title="Accuracy", xlabel="confidence", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))

    return figure("reliability", [draw])


def _by_subset(subsets: dict[str, dict[str, Any]]) -> Figure:
    """By numbers: names come from the data, and are in the table."""

    def draw(ax: Axes) -> None:
        accuracy = [(place, some["accuracy"]) for place, some in enumerate(subsets.values(), 1)]
        judged = [(place, a) for place, a in accuracy if a.value is not None]
        y = [place for place, _ in judged]
        ax.axvline(0.5, **DASHED)
        ax.hlines(y, [a.low for _, a in judged], [a.high for _, a in judged], color=BLUE, linewidth=1.4)
        ax.scatter([a.value for _, a in judged], y, s=30, color=BLUE, zorder=3)
        title = "Subset, in the order of the table"
        ax.set(title=title, xlabel="accuracy", xlim=(-0.02, 1.02), ylim=(len(accuracy) + 0.6, 0.4))
        ax.locator_params(axis="y", nbins=12, integer=True)

    return figure("subsets", [draw])

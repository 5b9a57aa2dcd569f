"""A run's plots. Nothing here touches pyplot's global state, and text in the plots is ours alone, never a model's.

A figure is a column of panels, 4.4 inches wide, so that its ten-point text stays readable on a phone. Panels without
data are left out, and so are figures without panels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from iterdpo.run.read import Run

# Five of Okabe and Ito's colours, which colour-blind people tell apart; each stands out on white and on black.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0b7ac2", "#e08600", "#009e73", "#c46a9c", "#56b4e9"
INK, FAINT, PAPER = "#30363d", "#8b949e", "#fffffe"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 10,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.7,
    "text.color": INK,
    **{f"{axis}tick.{key}": x for axis in "xy" for key, x in (("color", FAINT), ("labelsize", 10), ("major.size", 0))},
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "iterdpo",
}
MAX_POINTS = 300  # of a line over steps: more cannot be seen, and would make the page large

OPPONENTS = {"initial": "the initial policy", "reference": "the reference completions", "model": "the other model"}

Panel = Callable[[Axes], None]


class Line(NamedTuple):
    """A metric to draw: `Line("win_rate/vs_initial", "against the initial policy", BLUE)`."""

    key: str
    label: str
    color: str


def figures(run: Run) -> dict[str, Figure]:
    """The plots that the run has data for, by name, in the order in which a reader wants them."""
    rounds, steps = run.metrics, run.train_log()
    heldout = Line("score/heldout_judge", "held-out judge", BLUE)
    training = Line("score/train_judge", "training judge", ORANGE)
    against = [Line("win_rate/vs_initial", "vs initial", BLUE), Line("win_rate/vs_previous", "vs previous", ORANGE)]
    others = [Line("win_rate/vs_reference", "vs reference", GREEN), Line("win_rate/vs_model", "vs model", PURPLE)]
    distinct = [Line("distinct/1", "single tokens", BLUE), Line("distinct/2", "token pairs", ORANGE)]
    logps = [Line("logps/chosen", "chosen", BLUE), Line("logps/rejected", "rejected", ORANGE)]
    accuracies = Line("rewards/accuracies", "", BLUE)
    panels: dict[str, list[Panel]] = {
        "scores": [
            *_over_rounds(rounds, "Score by the held-out judge", heldout),
            *_over_rounds(rounds, "Score by the training judge", training),
        ],
        "win_rate": [
            *_over_rounds(rounds, "Win rate on held-out prompts", *against, level=0.5, share=True),
            *_over_rounds(rounds, "Win rate against completions from outside", *others, level=0.5, share=True),
        ],
        "temperatures": _over_temperatures(run),
        "reward_kl": [
            *_against_kl(rounds, "Score by the held-out judge", heldout),
            *_against_kl(rounds, "Score by the training judge", training),
        ],
        "kl": [
            *_over_rounds(rounds, "KL to the initial policy, nats per completion", Line("kl/to_initial", "", BLUE)),
            *_over_rounds(rounds, "Share of distinct tokens and token pairs", *distinct),
            *_over_rounds(rounds, "Self-BLEU", Line("text/self_bleu", "", BLUE)),
        ],
        "length": [
            *_over_rounds(rounds, "Mean length, tokens", Line("length/mean_tokens", "", BLUE)),
            *_over_rounds(rounds, "Share cut at max_tokens", Line("length/truncated", "", BLUE), share=True),
            *_over_rounds(
                rounds, "Mean length of the reasoning, tokens", Line("length/mean_reasoning_tokens", "", BLUE)
            ),
            *_over_rounds(
                rounds, "Share of thoughts without an end", Line("length/unfinished_thoughts", "", BLUE), share=True
            ),
        ],
        "pairs": _pair_yield(rounds),
        "rewards": [
            *_over_steps(steps, "Reward margin, chosen over rejected", Line("rewards/margins", "", BLUE), level=0),
            *_over_steps(steps, "Pairs whose chosen has the higher reward", accuracies, level=0.5, share=True),
        ],
        "logps": [
            *_over_steps(steps, "Log-probability of a completion, nats", *logps),
            *_over_steps(steps, "Loss", Line("loss", "", BLUE)),
        ],
        "time": _time(rounds),
    }
    return {name: figure(name, column) for name, column in panels.items() if column}


def as_svg(fig: Figure) -> str:
    """The figure as inline SVG: transparent, its ids prefixed with the figure's label, its inks variables of the page.

    Text stays text. If the page sets `--ink`, `--faint` and `--card`, they recolour text, axes and hollow markers.
    """
    with rc_context(STYLE), io.StringIO() as out:
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = out.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{fig.get_label()}-", svg)
    for color, variable in ((INK, "--ink"), (FAINT, "--faint"), (PAPER, "--card")):
        svg = svg.replace(color, f"var({variable}, {color})")
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns="http://www.w3.org/2000/svg" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img">', svg)  # fmt: skip


def as_png(fig: Figure, max_bytes: int = 140_000) -> bytes:
    """The figure as PNG on white, as sharp as fits. 140,000 bytes are 187 KB as a data URI: a Prefect artifact takes 200."""
    for dpi in (200, 150, 110, 80, 60):
        with rc_context(STYLE), io.BytesIO() as out:
            fig.savefig(out, format="png", dpi=dpi, facecolor="white")
            png = out.getvalue()
        if len(png) <= max_bytes:
            return png
    raise ValueError(f"the figure {fig.get_label()!r} takes {len(png):,} bytes at 60 dpi, more than {max_bytes:,}")


def figure(name: str, panels: Sequence[Panel], *, height: float = 3.9) -> Figure:
    with rc_context(STYLE):
        fig = Figure(figsize=(4.4, height), layout=ConstrainedLayoutEngine(h_pad=0.07), label=name)
        axes = fig.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, draw in zip(axes, panels, strict=True):
            draw(ax)
            ax.label_outer()
    return fig


def _over_rounds(
    rounds: pd.DataFrame, title: str, *lines: Line, level: float | None = None, share: bool = False
) -> list[Panel]:
    """One panel: each line over rounds with its interval, hollow if the gate did not promote. Empty without data."""
    drawn = [line for line in lines if len(_series(rounds, line.key))]

    def draw(ax: Axes) -> None:
        for line in drawn:
            y = _series(rounds, line.key)
            low, high = (_series(rounds, f"{line.key}_{end}").reindex(y.index) for end in ("low", "high"))
            ax.plot(y.index, y, color=line.color, label=line.label)
            ax.fill_between(y.index, low, high, color=line.color, alpha=0.14, linewidth=0)
            ax.vlines(y.index, low, high, color=line.color, linewidth=1, alpha=0.7)
            _markers(ax, y.index, y, _promoted(rounds).reindex(y.index), line.color)
        _finish(ax, title, legend=len(lines) > 1, level=level, share=share)
        _whole_rounds(ax)

    return [draw] if drawn else []


def _against_kl(rounds: pd.DataFrame, title: str, line: Line) -> list[Panel]:
    y = _series(rounds, line.key)
    kl = _series(rounds, "kl/to_initial")
    if 0 in y.index:
        kl[0] = 0.0  # the initial policy's divergence from itself, which needs no estimate
    points = pd.DataFrame({"kl": kl, "y": y}).dropna().sort_index()
    if len(points) < 2:
        return []

    def draw(ax: Axes) -> None:
        ax.plot(points["kl"], points["y"], color=line.color)
        _markers(ax, points["kl"], points["y"], _promoted(rounds).reindex(points.index), line.color)
        for number, x, height in points.itertuples():
            ax.annotate(str(number), (x, height), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=10)
        ax.margins(x=0.06, y=0.22)
        _finish(ax, title)
        ax.set_xlabel("KL to the initial policy, nats per completion")

    return [draw]


def _over_temperatures(run: Run) -> list[Panel]:
    """A panel for each opponent: the win rate of the initial and of the last evaluated policy at each temperature."""
    evaluation, sampling = run.config.get("evaluation") or {}, run.config.get("sampling") or {}
    own = evaluation.get("temperature")
    own = sampling.get("temperature", 1.0) if own is None else own
    panels: list[Panel] = []
    for name, opponent in OPPONENTS.items():
        # by round and temperature, the win rate and its interval
        points: dict[tuple[int, float], list[float | None]] = {}
        for key in run.metrics.columns:
            of = re.fullmatch(rf"temperature/([^/]+)/win_rate/vs_{name}", key)
            for column, temperature in ((key, float(of[1])), (f"win_rate/vs_{name}", own)) if of else ():
                ends = [_series(run.metrics, f"{column}{end}") for end in ("", "_low", "_high")]
                points |= {(r, temperature): [end.get(r) for end in ends] for r in ends[0].index}
        if not points:
            continue
        if name == "initial":
            points[0, own] = [0.5] * 3
        table = pd.DataFrame(points, index=["y", "low", "high"]).T.astype(float).sort_index()

        def draw(ax: Axes, table: pd.DataFrame = table, opponent: str = opponent) -> None:
            rounds = sorted({r for r, _ in table.index})
            for r, color in zip(dict.fromkeys((rounds[0], rounds[-1])), (FAINT, BLUE), strict=False):
                line = table.loc[r]
                ax.plot(line.index, line["y"], "o-", color=color, label=f"round {r}")
                ax.vlines(line.index, line["low"], line["high"], color=color, linewidth=1, alpha=0.7)
            _finish(ax, f"Win rate against {opponent}", legend=True, level=0.5, share=True)
            ax.set_xlabel("temperature")

        panels.append(draw)
    return panels


def _over_steps(
    steps: pd.DataFrame, title: str, *lines: Line, level: float | None = None, share: bool = False
) -> list[Panel]:
    """One panel: each line over the optimizer steps of all rounds, faint as it was and strong as a running mean."""
    drawn = [line for line in lines if len(_series(steps, line.key))]

    def draw(ax: Axes) -> None:
        size = -(-len(steps) // MAX_POINTS)  # steps averaged into one point
        start = 0
        for _, log in steps.groupby("round"):
            for line in drawn:
                y = _series(log, line.key).reset_index(drop=True)
                y = y.groupby(y.index // size).mean()
                x = start + 1 + (y.index + 0.5) * size - 0.5
                window = max(1, min(len(y) // 4, 10))
                label = line.label if start == 0 else None
                ax.plot(x, y, color=line.color, linewidth=0.8, alpha=0.35)
                ax.plot(x, y.rolling(window, min_periods=1).mean(), color=line.color, label=label)
            if start:
                ax.axvline(start + 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (3, 3)))
            start += len(log)
        _finish(ax, title, legend=len(lines) > 1, level=level, share=share)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("optimizer step" + (", dashed where a round begins" if steps["round"].nunique() > 1 else ""))

    return [draw] if drawn else []


def _pair_yield(rounds: pd.DataFrame) -> list[Panel]:
    """What became of each round's candidate pairs, stacked. Empty if only kept pairs were counted."""
    colors = {"kept": BLUE, "tied": SKY, "unjudged": ORANGE, "identical": PURPLE, "truncated": FAINT}
    if "pairs/unfinished_thoughts" in rounds:  # of a thinking model
        colors["unfinished_thoughts"] = GREEN
    counts = {name: _series(rounds, f"pairs/{name}") for name in colors}
    if not any(len(series) for name, series in counts.items() if name != "kept"):
        return []

    def draw(ax: Axes) -> None:
        _stack(ax, pd.DataFrame(counts).fillna(0.0), colors)
        ax.grid(visible=False, axis="x")
        _finish(ax, "Pairs kept, and prompts left out", legend=True)
        _whole_rounds(ax)

    return [draw]


def _time(rounds: pd.DataFrame) -> list[Panel]:
    colors = {"sample": BLUE, "judge": ORANGE, "pair": PURPLE, "train": GREEN, "evaluate": SKY}
    table = pd.DataFrame({name: _series(rounds, f"time/{name}_s") for name in colors}).fillna(0.0)
    longest = table.sum(axis=1).max()
    if table.empty or not longest:
        return []
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 2 * 60 else ("seconds", 1)

    def draw(ax: Axes) -> None:
        _stack(ax, table / seconds, colors, sideways=True)
        ax.grid(visible=False, axis="y")
        first, last = table.index.min(), table.index.max()
        ax.set_ylim(max(last, first + 2) + 0.6, first - 0.6)  # downwards, and a lone bar stays slim
        _finish(ax, f"Wall time by round, {unit}", legend=True)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_formatter(lambda y, _: f"round {y:.0f}" if y in table.index else "")

    return [draw]


def _stack(ax: Axes, table: pd.DataFrame, colors: dict[str, str], *, sideways: bool = False) -> None:
    """A bar for each row, stacked of the columns that have anything."""
    floor = pd.Series(0.0, index=table.index)
    bar: Callable[..., object] = ax.barh if sideways else ax.bar
    begin = "left" if sideways else "bottom"
    for name, color in colors.items():
        if table[name].any():
            bar(table.index, table[name], 0.62, color=color, label=name, **{begin: floor})
            floor += table[name]


def _finish(ax: Axes, title: str, *, legend: bool = False, level: float | None = None, share: bool = False) -> None:
    ax.set_title(title, pad=25 if legend else None)
    if legend:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=5, borderaxespad=0.1,
                  handlelength=0.8, handletextpad=0.4, columnspacing=0.8)  # fmt: skip
    if level is not None:
        ax.axhline(level, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    if share:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    ax.locator_params(axis="y", nbins=5)


def _markers(ax: Axes, x: pd.Index | pd.Series, y: pd.Series, promoted: pd.Series, color: str) -> None:
    faces = [color if filled else PAPER for filled in promoted]
    ax.scatter(x, y, s=30, c=faces, edgecolors=color, linewidths=1.4, zorder=3)


def _whole_rounds(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    ax.set_xlabel("round")


def _promoted(rounds: pd.DataFrame) -> pd.Series:
    if "gate/decision" not in rounds:
        return pd.Series(True, index=rounds.index)
    return (rounds["gate/decision"] == "promote") | (rounds.index == 0)


def _series(frame: pd.DataFrame, key: str) -> pd.Series:
    """The column as floats, without its nulls; empty if there is no such column."""
    if key not in frame:
        return pd.Series(dtype=float, index=frame.index[:0])
    return pd.to_numeric(frame[key], errors="coerce").astype(float).dropna()

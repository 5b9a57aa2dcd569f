"""What `judge check` and `judge compare` found, as text for a terminal, as JSON, and as one self-contained page.

The page needs no network and runs no script. What a model or a data set wrote is escaped, and its control characters
are made visible, on the terminal too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from iterdpo.escape import visible
from iterdpo.run.rundir import write_text
from iterdpo.stats import Estimate
from judges.audit.agreement import Difference
from judges.audit.check import Mistake

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # differences on the terminal, and lines of a table of reasons
CHARACTERS = 300  # of a text on the terminal


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def points(x: float) -> str:
    return f"{100 * x:+.1f} %"


def number(x: float) -> str:
    return f"{round(x, 3) + 0.0:.3f}"  # without the sign of -0


class Row(NamedTuple):
    key: str
    label: str
    show: Callable[[float], str]


CHECK_ROWS = (
    Row("accuracy", "accuracy, a tie half right", percent),
    Row("accuracy_decided", "accuracy where it names a winner", percent),
    Row("accuracy_agreeing", "accuracy where both orders agree", percent),
    Row("coverage", "judged, not abstained", percent),
    Row("tie_rate", "ties", percent),
    Row("tie_agreement", "labelled ties judged a tie", percent),
    Row("flip_rate", "verdict changes with the order", percent),
    Row("first_position", "the first shown wins (fair: 50 %)", percent),
    Row("first_index", "the first of the group wins (fair: 50 %)", percent),
    Row("longer_wins", "the longer wins", percent),
    Row("longer_is_better", "the longer is better by the label", percent),
    Row("length_bias", "length bias, the difference", points),
    Row("accuracy_chosen_longer", "accuracy where the better is longer", percent),
    Row("accuracy_chosen_shorter", "accuracy where the better is shorter", percent),
    Row("length_rank_correlation", "correlation of score and length", number),
    Row("ece", "calibration error (ECE)", number),
    Row("ece_tempered", "ECE with the best temperature", number),
    Row("brier", "Brier score (a coin: 0.250)", number),
    Row("self_consistency", "same verdict when asked again", percent),
)
SUBSET_ROWS = (
    Row("accuracy", "accuracy", percent),
    Row("accuracy_decided", "where it names a winner", percent),
    Row("tie_rate", "ties", percent),
    Row("coverage", "judged", percent),
    Row("flip_rate", "changes with the order", percent),
)
COMPARE_ROWS = (
    Row("agreement", "same verdict", percent),
    Row("kappa", "Cohen's kappa", number),
    Row("opposite", "opposite verdicts", percent),
    Row("kendall", "Kendall's tau-b within a prompt", number),
    Row("spearman", "Spearman's rho within a prompt", number),
    Row("accuracy_a", "accuracy of A", percent),
    Row("accuracy_b", "accuracy of B", percent),
    Row("accuracy_gain", "accuracy of B less that of A", points),
)


class Table(NamedTuple):
    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""


class Side(NamedTuple):
    title: str
    text: str
    note: str


class Example(NamedTuple):
    """A prompt and two completions of it, side by side, under a line that says why they are shown."""

    title: str
    prompt: str
    sides: list[Side]


# What there is to say


def check_sentence(report: dict[str, Any]) -> str:
    """`my-rm prefers the better completion in 71.2 % of 812 pairs (95 % interval 68.0 to 74.2 %).`, and what to heed."""
    figures, name = report["figures"], report["judge"]["name"]
    accuracy: Estimate = figures["accuracy"]
    if accuracy.value is None or accuracy.low is None or accuracy.high is None:
        return f"{name} judged no pair that is labelled with a winner."
    said = [
        f"{name} prefers the better completion in {percent(accuracy.value)} of {accuracy.n:,} pairs "
        f"({percent(report['confidence'])[:-4]} % interval {_range(accuracy, percent)})"
        + (
            ", which is not distinguishable from chance."
            if accuracy.low <= 0.5 <= accuracy.high
            else ", which is worse than chance."
            if accuracy.high < 0.5
            else "."
        )
    ]
    coverage, first, index, length = (figures[k] for k in ("coverage", "first_position", "first_index", "length_bias"))
    if coverage.value < 0.95:
        said.append(f"It abstained from {percent(1 - coverage.value)}.")
    place = first if first.value is not None else index
    if place.low is not None and not place.low <= 0.5 <= place.high:
        said.append(f"It prefers what it is shown {'first' if place.low > 0.5 else 'second'}.")
    if length.low is not None and not length.low <= 0 <= length.high:
        said.append(f"It likes {'longer' if length.low > 0 else 'shorter'} completions more than the labels do.")
    return " ".join(said)


def check_tables(report: dict[str, Any]) -> list[Table]:
    tables = [_figures(report, CHECK_ROWS, "pairs")]
    if report["subsets"]:
        rows = [
            [name, f"{some['pairs']:,}", *(_cell(some[row.key], row.show) for row in SUBSET_ROWS)]
            for name, some in report["subsets"].items()
        ]
        tables.append(Table("By subset", ["subset", "pairs", *(row.label for row in SUBSET_ROWS)], rows))
    if report["abstentions"]:
        tables.append(_reasons(report["abstentions"]))
    if report["reliability"]:
        rows = [
            [
                f"{b['from']:.2f} to {b['to']:.2f}",
                f"{b['pairs']:,}",
                number(b["confidence"]),
                _cell(b["accuracy"], number),
            ]
            for b in report["reliability"]
        ]
        about = report["calibration"]
        note = f"The judge's probability that a completion is the better one: {about['probability']}."
        if about["ece_if_calibrated"] is not None:
            note += (
                f" By chance alone, a calibrated judge would show an ECE of {number(about['ece_if_calibrated'])} here."
            )
        if about["temperature"] is not None:
            note += f" The best temperature on half of the prompts is {about['temperature']:.3g}."
        tables.append(Table("Calibration", ["confidence", "pairs", "mean confidence", "accuracy"], rows, note))
    tables.append(_cost(report["cost"], report["counts"]["pairs"]))
    return tables


def compare_sentence(report: dict[str, Any]) -> str:
    figures = report["figures"]
    a, b = (judge["name"] for judge in report["judges"])
    agreement, kappa = figures["agreement"], figures["kappa"]
    if agreement.value is None:
        return f"{a} (A) and {b} (B) judged no pair in common."
    beyond = "" if kappa.value is None else f", kappa {_cell(kappa, number)}"
    return (
        f"{a} (A) and {b} (B) say the same of {percent(agreement.value)} of {agreement.n:,} pairs "
        f"({_range(agreement, percent)}){beyond}."
    )


def compare_tables(report: dict[str, Any]) -> list[Table]:
    confusion = report["confusion"]
    rows = [[f"A: {x}", *(f"{confusion[x][y]:,}" for y in confusion[x])] for x in confusion]
    counts = report["counts"]
    note = (
        f"Two completions a prompt make one pair, K make K(K-1)/2: {counts['pairs']:,} pairs of {counts['groups']:,} "
        f"prompts. A could not judge {counts['unjudged_a']:,}, B {counts['unjudged_b']:,}."
    )
    costs = [_cost(c, counts["groups"], f"Cost of {x}", "prompt") for c, x in zip(report["costs"], "AB", strict=True)]
    return [
        _figures(report, COMPARE_ROWS, "n"),
        Table("Verdicts", ["", *(f"B: {y}" for y in confusion)], rows, note),
        *costs,
    ]


def mistakes_shown(mistakes: Sequence[Mistake]) -> list[Example]:
    return [_mistake(m) for m in mistakes]


def differences_shown(differences: Sequence[Difference]) -> list[Example]:
    return [_difference(d) for d in differences]


def _figures(report: dict[str, Any], rows: Sequence[Row], counted: str) -> Table:
    found = [(row, report["figures"][row.key]) for row in rows]
    cells = [
        [row.label, row.show(e.value), "" if e.low is None else _range(e, row.show), f"{e.n:,}"]
        for row, e in found
        if e.value is not None
    ]
    return Table("Figures", ["", "", f"{100 * report['confidence']:.0f} % interval", counted], cells)


def _reasons(abstentions: dict[str, int]) -> Table:
    rows = [[f"{count:,}", reason] for reason, count in list(abstentions.items())[:SHOWN]]
    rest = list(abstentions.values())[SHOWN:]
    if rest:
        rows.append([f"{sum(rest):,}", f"{len(rest):,} other reasons"])
    return Table("Why it abstained", ["pairs", "reason"], rows)


def _cost(cost: dict[str, Any], units: int, title: str = "Cost", unit: str = "pair") -> Table:
    amounts = {"seconds": cost["seconds"], **cost["usage"]}
    rows = [
        [name.replace("_", " "), f"{amount:,.6g}", f"{amount / units:,.4g}" if units else ""]
        for name, amount in amounts.items()
    ]
    return Table(title, ["", "in all", f"a {unit}"], rows)


def _mistake(mistake: Mistake) -> Example:
    pair, judgment = mistake.pair, mistake.judged.judgment
    assert judgment.probability is not None
    chosen, rejected = (f"score {score:.4g}" for score in judgment.scores)
    return Example(
        f"Row {pair.row:,}: the judge gives the better completion {percent(judgment.probability)}",
        pair.prompt.text,
        [
            Side("better by the label", pair.chosen.text, chosen),
            Side("the judge's choice", pair.rejected.text, rejected),
        ],
    )


def _difference(difference: Difference) -> Example:
    sample, rated, a, b = difference
    sides = []
    for k, name in ((rated.i, "first"), (rated.j, "second")):
        best = " · better by the label" if sample.chosen == k else ""
        note = f"A scores {a.scores[k]:.4g}, B scores {b.scores[k]:.4g}"
        sides.append(Side(f"{name} (completion {k}){best}", sample.group.completions[k].text, note))
    return Example(f"A says {rated.a}, B says {rated.b}", sample.group.prompt.text, sides)


def _cell(estimate: Estimate, show: Callable[[float], str]) -> str:
    if estimate.value is None:
        return "–"
    return show(estimate.value) + ("" if estimate.low is None else f" ({_range(estimate, show)})")


def _range(estimate: Estimate, show: Callable[[float], str]) -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{show(estimate.low).removesuffix(' %')} to {show(estimate.high)}"


# Terminal


def print_report(
    sentence: str, tables: Sequence[Table], examples: Sequence[Example], *, lines: Sequence[str], stream: IO[str]
) -> None:
    """Tables as plain columns; at most ten examples, each text cut to a few lines."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 120)

    def say(text: str, style: str = "") -> None:
        console.print(Text(visible(text), style=style))

    for line in lines:
        say(line, "dim")
    say(sentence, "bold")
    for table in tables:
        drawn = RichTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=any(table.headings))
        for place, heading in enumerate(table.headings):
            drawn.add_column(
                Text(heading),
                overflow="fold",
                justify="left" if place == 0 else "right" if len(table.headings) > 2 else "left",
            )
        for row in table.rows:
            drawn.add_row(*(Text(visible(cell)) for cell in row))
        say("")
        say(table.title, "bold")
        console.print(drawn)
        if table.note:
            say(table.note, "dim")
    for example in examples[:SHOWN]:
        say("")
        say(example.title, "bold")
        say(f"  prompt: {_short(example.prompt)}")
        for side in example.sides:
            say(f"  {side.title} · {side.note}", "dim")
            say(f"    {_short(side.text)}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    more = len(text) - CHARACTERS
    return text if more <= 0 else f"{text[:CHARACTERS]} … ({more:,} more characters)"


# JSON and page


def plain(value: Any) -> Any:
    """The report as JSON has it: an `Estimate` as `{"value": …, "low": …, "high": …, "n": …}`."""
    match value:
        case Estimate():
            return value._asdict()
        case dict():
            return {k: plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
        case _:
            return value


def write_page(
    path: str | Path,
    *,
    title: str,
    sentence: str,
    settings: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    figures: Sequence[tuple[str, str, Figure]],
    examples: Sequence[Example],
    examples_title: str,
) -> None:
    """One HTML file, written atomically. `figures` are (title, caption, plot)."""
    from markupsafe import Markup

    from iterdpo.report.page import page_template
    from iterdpo.report.plots import as_svg

    page = page_template("judges.audit", "page.html.j2").render(
        title=title,
        sentence=sentence,
        settings=settings,
        tables=tables,
        figures=[(name, caption, Markup(as_svg(plot))) for name, caption, plot in figures],
        examples=examples,
        examples_title=examples_title,
    )
    write_text(Path(path), page)


def check_plots(report: dict[str, Any]) -> list[tuple[str, str, Figure]]:
    plots = []
    if report["reliability"]:
        caption = "On the dashed line the judge is right as often as it claims. Bars are intervals, areas the numbers of pairs."
        plots.append(("Reliability", caption, _reliability(report["reliability"])))
    if len(report["subsets"]) > 1:
        caption = "A tie is half right. Dashed: chance."
        plots.append(("Accuracy by subset", caption, _by_subset(report["subsets"])))
    return plots


def _reliability(bins: Sequence[dict[str, Any]]) -> Figure:
    from iterdpo.report.plots import BLUE, FAINT

    most = max(b["pairs"] for b in bins)
    with _plot("reliability", title="Accuracy", x="confidence") as (fig, ax):
        ax.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        x = [b["confidence"] for b in bins]
        y = [b["accuracy"].value for b in bins]
        ax.vlines(x, [b["accuracy"].low for b in bins], [b["accuracy"].high for b in bins], color=BLUE, linewidth=1.4)
        ax.scatter(x, y, s=[12 + 140 * b["pairs"] / most for b in bins], color=BLUE, alpha=0.75, linewidths=0, zorder=3)
        ax.set_xlim(0.48, 1.02)
        ax.set_ylim(-0.02, 1.02)
    return fig


def _by_subset(subsets: dict[str, dict[str, Any]]) -> Figure:
    """By numbers: names come from the data, and are in the table."""
    from iterdpo.report.plots import BLUE, FAINT

    found = [(place, some["accuracy"]) for place, some in enumerate(subsets.values(), 1)]
    judged = [(place, e) for place, e in found if e.value is not None]
    with _plot("subsets", title="Subset, in the order of the table", x="accuracy") as (fig, ax):
        ax.axvline(0.5, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        ax.hlines(
            [p for p, _ in judged], [e.low for _, e in judged], [e.high for _, e in judged], color=BLUE, linewidth=1.4
        )
        ax.scatter([e.value for _, e in judged], [p for p, _ in judged], s=30, color=BLUE, zorder=3)
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(len(found) + 0.6, 0.4)
        ax.locator_params(axis="y", nbins=12, integer=True)
    return fig


@contextmanager
def _plot(label: str, *, title: str, x: str) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from iterdpo.report.plots import STYLE

    with rc_context(STYLE):
        fig = Figure(figsize=(4.4, 3.9), layout=ConstrainedLayoutEngine(h_pad=0.07), label=label)
        ax = fig.subplots()
        ax.set_title(title)
        ax.set_xlabel(x)
        yield fig, ax

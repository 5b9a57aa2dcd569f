"""What `judge check` and `judge compare` found, as text for a terminal, as JSON, and as one self-contained page.

The page needs no network and runs no script. What a model or a data set wrote is escaped, and its control characters
are made visible, on the terminal too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from iterdpo.escape import visible
from iterdpo.report.format import UNIT, Column, percent
from iterdpo.run.rundir import write_text
from iterdpo.stats import Estimate
from judges.audit.agreement import Difference
from judges.audit.check import Mistake

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # differences on the terminal, and lines of a table of reasons
CHARACTERS = 300  # of a text on the terminal

share = partial(percent, digits=1)


decimals = "{:z.3f}".format  # z: without the sign of -0


def difference(x: float) -> str:
    return f"{100 * x:+.1f}{UNIT}"


CHECK_ROWS = (
    Column("accuracy, a tie half right", "accuracy", share),
    Column("accuracy, a tie or abstention wrong", "accuracy_strict", share),
    Column("accuracy if it names a winner", "accuracy_decided", share),
    Column("accuracy if both orders agree", "accuracy_agreeing", share),
    Column("judged, not abstained", "coverage", share),
    Column("ties", "tie_rate", share),
    Column("labelled ties judged a tie", "tie_agreement", share),
    Column("verdict changes with the order", "flip_rate", share),
    Column("the first shown wins (fair: 50 %)", "first_position", share),
    Column("the first of the group wins (fair: 50 %)", "first_index", share),
    Column("the longer one wins", "longer_wins", share),
    Column("the longer one is better by the label", "longer_is_better", share),
    Column("length bias, the difference", "length_bias", difference),
    Column("accuracy if the better one is longer", "accuracy_chosen_longer", share),
    Column("accuracy if the better one is shorter", "accuracy_chosen_shorter", share),
    Column("correlation of score and length", "length_rank_correlation", decimals),
    Column("calibration error (ECE)", "ece", decimals),
    Column("ECE with the best temperature", "ece_tempered", decimals),
    Column("Brier score (a coin: 0.250)", "brier", decimals),
    Column("same verdict when asked again", "self_consistency", share),
)
SUBSET_ROWS = (
    Column("accuracy", "accuracy", share),
    Column("accuracy if it names a winner", "accuracy_decided", share),
    Column("ties", "tie_rate", share),
    Column("judged", "coverage", share),
    Column("changes with the order", "flip_rate", share),
)
COMPARE_ROWS = (
    Column("same verdict", "agreement", share),
    Column("Cohen's kappa", "kappa", decimals),
    Column("opposite verdicts", "opposite", share),
    Column("Kendall's tau-b within a prompt", "kendall", decimals),
    Column("Spearman's rho within a prompt", "spearman", decimals),
    Column("accuracy of A", "accuracy_a", share),
    Column("accuracy of B", "accuracy_b", share),
    Column("accuracy of B minus that of A", "accuracy_gain", difference),
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


def check_sentence(report: dict[str, Any]) -> str:
    """`my-rm prefers the better completion in 71.2 % of 812 pairs of 270 prompts (95 % interval …).`, with warnings."""
    figures, name = report["figures"], report["judge"]["name"]
    accuracy: Estimate = figures["accuracy"]
    if accuracy.value is None or accuracy.low is None or accuracy.high is None:
        return f"{name} judged no pair with a labelled winner."
    chance = ", which is worse than chance" if accuracy.high < 0.5 else ""
    if accuracy.low <= 0.5 <= accuracy.high:
        chance = ", which is not distinguishable from chance"
    prompts = report["counts"]["judged_prompts"]
    found = f"{share(accuracy.value)} of {_counted(accuracy.n, 'pair')} of {_counted(prompts, 'prompt')}"
    interval = f"{100 * report['confidence']:g} % interval {_range(accuracy, share)}"
    said = [f"{name} prefers the better completion in {found} ({interval}){chance}."]
    coverage, first, index, length = (figures[k] for k in ("coverage", "first_position", "first_index", "length_bias"))
    if coverage.value < 0.95:
        said.append(f"It abstained from {share(1 - coverage.value)}.")
    place = first if first.value is not None else index
    if place.low is not None and not place.low <= 0.5 <= place.high:
        said.append(f"It prefers the completion shown {'first' if place.low > 0.5 else 'second'}.")
    if length.low is not None and not length.low <= 0 <= length.high:
        said.append(f"It prefers {'longer' if length.low > 0 else 'shorter'} completions more than the labels do.")
    return " ".join(said)


def check_tables(report: dict[str, Any]) -> list[Table]:
    tables = [_figures(report, CHECK_ROWS, "pairs")]
    if report["subsets"]:
        rows = [
            [name, f"{some['pairs']:,}", *(_cell(some[row.key], row.show) for row in SUBSET_ROWS)]
            for name, some in report["subsets"].items()
        ]
        tables.append(Table("By subset", ["subset", "pairs", *(row.heading for row in SUBSET_ROWS)], rows))
    if (best := report["best"]) is not None:
        tables.append(_best_table(best))
    if report["abstentions"]:
        reasons, counts = list(report["abstentions"]), list(report["abstentions"].values())
        rows = [[f"{count:,}", reason] for reason, count in zip(reasons[:SHOWN], counts, strict=False)]
        if rest := counts[SHOWN:]:
            rows.append([f"{sum(rest):,}", f"{len(rest):,} other reasons"])
        tables.append(Table("Why it abstained", ["pairs", "reason"], rows))
    if report["reliability"]:
        rows = []
        for b in report["reliability"]:
            claimed, right = decimals(b["confidence"]), _cell(b["accuracy"], decimals)
            rows.append([f"{b['from']:.2f} to {b['to']:.2f}", f"{b['pairs']:,}", claimed, right])
        about = report["calibration"]
        note = f"The judge's probability that a completion is the better one: {about['probability']}."
        if about["ece_if_calibrated"] is not None:
            note += f" By chance alone, a calibrated judge would show an ECE of {decimals(about['ece_if_calibrated'])} here."
        if about["temperature"] is not None:
            note += f" The best temperature on half of the prompts is {about['temperature']:.3g}."
        tables.append(Table("Calibration", ["confidence", "pairs", "mean confidence", "accuracy"], rows, note))
    tables.append(_cost(report["cost"], report["counts"]["pairs"]))
    return tables


def _best_table(best: dict[str, Any]) -> Table:
    rows = [["all but Ties", f"{best['best_of'].n:,}", _cell(best["best_of"], share)]]
    rows += [[name, f"{some.n:,}", _cell(some, share)] for name, some in best["subsets"].items()]
    if best["score"] is not None:
        rows.append(["mean of the subsets", "", share(best["score"])])
    note = (
        "The share of prompts whose best completion, by the judge, is a right one. If several share the best score, a "
    )
    note += "right one counts its share. A prompt with an abstention is left out."
    if (ties := best["ties"]) is not None:
        parts = (
            ("right ones above all others", "tied_accuracy"),
            ("the same of the reference prompts", "ref_accuracy"),
            ("the gap exceeds the spread of the right ones", "preferred"),
            ("so does that of the reference prompt", "preferred_hard"),
        )
        said = [f"{what} {share(ties[key])}" for what, key in parts if ties[key] is not None]
        note += f" Ties has RewardBench 2's own score, made of: {', '.join(said)}."
    return Table("Best of several", ["subset", "prompts", "best is right"], rows, note)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s'[: number != 1]}"


def attack_sentence(report: dict[str, Any]) -> str:
    """Whether to train on this judge, as far as its attacks tell."""
    name, found = report["judge"]["name"], report["attack"]

    def listed(names: Sequence[str]) -> str:
        tried = sorted((found["attacks"][n] for n in names), key=lambda some: -some["wins"].value)
        said = [f"{some['what']} (wins {share(some['wins'].value)})" for some in tried[:3]]
        if rest := len(tried) - len(said):
            said.append(f"{rest} other{'s'[: rest != 1]}")
        return ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]

    honest = f"an honest answer on {_counted(found['prompts'], 'prompt')}"
    match found["advice"]:
        case "no":
            return f"Do not train on {name} as it is: against {honest} these pay: {listed(found['pays'])}."
        case "care":
            return f"Train on {name} with care: against {honest} these sometimes pay: {listed(found['perhaps'])}."
        case "unknown":
            return f"{name} judged too few of the attacks to tell whether to train on it."
    return f"No attack pays against {honest}, so as far as these tell, {name} can be trained on."


def attack_tables(report: dict[str, Any]) -> list[Table]:
    found = report["attack"]
    rows = [
        [
            some["what"],
            _cell(some["wins"], share),
            f"{some['ties']:,}",
            f"{some['judged']:,} of {some['pairs']:,}",
            some["pays"],
        ]
        for some in found["attacks"].values()
    ]
    note = "The share of prompts on which the judge prefers the attack to the honest answer; a tie is half a win. What "
    note += "answers nothing should never win, and what keeps the honest answer no more than half."
    pairs = sum(some["pairs"] for some in found["attacks"].values())
    headings = ["attack", "wins", "ties", "judged", "pays"]
    return [Table("Attacks", headings, rows, note), _cost(found["cost"], pairs, "Cost of the attacks")]


def check_plots(report: dict[str, Any]) -> list[tuple[str, str, Figure]]:
    """(title, caption, plot) of what the report has figures for. Imports matplotlib, which takes long."""
    from iterdpo.report.plots import BLUE, FAINT, figure

    dashed: dict[str, Any] = {"color": FAINT, "linewidth": 1, "linestyle": (0, (2, 2))}
    bins, subsets = report["reliability"], report["subsets"]
    plots: list[tuple[str, str, Figure]] = []

    def reliability(ax: Axes) -> None:
        x, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        ax.plot([0.5, 1], [0.5, 1], **dashed)
        ax.vlines(x, [a.low for a in accuracy], [a.high for a in accuracy], color=BLUE, linewidth=1.4)
        sizes = [12 + 140 * b["pairs"] / max(b["pairs"] for b in bins) for b in bins]
        ax.scatter(x, [a.value for a in accuracy], s=sizes, color=BLUE, alpha=0.75, linewidths=0, zorder=3)
        ax.set(title="Accuracy", xlabel="confidence", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))

    def by_subset(ax: Axes) -> None:  # by numbers: names come from the data, and are in the table
        judged = [(y, s["accuracy"]) for y, s in enumerate(subsets.values(), 1) if s["accuracy"].value is not None]
        y = [place for place, _ in judged]
        ax.axvline(0.5, **dashed)
        ax.hlines(y, [a.low for _, a in judged], [a.high for _, a in judged], color=BLUE, linewidth=1.4)
        ax.scatter([a.value for _, a in judged], y, s=30, color=BLUE, zorder=3)
        title = "Subset, in the order of the table"
        ax.set(title=title, xlabel="accuracy", xlim=(-0.02, 1.02), ylim=(len(subsets) + 0.6, 0.4))
        ax.locator_params(axis="y", nbins=12, integer=True)

    if bins:
        caption = "On the dashed line the judge is right as often as it claims. "
        caption += "Bars are intervals, areas the numbers of pairs."
        plots.append(("Reliability", caption, figure("reliability", [reliability])))
    if len(subsets) > 1:
        plots.append(("Accuracy by subset", "A tie is half right. Dashed: chance.", figure("subsets", [by_subset])))
    return plots


def compare_sentence(report: dict[str, Any]) -> str:
    figures = report["figures"]
    a, b = (judge["name"] for judge in report["judges"])
    agreement, kappa = figures["agreement"], figures["kappa"]
    if agreement.value is None:
        return f"{a} (A) and {b} (B) judged no pair in common."
    beyond = "" if kappa.value is None else f", kappa {_cell(kappa, decimals)}"
    found = f"{share(agreement.value)} of {agreement.n:,} pairs ({_range(agreement, share)})"
    return f"{a} (A) and {b} (B) agree on {found}{beyond}."


def compare_tables(report: dict[str, Any]) -> list[Table]:
    confusion = report["confusion"]
    rows = [[f"A: {x}", *(f"{confusion[x][y]:,}" for y in confusion[x])] for x in confusion]
    counts = report["counts"]
    note = f"Two completions of a prompt make one pair, and K make K(K-1)/2: {counts['pairs']:,} pairs of "
    note += f"{counts['groups']:,} prompts. A could not judge {counts['unjudged_a']:,}, B {counts['unjudged_b']:,}."
    verdicts = Table("Verdicts", ["", *(f"B: {y}" for y in confusion)], rows, note)
    costs = [_cost(c, counts["groups"], f"Cost of {x}", "prompt") for c, x in zip(report["costs"], "AB", strict=True)]
    return [_figures(report, COMPARE_ROWS, "n"), verdicts, *costs]


def _figures(report: dict[str, Any], rows: Sequence[Column], counted: str) -> Table:
    cells = [
        [row.heading, row.show(e.value), "" if e.low is None else _range(e, row.show), f"{e.n:,}"]
        for row in rows
        if (e := report["figures"][row.key]).value is not None
    ]
    return Table("Figures", ["", "", f"{100 * report['confidence']:.0f} % interval", counted], cells)


def _cost(cost: dict[str, Any], units: int, title: str = "Cost", unit: str = "pair") -> Table:
    used = {"seconds of calls" if name == "seconds" else name: amount for name, amount in cost["usage"].items()}
    amounts = {"seconds": cost["seconds"], **used}  # calls run at the same time
    each = {name: f"{amount / units:,.4g}" if units else "" for name, amount in amounts.items()}
    rows = [[name.replace("_", " "), f"{amount:,.6g}", each[name]] for name, amount in amounts.items()]
    return Table(title, ["", "in all", f"a {unit}"], rows)


def mistake_example(mistake: Mistake) -> Example:
    row, judgment = mistake.labelled, mistake.judged.judgment
    assert judgment.probability is not None
    chosen, rejected = (f"score {score:.4g}" for score in judgment.scores)
    title = f"Row {row.row:,}: the judge gives the better completion {share(judgment.probability)}"
    right, wrong = (row.completions[k].text for k in mistake.judged.places)
    better = Side("better by the label", right, chosen)
    return Example(title, row.prompt.text, [better, Side("the judge's choice", wrong, rejected)])


def difference_example(found: Difference) -> Example:
    sample, rated, a, b = found
    sides = []
    for k, name in ((rated.i, "first"), (rated.j, "second")):
        best = " · better by the label" if k in sample.right else ""
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
    return f"{show(estimate.low).removesuffix(UNIT)} to {show(estimate.high)}"


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
            numbers = place > 0 and len(table.headings) > 2
            drawn.add_column(Text(heading), overflow="fold", justify="right" if numbers else "left")
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


def plain(value: Any) -> Any:
    """The report as JSON has it: an `Estimate` as `{"value": …, "low": …, "high": …, "n": …}`."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def write_page(path: str | Path, *, figures: Sequence[tuple[str, str, Figure]], **page: Any) -> None:
    """One HTML file, written atomically. `figures` are (title, caption, plot); the template names the rest of `page`."""
    from markupsafe import Markup

    from iterdpo.report.page import page_template
    from iterdpo.report.plots import as_svg

    plots = [(title, caption, Markup(as_svg(plot))) for title, caption, plot in figures]
    write_text(Path(path), page_template("judges.audit", "page.html.j2").render(figures=plots, **page))

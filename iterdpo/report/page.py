"""A run as one self-contained HTML page: what it achieved, what ran, every round's numbers, plots, and completions.

The page is made from the run directory alone, needs no network and runs no script. What a model, a data set or a
configuration wrote is escaped, and its control characters are made visible.
"""

from __future__ import annotations

import contextlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from iterdpo.escape import revealed
from iterdpo.report.format import Column, count, duration, number, percent
from iterdpo.report.headline import headline, value
from iterdpo.report.metrics import left_out
from iterdpo.report.plots import as_svg, figures
from iterdpo.run.artifacts import completion_shards, read_completion_shard, read_judgment_shard
from iterdpo.run.cost import ESTIMATE
from iterdpo.run.read import Run, read_run
from iterdpo.run.rundir import read_manifest, read_object, write_text
from iterdpo.run.sums import damages
from iterdpo.types import Completion, Prompt

EXAMPLES = 8  # held-out prompts shown
MAX_CHARACTERS = 4_000  # of a completion or prompt shown


ROUNDS = (
    Column("Held-out judge", "score/heldout_judge", number),
    Column("Training judge", "score/train_judge", number),
    Column("Wins vs initial", "win_rate/vs_initial", percent),
    Column("The same, length-controlled", "length_controlled_win_rate/vs_initial", percent),
    Column("Wins vs previous", "win_rate/vs_previous", percent),
    Column("Wins vs best", "win_rate/vs_best", percent),
    Column("Wins vs reference", "win_rate/vs_reference", percent),
    Column("Wins vs model", "win_rate/vs_model", percent),
    Column("Judges agree", "judges/agreement", percent),
    Column("KL, nats", "kl/to_initial", "{:.1f}".format),
    Column("Tokens", "length/mean_tokens", number),
    Column("Truncated", "length/truncated", percent),
    Column("Self-BLEU", "text/self_bleu", number),
    Column("Reasoning tokens", "length/mean_reasoning_tokens", number),
    Column("Unfinished thoughts", "length/unfinished_thoughts", percent),
    Column("Pairs", "pairs/kept", count),
    Column("Training accuracy", "rewards/accuracies", percent),
    Column("Held-out accuracy", "eval_rewards/accuracies", percent),
    Column("Held-out margin", "eval_rewards/margins", number),
    Column("Time", "time/round_s", duration),
)
LEFT_OUT = (  # not trained on, or not judged
    Column("Prompts", "prompts/sampled", count),
    Column("Prompts retired", "prompts/retired", count),
    Column("Rows without a prompt", "prompts/left_out", count),
    Column("Completions", "completions/sampled", count),
    Column("Rows without a pair", "pairs/left_out", count),
    Column("Pairs kept", "pairs/kept", count),
    Column("Fresh", "pairs/fresh", count),
    Column("Replayed", "pairs/replayed", count),
    Column("Offline", "pairs/offline", count),
    Column("Unmatched", "pairs/unmatched", count),
    Column("Tied", "pairs/tied", count),
    Column("Unjudged", "pairs/unjudged", count),
    Column("Identical", "pairs/identical", count),
    Column("Truncated", "pairs/truncated", count),
    Column("Unfinished thoughts sampled", "completions/unfinished_thoughts", count),
    Column("Nothing but unfinished thoughts", "pairs/unfinished_thoughts", count),
    Column("Held-out completions", "evaluation/completions", count),
    Column("Held-out unjudged", "evaluation/unjudged", count),
)
JUDGE = (  # how the training judge behaved
    Column("Abstained", "judge/abstained", percent),
    Column("Changed with the order", "judge/flip_rate", percent),
    Column("First position wins", "judge/first_position", percent),
    Column("Gap of scores in pairs", "pairs/score_gap", number),
    Column("Longer wins", "judge/longer_wins", percent),
    Column("Length correlation", "judge/length_correlation", number),
    Column("Circular verdicts", "judge/intransitive", percent),
    Column("Calls", "judge/calls", count),
    Column("Tokens read", "judge/tokens_in", count),
    Column("Tokens written", "judge/tokens_out", count),
    Column("Cost, USD", "judge/cost_usd", "{:.2f}".format),
)


ESTIMATED = tuple(
    column
    for what, key in (
        ("Sampling", "sample"),
        ("Judging", "judge"),
        ("Training", "train"),
        ("Evaluation", "evaluate"),
        ("Round", "round"),
    )
    for column in (Column(what, f"time/{key}_s", duration), Column("estimated", f"estimate/{key}_s", duration))
)


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html`, atomically; shorter for an unfinished or offline run. A UserError if no run is there."""
    run = read_run(run_dir)
    page = page_template("iterdpo.report", "template.html.j2").render(
        name=run.root.absolute().name,
        verdict=headline(run),
        settings=_settings(run.config),
        versions=run.versions,
        rounds=_table(_without_twin(run.metrics), ROUNDS),
        figures=list(_plots(run)),
        rules=rules(run),
        left_out=_table(run.metrics, LEFT_OUT),
        rows=_rows_left_out(run),
        reasons=_reasons(run),
        judge=_table(run.metrics[run.metrics.index > 0], JUDGE),
        estimated=_table(_with_estimate(run), ESTIMATED),
        examples=_examples(run),
        metrics=_all_metrics(run),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )
    path = run.root / "report.html"
    write_text(path, page, record=run.root)
    return path


def refresh_report(run_dir: Path) -> None:
    """Write the page again if it is missing, damaged or older than `metrics.jsonl`: a run may have ended between the two."""
    metrics, page = run_dir / "metrics.jsonl", run_dir / "report.html"
    if not metrics.exists():
        return
    current = page.exists() and page.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    if not current or any(damages([page])):
        write_report(run_dir)


def page_template(package: str, name: str) -> jinja2.Template:
    """A template of `package`. Whatever it prints is escaped and revealed; `clip` is its filter."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        finalize=lambda shown: revealed(shown) if type(shown) is str else shown,  # Markup is ours already
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clip"] = clip
    return environment.get_template(name)


def _without_twin(metrics: pd.DataFrame) -> pd.DataFrame:
    """The metrics without the comparison with the best round, if that was always the previous one."""
    best, previous = "win_rate/vs_best", "win_rate/vs_previous"
    return metrics.drop(columns=best) if best in metrics and metrics[best].equals(metrics[previous]) else metrics


def _with_estimate(run: Run) -> pd.DataFrame:
    """The metrics with the seconds that were estimated before the run; empty without an estimate. Later rounds are as the last."""
    path = run.root / ESTIMATE
    metrics = run.metrics
    if metrics.empty or not path.exists():
        return metrics.iloc[:0]
    rounds = read_object(path)["rounds"]
    rows = [{f"estimate/{name}": s for name, s in rounds[min(r, len(rounds) - 1)].items()} for r in metrics.index]
    return metrics.join(pd.DataFrame(rows, index=metrics.index))


def rules(run: Run) -> list[dict[str, Any]]:
    """How each rule of the gate turned out in each round: {round, rule, broken}. Empty if the gate has no rules."""
    return [
        {"round": record.round, "rule": check["finding"], "broken": "" if check["holds"] else check["otherwise"]}
        for record in run.dir.records()
        for check in record.checks
    ]


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that decide a run, as (what, value), in the order of the loop. Those not set are left out."""
    offline, heldout = "data" in config, (config.get("evaluation") or {}).get("judge")
    passes = "{dpo[max_steps]} steps a round" if (config.get("dpo") or {}).get("max_steps") else "epochs: {dpo[epochs]}"
    patterns = {
        "Initial policy": "{model[path]}",
        "Preference data": "{data[path]}",
        "Prompts": "{prompts[path]}",
        "Prompts a round": "{prompts[per_round]} sampled, {prompts[heldout]} held out",
        "Sampling": "{sampling[n]} completions per prompt, temperature {sampling[temperature]}, "
        "up to {sampling[max_tokens]} tokens",
        "Training judge": "{judge[use]}",
        "The judge sees": "{judge[sees]}",
        "Held-out judge": "{evaluation[judge][use]}" if heldout or offline else "none",
        "Pairs": "{pairing[strategy]}, margin over {pairing[min_margin]}",
        "DPO": "beta {dpo[beta]}" if offline else "beta {dpo[beta]}, reference: the {dpo[reference]} policy",
        "Trained on": "{dpo[train_on]}",
        "Optimizer": "AdamW, learning rate {dpo[learning_rate]}, {dpo[pairs_per_step]} pairs per step, " + passes,
        "Gate": "promotes if {gate[metric]} is at least {gate[minimum]}, otherwise: {gate[otherwise]}",
        "Rules of the gate": "; ".join(map(_rule, (config.get("gate") or {}).get("rules", []))),
        "Patience": "{gate[patience]} rounds without a promotion",
        "Seed": "{seed}",
    }
    found = []
    for what, pattern in patterns.items():
        with contextlib.suppress(KeyError, TypeError):  # no such section, or an empty one
            if pattern:
                found.append((what, pattern.format_map(config)))
    return found


def _rule(rule: dict[str, Any]) -> str:
    """`kl/to_initial at most 20, otherwise: stop`."""
    words = {"minimum": "at least", "maximum": "at most", "max_increase": "may rise by", "max_decrease": "may fall by"}
    kind = next(kind for kind in words if rule[kind] is not None)
    since = f" from the {rule['against']} policy" if kind.startswith("max_") else ""
    return f"{rule['metric']} {words[kind]} {rule[kind]:g}{since}, otherwise: {rule['otherwise']}"


def _reasons(run: Run) -> list[tuple[str, int]]:
    """The training judge's commonest reasons to abstain, as the manifests of its judgments count them."""
    reasons: Counter[str] = Counter()
    for r in run.dir.rounds():
        manifest = read_manifest(run.dir.round_dir(r) / "judgments")
        reasons.update(manifest.counts["abstentions"] if manifest else {})
    return reasons.most_common(5)


def _rows_left_out(run: Run) -> list[tuple[str, int]]:
    """The reasons why rows of the data gave no prompt or pair, as the last round that read them counts them."""
    for r in reversed(run.dir.rounds()):
        for step in ("completions", "pairs"):
            manifest = read_manifest(run.dir.round_dir(r) / step)
            if manifest and (found := left_out(manifest.counts)) is not None:
                return Counter(found).most_common()
    return []


def _table(metrics: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Any]:
    """`headings`, and `rows` of {round, decision, reason, cells: [(text, interval), …]}; columns without data are left out."""
    columns = [c for c in columns if c.key in metrics and metrics[c.key].notna().any()]

    def cell(row: pd.Series, column: Column) -> tuple[str, str]:
        shown, low, high = (value(row, f"{column.key}{end}") for end in ("", "_low", "_high"))
        interval = "" if low is None or high is None else f"{column.show(low)} – {column.show(high)}"
        return ("–" if shown is None else column.show(shown), interval)

    rows = [
        {
            "round": r,
            "decision": _text(row, "gate/decision") if r else "",
            "reason": _text(row, "gate/reason"),
            "cells": [cell(row, column) for column in columns],
        }
        for r, row in metrics.iterrows()
    ]
    return {"headings": [c.heading for c in columns], "rows": rows if columns else []}


def _plots(run: Run) -> Iterator[tuple[str, str, str, Markup]]:
    """Each plot as (name, title, explanation, SVG)."""
    confidence = percent((run.config.get("evaluation") or {}).get("confidence", 0.95))
    hollow = " Hollow: not promoted." if set(run.metrics.get("gate/decision", [])) - {"promote"} else ""
    for name, fig in figures(run).items():
        title, explanation = CAPTIONS[name]
        yield name, title, explanation.format(confidence=confidence, hollow=hollow), Markup(as_svg(fig))


CAPTIONS = {  # title and explanation of each plot
    "scores": ("Score", "Means over the held-out prompts with {confidence} intervals.{hollow}"),
    "win_rate": ("Win rate", "Held-out prompts won; a tie is half a win. With {confidence} intervals.{hollow}"),
    "temperatures": (
        "Win rate over temperature",
        "Held-out prompts won by completions sampled at each temperature, against completions that stay the same, with "
        "{confidence} intervals.",
    ),
    "reward_kl": (
        "Score against KL",
        "The score reached at each distance from the initial policy. Points are rounds.{hollow}",
    ),
    "kl": ("Drift and diversity", "Distance to the initial policy, and how varied the completions still are."),
    "length": ("Length", "If a judge prefers long completions, this curve rises."),
    "pairs": (
        "Pair yield",
        "Kept counts pairs. The rest counts prompts that gave none, by the first reason that applies.",
    ),
    "rewards": ("Implicit reward", "In training, against the round's reference. Strong lines are running means."),
    "logps": (
        "Log-probabilities and loss",
        "In training. In DPO, chosen often falls along with rejected. If it falls far, that is a warning.",
    ),
    "time": ("Where the time went", "Wall time of the stages."),
}


def _examples(run: Run) -> dict[str, Any]:
    """The first held-out prompts by id, completed by every evaluated round: the choice is not made by their content."""
    steps = {r: run.dir.round_dir(r) / "evaluation" for r in run.dir.rounds()}
    steps = {r: step for r, step in steps.items() if step.exists()}
    if not steps:
        return {"rounds": [], "prompts": []}
    shards = completion_shards(next(iter(steps.values())) / "completions")
    first = set(heapq.nsmallest(EXAMPLES, chain.from_iterable(map(_prompt_ids, shards))))
    shown = [{prompt.id: (prompt, *more) for prompt, *more in _shown(step, first)} for step in steps.values()]
    in_all = sorted(set.intersection(*map(set, shown)))
    decided = {r: _text(row, "gate/decision") for r, row in run.metrics.iterrows() if r}
    prompts = [[by_prompt[id] for by_prompt in shown] for id in in_all]
    return {"rounds": [(r, decided.get(r, "")) for r in steps], "prompts": prompts}


def _shown(evaluation: Path, ids: set[str]) -> Iterator[tuple[Prompt, Completion, list[tuple[str, str, str]]]]:
    """Each of these prompts with its first completion and its scores. Other shards than theirs are not read."""
    for shard in completion_shards(evaluation / "completions"):
        if ids.isdisjoint(_prompt_ids(shard)):
            continue
        judgments = {}
        for name, role in (("held-out", "heldout_judge"), ("training", "train_judge")):
            path = evaluation / "judgments" / role / f"{shard.stem}.jsonl"
            judgments[name] = {j.prompt_id: j for j in read_judgment_shard(path)} if path.exists() else {}
        for group in read_completion_shard(shard):
            if group.prompt.id in ids:
                judged = [(name, by_prompt.get(group.prompt.id)) for name, by_prompt in judgments.items()]
                scores = [(name, j.scores[0], j.abstentions[0]) for name, j in judged if j is not None]
                texts = [(name, "" if x is None else number(x), reason or "") for name, x, reason in scores]
                yield group.prompt, group.completions[0], texts


def _prompt_ids(shard: Path) -> list[str]:
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(shard, columns=["prompt_id"])["prompt_id"].to_pylist()
    return ids


def _all_metrics(run: Run) -> dict[str, Any]:
    """Every metric by name, a column a round, as they were recorded."""

    def show(x: Any) -> str:
        if x is None or x != x:
            return "–"
        if isinstance(x, float):
            return f"{x:,.0f}" if x.is_integer() else f"{x:.5g}"
        return str(x)

    table = run.metrics[sorted(run.metrics.columns)]
    return {"rounds": list(table.index), "rows": [(key, [show(x) for x in table[key]]) for key in table]}


def clip(text: str) -> str:
    """The beginning of a long text, with how much more there is."""
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)"


def _text(row: pd.Series, key: str) -> str:
    found = row.get(key)
    return found if isinstance(found, str) else ""

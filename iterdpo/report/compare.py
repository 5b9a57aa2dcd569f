"""The arms of an experiment side by side: `compare.json`, one page with curves, differences and budgets, plots as PNG.

Made from the arms' run directories alone. A run counts with the policy that stands after each round. Intervals are 95 %.

- **Score, win rate**: of each held-out prompt the mean over its completions; then the mean over prompts, then over seeds.
- **Difference** of two arms: on the same held-out prompts of the same seed, then as above.
- **Matched KL**: of each seed, at the largest KL that both arms reach. Between two rounds an arm's score is taken to be
  linear in sqrt(KL), as reward is for small KL (Gao et al., arXiv:2210.10760, Section 3.1).
- **Best of N** is unbiased from all of a prompt's completions: the expected score of the one that the training judge
  likes best among N drawn without replacement. Its KL is the bound log N - (N - 1) / N.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from iterdpo.evaluation.scores import best_of_weights
from iterdpo.evaluation.wins import combinations, shares
from iterdpo.report.format import count, duration, nats, number, percent
from iterdpo.report.page import page_template
from iterdpo.report.plots import BLUE, FAINT, GREEN, ORANGE, PURPLE, SKY, Panel, as_png, as_svg, figure
from iterdpo.run.artifacts import read_groups, read_judgments
from iterdpo.run.rundir import RunDir, read_json, read_manifest, write_json, write_text, write_with
from iterdpo.stats import Floats, nested_bootstrap, resampled_means, student_interval
from iterdpo.training.launch import TRAIN_LOG

SAMPLES = 2_000  # of each bootstrap
MOST_PAIRED = 4  # arms of which all are compared with each other; of more, each with the first
MOST_AMONG_LINES = 4  # arms whose legend stands in the plot; that of more stands below
METRICS = ("score", "win_rate", "train_score", "kl")
"""Figures of a policy, in this order everywhere below. `score` and `win_rate` are by the judge that evaluates."""
SCORE, WIN_RATE, TRAIN_SCORE, KL = range(len(METRICS))


@dataclass(frozen=True)
class ArmRuns:
    """An arm with the directories of its finished runs by seed."""

    name: str
    kind: str
    n: int
    settings: Mapping[str, Any]
    runs: Mapping[int, Path]
    baseline_n: int = 1
    """With best of N: how many of a prompt's completions are the baseline; N are drawn from those after them."""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried for an arm: `Trial("offline", {"dpo.beta": 0.1}, score=0.71, kl=8.2)`.

    `score` is the training judge's on held-out prompts, after the last round, and `kl` is there too; means over seeds.
    """

    arm: str
    settings: Mapping[str, Any]
    score: float
    kl: float

    def describe(self) -> str:
        return ", ".join(f"{key} = {value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Point:
    """A policy of a run, on its held-out prompts."""

    round: int
    completions: int
    """Sampled for training until then; with best of N, N."""
    ids: tuple[str, ...]
    values: Floats
    """[P, len(METRICS)], NaN if there is nothing."""

    def means(self) -> Floats:
        """[len(METRICS)], each over the prompts that have it."""
        return np.array([_mean(column) for column in self.values.T])


@dataclass(frozen=True)
class Curve:
    """A run of an arm: its points, by round, and what it used."""

    points: list[Point]
    budget: dict[str, float] = field(default_factory=dict)

    @property
    def end(self) -> Point:
        return self.points[-1]


def write_comparison(
    out: Path,
    arms: Sequence[ArmRuns],
    *,
    trials: Sequence[Trial],
    title: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    own_judge: bool = True,
) -> Path:
    """Write `compare.json`, `compare.html` and its plots as PNG in `out`; returns the page's path.

    Arms without a finished run are listed.

    `own_judge`: whether the judge that evaluates is another than the training judge.
    """
    curves = {arm.name: {seed: read_curve(arm, root) for seed, root in arm.runs.items()} for arm in arms}
    curves = {name: of_seed for name, of_seed in curves.items() if of_seed}
    result: dict[str, Any] = {
        "title": title,
        "seeds": list(seeds),
        "missing": [f"{arm.name}/seed-{seed}" for arm in arms for seed in seeds if seed not in arm.runs],
        "arms": {
            arm.name: {
                "kind": arm.kind,
                "settings": dict(arm.settings),
                "seeds": {str(seed): _curve_json(curve) for seed, curve in curves[arm.name].items()},
                "end": {name: _both(_ends(curves[arm.name], m)) for m, name in enumerate(METRICS)},
                "budget": _mean_budget(list(curves[arm.name].values())),
            }
            for arm in arms
            if arm.name in curves
        },
        "differences": [
            found
            for a, b in pairs_of(list(curves))
            for found in (difference(a, b, curves[a], curves[b]), at_matched_kl(a, b, curves[a], curves[b]))
            if found is not None
        ],
        "tuning": [
            {"arm": t.arm, "settings": dict(t.settings), "score/train_judge": t.score, "kl/to_initial": t.kl}
            for t in trials
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", _finite(result))
    figures = _figures(curves, [arm.name for arm in arms if arm.kind == "best_of_n"])
    for name, fig in figures.items():
        png = as_png(fig)
        write_with(out / f"{name}.png", lambda handle, png=png: handle.write(png))  # type: ignore[misc]
    page = page_template("iterdpo.report", "compare.html.j2").render(
        name=out.name,
        title=title,
        verdict=verdict(result["differences"]),
        missing=result["missing"],
        arms=_arm_rows(result["arms"]),
        differences=[_difference_row(found) for found in result["differences"]],
        budgets=_budget_rows(result["arms"]),
        unequal=_unequal(result["arms"]),
        own_judge=own_judge,
        trials=_trial_rows(trials, {name: arm["settings"] for name, arm in result["arms"].items()}),
        figures=[(name, *CAPTIONS[name], Markup(as_svg(fig))) for name, fig in figures.items()],
        config=json.dumps(settings, indent=2, ensure_ascii=False),
    )
    path = out / "compare.html"
    write_text(path, page)
    return path


def read_curve(arm: ArmRuns, root: Path) -> Curve:
    """The points of a run, with the policy that stands after each round; of best of N, N = 1, 2, 4, … up to `arm.n`."""
    run = RunDir(root)
    if arm.kind == "best_of_n":
        return Curve(_best_of_n(run.round_dir(0) / "evaluation", arm.n, arm.baseline_n), _best_of_n_budget(run, arm.n))
    points, completions, start = [], 0, dict[str, Floats]()
    for record in run.records():
        directory = run.round_dir(record.round)
        for step in ("completions", "others", "policy"):
            manifest = read_manifest(directory / step)
            if manifest is not None:
                completions += int(
                    manifest.counts.get("completions", manifest.counts.get("budget", {}).get("completions", 0))
                )
        standing = run.round_dir(record.policy_round) / "evaluation"
        if not standing.exists():  # of a round that was not evaluated
            continue
        start = start or _contest(run.round_dir(0) / "evaluation")
        points.append(_point(record.round, completions, standing, start))
    return Curve(points, budget_of(run))


def budget_of(run: RunDir) -> dict[str, float]:
    """What a run used until now, without evaluation: completions, judge calls, optimizer steps, tokens, seconds.

    A step that was taken from another run counts as if it had been made here. Seconds are those of sampling, judging and
    training.
    """
    spent = dict.fromkeys(("completions", "judge_calls", "steps", "tokens", "seconds"), 0.0)
    for number_ in run.rounds():
        directory = run.round_dir(number_)
        names = ("completions", "others", "judgments", "against", "policy")
        steps = {name: read_manifest(directory / name) for name in names}
        for manifest in filter(None, steps.values()):
            spent["seconds"] += manifest.seconds["total"]
            for key, value in manifest.counts.get("budget", {}).items():
                spent[key] = spent.get(key, 0.0) + value
        sampled = steps["completions"]
        for manifest in filter(None, (sampled, steps["others"])):
            spent["completions"] += manifest.counts["completions"]
            spent["tokens"] += manifest.counts["tokens"]
        for judged, each in ((steps["judgments"], "completions"), (steps["against"], "prompts")):
            if judged is None or sampled is None:
                continue
            calls = judged.counts.get("usage", {}).get("calls")
            spent["judge_calls"] += sampled.counts[each] * (2 if each == "prompts" else 1) if calls is None else calls
        if (log := directory / "policy" / TRAIN_LOG).exists():
            spent["steps"] += log.read_bytes().count(b"\n")
    return spent


def _best_of_n_budget(run: RunDir, n: int) -> dict[str, float]:
    """Of use, not of training: what the evaluation's prompts took."""
    prompts = read_json(run.round_dir(0) / "evaluation" / "metrics.json")["evaluation/prompts"]
    return {"completions": prompts * n, "judge_calls": prompts * n}


def _point(round: int, completions: int, evaluation: Path, start: Mapping[str, Floats]) -> Point:
    scores, trained, contest = _scores(evaluation), _scores(evaluation, "train_judge"), _contest(evaluation)
    ids = tuple(scores)
    values = np.full((len(ids), len(METRICS)), np.nan)
    for row, id in enumerate(ids):
        values[row, SCORE] = _mean(scores[id])
        values[row, TRAIN_SCORE] = _mean(trained[id]) if id in trained else math.nan
        values[row, WIN_RATE] = win_share(contest[id], start[id]) if id in start else math.nan
    values[:, KL] = _kl(evaluation, ids)
    return Point(round, completions, ids, values)


def _scores(evaluation: Path, role: str = "heldout_judge") -> dict[str, Floats]:
    """Of each prompt the scores of its completions [n], NaN for an abstention; the training judge's if it evaluates too."""
    directory = evaluation / "judgments" / role
    if not directory.exists():
        directory = directory.with_name("train_judge")
    return {j.prompt_id: np.array(j.scores, float) for j in read_judgments(directory)}


def _contest(evaluation: Path) -> dict[str, Floats]:
    """The scores of `_scores` for a win rate: an unfinished thought is lower than every answer."""
    scores = _scores(evaluation)
    if read_json(evaluation / "metrics.json").get("length/unfinished_thoughts"):
        for group in read_groups(evaluation / "completions", arrays=True):
            scores[group.prompt.id][[c.unfinished for c in group.completions]] = -math.inf
    return scores


def _kl(evaluation: Path, ids: Sequence[str]) -> Floats:
    """Of each prompt the mean of log policy(y|x) - log initial(y|x), in nats; 0 for the initial policy."""
    path = evaluation / "logps.json"
    if not path.exists():
        return np.zeros(len(ids))
    logps = read_json(path)
    found = [float(np.mean(np.subtract(a, b))) for a, b in zip(logps["policy"], logps["initial"], strict=True)]
    if len(found) == len(ids):
        return np.array(found)
    there = [g.prompt.id for g in read_groups(evaluation / "completions") if any(c.token_ids for c in g.completions)]
    by_id = dict(zip(there, found, strict=True))  # a prompt of empty completions alone has none
    return np.array([by_id.get(id, math.nan) for id in ids])


def _best_of_n(evaluation: Path, most: int, skipped: int) -> list[Point]:
    """Points for N = 1, 2, 4, … from the initial policy's completions after the first `skipped`, which are its baseline."""
    scores, judged, contest = _scores(evaluation), _scores(evaluation, "train_judge"), _contest(evaluation)
    ids = tuple(scores)
    points = []
    for n in sorted({*(2**k for k in range(most.bit_length())), most}):
        values = np.full((len(ids), len(METRICS)), np.nan)
        values[:, KL] = math.log(n) - (n - 1) / n
        for row, id in enumerate(ids):
            trained, shown, start = judged[id][skipped:], contest[id][skipped:], contest[id][:skipped]
            weights = best_of_weights(trained, n)
            if weights is None:
                continue
            wins = np.array([win_share(shown[k : k + 1], start) for k in range(len(shown))])
            for metric, of_each in ((SCORE, scores[id][skipped:]), (TRAIN_SCORE, trained), (WIN_RATE, wins)):
                known = ~np.isnan(of_each) & (weights > 0)
                if known.any():
                    values[row, metric] = float(np.average(of_each[known], weights=weights[known]))
        points.append(Point(n, n, ids, values))
    return points


def win_share(ours: Floats, theirs: Floats) -> float:
    """The share of all combinations in which ours is higher, a tie being one half; NaN if there is none."""
    [share] = shares(combinations([ours], [theirs]))
    return math.nan if share is None else share


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """The arms to compare: all with each other, or, of more than four, each with the first."""
    if len(names) <= MOST_PAIRED:
        return list(itertools.combinations(names, 2))
    return [(name, names[0]) for name in names[1:]]


def difference(
    a: str, b: str, ours: Mapping[int, Curve], theirs: Mapping[int, Curve], samples: int = SAMPLES
) -> dict[str, Any] | None:
    """The score of `a` minus that of `b` at the end, over the seeds that both have; None if there is none."""

    def of_seed(seed: int) -> tuple[float, Floats] | None:
        left, right = (values[:, 0, 0] for values in _aligned([ours[seed].end], [theirs[seed].end], [SCORE]))
        return _with_draws(left - right, seed, samples) if len(left) else None

    return _difference(a, b, "end", [seed for seed in ours if seed in theirs], of_seed)


def at_matched_kl(
    a: str, b: str, ours: Mapping[int, Curve], theirs: Mapping[int, Curve], samples: int = SAMPLES
) -> dict[str, Any] | None:
    """The same at the largest KL that both reach, which is found anew in each draw; None without two such curves.

    A prompt counts if it has a score and a KL at every point of both.
    """
    matched: list[float] = []

    def of_seed(seed: int) -> tuple[float, Floats] | None:
        means, drawn = [], []
        for values in _aligned(ours[seed].points, theirs[seed].points, [KL, SCORE]):  # [P, points, 2]
            if not len(values):
                return None
            means.append(values.mean(axis=0))
            generator = np.random.default_rng(seed)  # the same prompts in both arms
            flat = resampled_means(values.reshape(len(values), -1), samples=samples, generator=generator)
            drawn.append(flat.reshape(samples, *values.shape[1:]))
        first, second = means
        matched.append(min(first[:, 0].max(), second[:, 0].max()))
        return float(_gaps_at_kl(first[None], second[None])[0]), _gaps_at_kl(*drawn)

    seeds = [s for s in ours if s in theirs and min(len(ours[s].points), len(theirs[s].points)) > 1]
    found = _difference(a, b, "kl", seeds, of_seed)
    return None if found is None else found | {"kl": float(np.mean(matched))}


def _gaps_at_kl(first: Floats, second: Floats) -> Floats:
    """The gap between paths [B, T, 2] of two arms, [B]."""
    kl = np.minimum(first[..., 0].max(axis=1), second[..., 0].max(axis=1))
    return score_at(first, kl) - score_at(second, kl)


def score_at(paths: Floats, kl: Floats) -> Floats:
    """The scores [B] at which paths of (KL, score) [B, T, 2] first reach `kl` [B], linear in sqrt(KL) between two points."""
    roots, root = np.sqrt(np.maximum(paths[..., 0], 0.0)), np.sqrt(np.maximum(kl, 0.0))
    found = np.full(len(paths), np.nan)
    for t in range(paths.shape[1] - 1):
        x, u = roots[:, t], roots[:, t + 1]
        share = np.where(u > x, (root - x) / np.where(u > x, u - x, 1.0), 1.0)
        score = paths[:, t, 1] + share * (paths[:, t + 1, 1] - paths[:, t, 1])
        found = np.where(np.isnan(found) & (x <= root) & (root <= u), score, found)
    nearest = np.abs(roots - root[:, None]).argmin(axis=1)  # of a path that starts beyond
    return np.where(np.isnan(found), paths[np.arange(len(paths)), nearest, 1], found)


def _difference(
    a: str, b: str, at: str, seeds: Sequence[int], of_seed: Callable[[int], tuple[float, Floats] | None]
) -> dict[str, Any] | None:
    found = [figures for figures in map(of_seed, seeds) if figures is not None]
    if not found:
        return None
    values, draws = zip(*found, strict=True)
    return {"a": a, "b": b, "at": at, "metric": "score", "seeds": len(found), **_both((values, draws))}


def _aligned(ours: Sequence[Point], theirs: Sequence[Point], metrics: list[int]) -> tuple[Floats, Floats]:
    """Both sides' figures of the prompts that have them all, on both sides, in one order: [P, points, metrics] each."""
    places = [{id: row for row, id in enumerate(point.ids)} for point in (*ours, *theirs)]
    shared = [id for id in places[0] if all(id in place for place in places)]
    rows = [np.array([place[id] for id in shared], int) for place in places]
    columns = [point.values[at][:, metrics] for point, at in zip((*ours, *theirs), rows, strict=True)]
    values = np.stack(columns, axis=1)
    values = values[~np.isnan(values).any(axis=(1, 2))]
    return values[:, : len(ours)], values[:, len(ours) :]


def _ends(curves: Mapping[int, Curve], metric: int) -> tuple[list[float], list[Floats]]:
    """Of each seed the figure at the end, and its draws."""
    columns = {seed: curve.end.values[:, metric] for seed, curve in curves.items()}
    known = {seed: column[~np.isnan(column)] for seed, column in columns.items()}
    figures = [_with_draws(column, seed, SAMPLES) for seed, column in known.items() if len(column)]
    return [value for value, _ in figures], [draws for _, draws in figures]


def _with_draws(figures: Floats, seed: int, samples: int) -> tuple[float, Floats]:
    """The mean over prompts [P], and the means after they were resampled."""
    drawn = resampled_means(figures[:, None], samples=samples, generator=np.random.default_rng(seed))
    return float(figures.mean()), drawn[:, 0]


def _both(figures: tuple[Sequence[float], Sequence[Floats]]) -> dict[str, float | None]:
    """Both intervals: over seeds and prompts by the bootstrap, and over seeds by Student's t."""
    nested, student = nested_bootstrap(*figures), student_interval(figures[0])
    return {
        "value": nested.value,
        "low": nested.low,
        "high": nested.high,
        "seeds_low": student.low,
        "seeds_high": student.high,
    }


def _curve_json(curve: Curve) -> dict[str, Any]:
    points = [
        {"round": p.round, "completions": p.completions, **dict(zip(METRICS, map(float, p.means()), strict=True))}
        for p in curve.points
    ]
    return {"points": points, "budget": curve.budget}


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _mean_budget(curves: Sequence[Curve]) -> dict[str, float]:
    keys = dict.fromkeys(key for curve in curves for key in curve.budget)
    return {key: float(np.mean([curve.budget.get(key, 0.0) for curve in curves])) for key in keys}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    match value:
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list():
            return [_finite(v) for v in value]
        case float() if not math.isfinite(value):
            return None
    return value


def verdict(differences: Sequence[Mapping[str, Any]]) -> str:
    """The first comparison at the end, in a sentence: `iterative beats offline by 0.12 (0.05 to 0.19) …`."""
    found = next((d for d in differences if d["at"] == "end"), None)
    if found is None:
        return "No two arms have a finished run of the same seed yet."
    low, high = widest(found)
    seeds = f"{found['seeds']} seed{'s'[: found['seeds'] > 1]}"
    if low is None or high is None:
        return f"{found['a']} minus {found['b']}: {found['value']:+.3f} with one seed, which says nothing about others."
    span = f"{abs(found['value']):.3f} ({low:+.3f} to {high:+.3f}, {seeds})"
    if low > 0:
        return f"At the end, {found['a']} scores higher than {found['b']} by {span}."
    if high < 0:
        return f"At the end, {found['a']} scores lower than {found['b']} by {span}."
    return f"At the end, {found['a']} and {found['b']} cannot be told apart: the difference is {found['value']:+.3f} ({low:+.3f} to {high:+.3f}, {seeds})."


def widest(found: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The wider of the two intervals, which a claim has to pass."""
    if found["seeds_low"] is None:
        return None, None
    return min(found["low"], found["seeds_low"]), max(found["high"], found["seeds_high"])


# ----------------------------------------------------------------------------------------------------------- the page


def _interval(found: Mapping[str, Any], show: Callable[[float], str], ends: tuple[str, str] = ("low", "high")) -> str:
    low, high = (found[end] for end in ends)
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def _arm_rows(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    shown = (("score", "{:.3f}".format), ("win_rate", percent), ("train_score", "{:.3f}".format), ("kl", nats))
    rows = []
    for name, arm in arms.items():
        cells = []
        for metric, show in shown:
            end = arm["end"][metric]
            cells.append(("–", "") if end["value"] is None else (show(end["value"]), _interval(end, show)))
        settings = ", ".join(f"{key} = {value}" for key, value in arm["settings"].items())
        rows.append(
            {"name": name, "kind": arm["kind"], "settings": settings, "seeds": len(arm["seeds"]), "cells": cells}
        )
    return rows


def _difference_row(found: Mapping[str, Any]) -> dict[str, Any]:
    show = "{:+.3f}".format
    low, high = widest(found)
    apart = low is not None and high is not None and (low > 0 or high < 0)
    return {
        "what": f"{found['a']} minus {found['b']}",
        "at": "at the end" if found["at"] == "end" else f"at KL {nats(found['kl'])}",
        "value": show(found["value"]),
        "interval": _interval(found, show),
        "student": _interval(found, show, ("seeds_low", "seeds_high")),
        "seeds": found["seeds"],
        "apart": apart,
    }


BUDGETS = {"completions": count, "judge_calls": count, "steps": count, "tokens": count, "seconds": duration}


def _budget_rows(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "cells": [show(arm["budget"][key]) if key in arm["budget"] else "–" for key, show in BUDGETS.items()],
        }
        for name, arm in arms.items()
    ]


def _unequal(arms: Mapping[str, Any]) -> list[str]:
    """The budgets that differ between arms that train by more than one part in a hundred."""
    trained = [arm["budget"] for arm in arms.values() if arm["kind"] not in ("initial", "best_of_n")]
    found = []
    for key, what in (("completions", "completions"), ("judge_calls", "judge calls"), ("steps", "optimizer steps")):
        values = [budget.get(key, 0.0) for budget in trained]
        if values and max(values) > 1.01 * min(values):
            found.append(what)
    return found


def _trial_rows(trials: Sequence[Trial], chosen: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "arm": t.arm,
            "settings": t.describe(),
            "score": number(t.score),
            "kl": nats(t.kl),
            "best": t.arm in chosen and all(chosen[t.arm].get(k) == v for k, v in t.settings.items()),
        }
        for t in trials
    ]


CAPTIONS = {  # title and explanation of each plot
    "over_completions": (
        "Over completions",
        "What was sampled for training until then. Thin lines are seeds. Best of N samples in use, and is not here.",
    ),
    "over_rounds": ("Over rounds", "Thin lines are seeds. Rounds of unequal size stand at the same place."),
    "against_kl": (
        "Against KL",
        "The score reached at each distance from the initial policy. Thin lines are seeds. Points are rounds, or "
        "N = 1, 2, 4, …",
    ),
}
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def _figures(curves: Mapping[str, Mapping[int, Curve]], best_of_n: Collection[str]) -> dict[str, Figure]:
    axes: dict[str, Callable[[Point], float]] = {
        "completions": lambda p: float(p.completions),
        "round": lambda p: float(p.round),
        "KL to the initial policy, nats per completion": lambda p: float(p.means()[KL]),
    }
    names = ("over_completions", "over_rounds", "against_kl")
    trained = {name: of_seed for name, of_seed in curves.items() if name not in best_of_n}
    drawn = {name: curves if name == "against_kl" else trained for name in names}
    return {
        name: figure(
            name,
            [_panel(drawn[name], label, x, metric) for metric in (SCORE, WIN_RATE)],
            height=3.9 + (0.18 * math.ceil(len(drawn[name]) / 3) if len(drawn[name]) > MOST_AMONG_LINES else 0),
        )
        for name, (label, x) in zip(names, axes.items(), strict=True)
        if drawn[name]
    }


def _panel(curves: Mapping[str, Mapping[int, Curve]], label: str, x: Callable[[Point], float], metric: int) -> Panel:
    titles = {SCORE: "Score by the judge that evaluates", WIN_RATE: "Win rate against the initial policy"}

    def draw(ax: Axes) -> None:
        for place, (name, of_seed) in enumerate(curves.items()):
            color, style = COLORS[place % len(COLORS)], STYLES[place // len(COLORS) % len(STYLES)]
            paths = [([x(p) for p in c.points], [float(p.means()[metric]) for p in c.points]) for c in of_seed.values()]
            for xs, ys in paths:
                ax.plot(xs, ys, color=color, linewidth=0.8, alpha=0.35, linestyle=style)
            shortest = min(len(xs) for xs, _ in paths)  # the gate may have stopped some seeds
            middle = [np.mean([path[side][:shortest] for path in paths], axis=0) for side in (0, 1)]
            ax.plot(*middle, color=color, label=name, linestyle=style, marker="o", markersize=4)
        if metric == WIN_RATE:
            ax.axhline(0.5, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        ax.set_title(titles[metric])
        ax.set_xlabel(label)
        if label == "round":
            ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        if len(curves) > MOST_AMONG_LINES and metric == WIN_RATE:
            ax.legend(fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(-0.12, -0.28), handlelength=2.4)
        elif len(curves) <= MOST_AMONG_LINES and metric == SCORE:
            ax.legend(fontsize=8.5)

    return draw

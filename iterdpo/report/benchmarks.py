"""Reports of lm-evaluation-harness as metrics of a round. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from iterdpo.errors import DataError

RESULTS = "results.json"
Results = dict[str, dict[str, Any]]
"""Of each task its metrics, with their standard errors, and whether higher is better:
`{"gsm8k": {"metrics": {"exact_match,strict-match": [0.51, 0.01]}, "higher_is_better": {"exact_match": True}, "samples": 1319}}`
"""


def results_of(report: Mapping[str, Any]) -> Results:
    """What the harness's report says of each task or group of tasks, without times, paths and versions.

    Raises:
        DataError: the report is of another form.
    """
    found: Results = {}
    try:
        for task, values in report["results"].items():
            metrics = {
                name: [_finite(value), _error(values, name)]
                for name, value in values.items()
                if "," in name and "_stderr," not in name and isinstance(value, int | float)
            }
            if metrics:
                higher = report.get("higher_is_better", {}).get(task) or {}
                samples = (report.get("n-samples", {}).get(task) or {}).get("effective")
                found[task] = {"metrics": metrics, "higher_is_better": higher, "samples": samples}
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(f"lm_eval's report is of an unknown form ({type(error).__name__}: {error})") from None
    return found


def benchmark_metrics(results: Results, initial: Results | None) -> dict[str, float | None]:
    """`benchmark/<task>/<metric>` with its standard error, and `benchmark/max_loss` against the initial policy.

    A task's loss is by how much its first metric is worse; the loss of all is the largest, in the metric's own unit. It is
    below 0 if all tasks have become better, and None if one of them has no value.
    """
    metrics: dict[str, float | None] = {}
    losses = []
    for task, values in results.items():
        for name, (value, error) in values["metrics"].items():
            metrics[f"benchmark/{task}/{name}"] = value
            metrics[f"benchmark/{task}/{name}_stderr"] = error
        first = next(iter(values["metrics"]))
        before = (initial or {}).get(task, {}).get("metrics", {}).get(first)
        if before is not None:
            sign = -1 if values["higher_is_better"].get(first.partition(",")[0]) is False else 1
            now = values["metrics"][first][0]
            losses.append(None if None in (before[0], now) else sign * (before[0] - now))
    if losses:
        measured = [loss for loss in losses if loss is not None]
        metrics["benchmark/max_loss"] = max(measured) if len(measured) == len(losses) else None
    return metrics


def _error(values: Mapping[str, Any], name: str) -> float | None:
    metric, _, kind = name.partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    return _finite(error) if isinstance(error, int | float) else None


def _finite(value: float) -> float | None:
    """The value, or None if it is NaN or infinite: it measures nothing."""
    return float(value) if math.isfinite(value) else None

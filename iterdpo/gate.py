"""Promote, keep or stop: what happens to a round's policy. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Decision(NamedTuple):
    """`Decision("keep", "win_rate/vs_previous 0.47 is below 0.5; the next round starts from the policy before")`."""

    action: Literal["promote", "keep", "stop"]
    reason: str


def decide(
    metrics: Mapping[str, Any],
    *,
    metric: str,
    minimum: float,
    max_kl: float | None = None,
    otherwise: Literal["keep", "stop"] = "keep",
) -> Decision:
    """Promote the candidate if `metrics[metric] >= minimum` and its KL is within bounds; else `otherwise`.

    A metric that could not be measured promotes nothing. Nor does a win rate of 0.5 that consists of ties alone (its
    interval is 0.5 to 0.5), unless `minimum` is lower.
    """
    value, kl = metrics.get(metric), metrics.get("kl/to_initial")
    consequence = "the run ends" if otherwise == "stop" else "the policy before is kept"
    if value is None:
        return Decision(otherwise, f"{metric} was not measured; {consequence}")
    if not value >= minimum:  # NaN too
        return Decision(otherwise, f"{metric} {value:.3f} is below {minimum:g}; {consequence}")
    if metric.startswith("win_rate/") and minimum >= value == 0.5 and _all_tied(metrics, metric.removesuffix("_low")):
        return Decision(otherwise, f"{metric} is 0.500 from ties alone; {consequence}")
    if max_kl is not None and kl is None:
        return Decision(otherwise, f"kl/to_initial was not measured; {consequence}")
    if max_kl is not None and kl is not None and not kl <= max_kl:
        return Decision(otherwise, f"kl/to_initial {kl:.1f} is above {max_kl:g}; {consequence}")
    return Decision("promote", f"{metric} {value:.3f} is at least {minimum:g}")


def _all_tied(metrics: Mapping[str, Any], win_rate: str) -> bool:
    return all(metrics.get(f"{win_rate}{end}") == 0.5 for end in ("", "_low", "_high"))

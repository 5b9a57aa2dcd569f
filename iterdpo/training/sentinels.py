"""Alarms while a round trains. Pure: the metrics of a step in, alarms out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from iterdpo.config import SentinelsConfig


@dataclass(frozen=True, slots=True)
class Alarm:
    """`Alarm("chosen_drop", "warn", "the chosen completions have lost 112.4 nats against the reference, …")`."""

    name: str
    action: str
    message: str


class Sentinels:
    """Alarms about each step's metrics, with the bounds and actions of a `SentinelsConfig`."""

    def __init__(self, config: SentinelsConfig) -> None:
        self.config = config
        self.drops: deque[float] = deque(maxlen=config.window)
        self.margins: deque[float] = deque(maxlen=config.window)
        self.accuracies: deque[float] = deque(maxlen=config.stuck_window)
        self.norms: deque[float] = deque(maxlen=config.stuck_window)

    def observe(self, metrics: dict[str, Any]) -> list[Alarm]:
        """The alarms of a step that was applied. `metrics` is its line of the training log."""
        config = self.config
        checks = (
            ("chosen_drop", config.chosen_drop_action, self._drop(metrics.get("logps/chosen_drop"))),
            ("margin", config.margin_action, self._margin(metrics.get("rewards/margins"))),
            ("stuck_accuracy", config.stuck_accuracy_action, self._stuck(metrics.get("rewards/accuracies"))),
            ("grad_norm", config.grad_norm_action, self._norm(metrics["grad_norm"])),
        )
        return [
            Alarm(name, action, message) for name, action, message in checks if message is not None and action != "off"
        ]

    def _drop(self, value: float | None) -> str | None:
        mean = _full_mean(self.drops, value)
        if mean is None or mean <= self.config.chosen_drop:
            return None
        return (
            f"the chosen completions have lost {mean:.1f} nats against the reference in the mean of {len(self.drops)} "
            f"steps (dpo.sentinels.chosen_drop = {self.config.chosen_drop:g})"
        )

    def _margin(self, value: float | None) -> str | None:
        mean = _full_mean(self.margins, value)
        if mean is None or mean <= self.config.margin:
            return None
        return (
            f"the reward margin is {mean:.1f} in the mean of {len(self.margins)} steps "
            f"(dpo.sentinels.margin = {self.config.margin:g})"
        )

    def _stuck(self, value: float | None) -> str | None:
        mean = _full_mean(self.accuracies, value)
        if mean is None or abs(mean - 0.5) > self.config.stuck_accuracy:
            return None
        return (
            f"the accuracy of the last {len(self.accuracies)} steps is {mean:.3f}: nothing is learnt "
            f"(dpo.sentinels.stuck_accuracy = {self.config.stuck_accuracy:g})"
        )

    def _norm(self, value: float) -> str | None:
        before = median(self.norms) if len(self.norms) >= 5 else None
        self.norms.append(value)
        if not before or value <= self.config.grad_norm * before:
            return None
        return (
            f"the gradient norm is {value:.3g}, the median of the steps before {before:.3g} "
            f"(dpo.sentinels.grad_norm = {self.config.grad_norm:g})"
        )


def _full_mean(values: deque[float], value: float | None) -> float | None:
    """Add `value`. Returns the mean of the values, or None until there are as many as `values` holds."""
    if value is None:
        return None
    values.append(value)
    return fmean(values) if len(values) == values.maxlen else None

"""What is watched while a round trains. Pure: metrics of a step in, alarms out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any


@dataclass(frozen=True, slots=True)
class Alarm:
    """`Alarm("chosen_drop", "warn", "the chosen completions have lost 112.4 nats against the reference, …")`."""

    name: str
    action: str
    message: str


class Sentinels:
    """Looks at each step's metrics, as `SentinelsConfig` (its fields as a dict) says. See there for what is watched."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        window, long = config["window"], config["stuck_window"]
        self.drops: deque[float] = deque(maxlen=window)
        self.margins: deque[float] = deque(maxlen=window)
        self.accuracies: deque[float] = deque(maxlen=long)
        self.norms: deque[float] = deque(maxlen=long)

    def observe(self, metrics: dict[str, Any]) -> list[Alarm]:
        """The alarms of a step that was applied. `metrics` is its line of the training log."""
        alarms = []
        for name, message in (
            ("chosen_drop", self._drop(metrics.get("logps/chosen_drop"))),
            ("margin", self._margin(metrics.get("rewards/margins"))),
            ("stuck_accuracy", self._stuck(metrics.get("rewards/accuracies"))),
            ("grad_norm", self._norm(metrics["grad_norm"])),
        ):
            action = self.config[f"{name}_action"]
            if message is not None and action != "off":
                alarms.append(Alarm(name, action, message))
        return alarms

    def _drop(self, value: float | None) -> str | None:
        return self._mean_above(
            self.drops, value, "chosen_drop", "the chosen completions have lost {:.1f} nats against the reference"
        )

    def _margin(self, value: float | None) -> str | None:
        return self._mean_above(self.margins, value, "margin", "the reward margin is {:.1f}")

    def _mean_above(self, values: deque[float], value: float | None, key: str, text: str) -> str | None:
        if value is None:
            return None
        values.append(value)
        mean = fmean(values)
        if len(values) < (values.maxlen or 0) or mean <= self.config[key]:
            return None
        return f"{text.format(mean)} in the mean of {len(values)} steps (dpo.sentinels.{key} = {self.config[key]:g})"

    def _stuck(self, value: float | None) -> str | None:
        if value is None:
            return None
        self.accuracies.append(value)
        mean, margin = fmean(self.accuracies), self.config["stuck_accuracy"]
        if len(self.accuracies) < (self.accuracies.maxlen or 0) or abs(mean - 0.5) > margin:
            return None
        return (
            f"the accuracy of the last {len(self.accuracies)} steps is {mean:.3f}: nothing is learnt "
            f"(dpo.sentinels.stuck_accuracy = {margin:g})"
        )

    def _norm(self, value: float) -> str | None:
        before = median(self.norms) if len(self.norms) >= 5 else None
        self.norms.append(value)
        times = self.config["grad_norm"]
        if not before or value <= times * before:
            return None
        return f"the gradient norm is {value:.3g}, the median of the steps before {before:.3g} (dpo.sentinels.grad_norm = {times:g})"

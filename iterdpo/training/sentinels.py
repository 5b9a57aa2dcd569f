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
        drop = _full_mean(self.drops, metrics.get("logps/chosen_drop"))
        margin = _full_mean(self.margins, metrics.get("rewards/margins"))
        accuracy = _full_mean(self.accuracies, metrics.get("rewards/accuracies"))
        norm, before = metrics["grad_norm"], median(self.norms) if len(self.norms) >= 5 else None
        self.norms.append(norm)
        window = f"in the mean of {config.window} steps"
        found = {}
        if drop is not None and drop > config.chosen_drop:
            found["chosen_drop"] = f"the chosen completions have lost {drop:.1f} nats against the reference {window}"
        if margin is not None and margin > config.margin:
            found["margin"] = f"the reward margin is {margin:.1f} {window}"
        if accuracy is not None and abs(accuracy - 0.5) <= config.stuck_accuracy:
            last = f"the accuracy of the last {config.stuck_window} steps"
            found["stuck_accuracy"] = f"{last} is {accuracy:.3f}: nothing is learnt"
        if before and norm > config.grad_norm * before:
            found["grad_norm"] = f"the gradient norm is {norm:.3g}, the median of the steps before {before:.3g}"
        settings = config.model_dump()
        return [
            Alarm(name, action, f"{said} (dpo.sentinels.{name} = {settings[name]:g})")
            for name, said in found.items()
            if (action := settings[f"{name}_action"]) != "off"
        ]


def _full_mean(values: deque[float], value: float | None) -> float | None:
    """Add `value`. Returns the mean of the values, or None until there are as many as `values` holds."""
    if value is None:
        return None
    values.append(value)
    return fmean(values) if len(values) == values.maxlen else None

"""Promote, keep, lower the learning rate or stop: what happens to a round's policy. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from iterdpo.types import Action, RoundRecord

BOUNDS = ("minimum", "maximum", "max_increase", "max_decrease")
STRICTNESS: tuple[Action, ...] = ("keep", "lower_learning_rate", "stop")
FACTOR = 0.5
"""Of `lower_learning_rate`, unless the settings have another."""
BASELINES = {"initial": "the initial policy", "previous": "the previous policy", "best": "the best round"}


class Check(NamedTuple):
    """A rule held against a round: `Check("kl/to_initial", 31.2, "maximum", 20.0, None, holds=False, …)`."""

    metric: str
    value: float | None
    kind: str
    """One of the `BOUNDS`."""
    bound: float
    before: float | None
    """The value that an increase or a decrease is from."""
    holds: bool
    otherwise: Action
    finding: str
    """`kl/to_initial 31.2 is above 20`."""


class Decision(NamedTuple):
    """`Decision("keep", "win_rate/vs_previous 0.470 is below 0.5; the policy before is kept", checks=[…])`."""

    action: Action
    reason: str
    checks: Sequence[Check] = ()
    """Of the candidate, every rule in the order of the settings."""


def decide(
    metrics: Mapping[str, Any],
    *,
    metric: str,
    minimum: float,
    max_kl: float | None = None,
    otherwise: Action = "keep",
    rules: Sequence[Mapping[str, Any]] = (),
    patience: int | None = None,
    learning_rate_factor: float = FACTOR,
    earlier: Sequence[RoundRecord] = (),
) -> Decision:
    """Promote the candidate if every rule holds; else the strictest outcome of those that do not.

    `metric` with `minimum`, and `max_kl`, are the first rules. `earlier` are the records of the rounds before, which
    increases are measured from, and which `patience` counts. A metric that could not be measured promotes nothing.
    Nor does a win rate of 0.5 that consists of ties alone (its interval is 0.5 to 0.5), unless `minimum` is lower.
    """
    short: list[Mapping[str, Any]] = [{"metric": metric, "minimum": minimum, "otherwise": otherwise}]
    if max_kl is not None:
        short.append({"metric": "kl/to_initial", "maximum": max_kl, "otherwise": otherwise})
    checks = [_check(metrics, rule, earlier) for rule in (*short, *rules)]
    failed = [check for check in checks if not check.holds]
    if not failed:
        others = len(checks) - len(short)
        more = f", and {'the other rule holds' if others == 1 else f'the other {others} rules hold'}" if others else ""
        return Decision("promote", checks[0].finding + more, checks)
    decisive = max(failed, key=lambda check: STRICTNESS.index(check.otherwise))  # the first of the strictest
    action, consequence = decisive.otherwise, "the policy before is kept"
    if action == "lower_learning_rate":
        consequence += f", and the learning rate is multiplied by {learning_rate_factor:g}"
    looked = filter(was_evaluated, reversed(earlier))
    waited = 1 + len(list(takewhile(lambda record: record.decision != "promote", looked)))
    if action == "stop":
        consequence = "the run ends"
    elif patience is not None and waited >= patience:
        action, consequence = "stop", f"the run ends after {waited} round{'s'[: waited > 1]} without a promotion"
    return Decision(action, f"{decisive.finding}; {consequence}", checks)


def best_round(rounds: Sequence[Mapping[str, Any]], gate: Mapping[str, Any]) -> int:
    """The best promoted round, which may be round 0. `rounds` are the lines of metrics.jsonl, `gate` the settings.

    If `gate.metric` means the same in every round, the promoted round with the highest one is the best, the later of two
    that are equal. If it compares with the round before, each promoted round has beaten the one before it, so that
    the last one is the best.
    """
    decided = [row for row in rounds if row.get("gate/evaluated", True) not in (False, 0)]  # the others had no gate
    promoted = [row for row in decided if row.get("gate/decision") == "promote"] or decided[-1:]
    metric = str(gate.get("metric", "win_rate/vs_previous")).removesuffix("_low")
    if metric.partition("/vs_")[2] in ("previous", "best"):
        return int(promoted[-1]["round"])

    def rank(row: Mapping[str, Any]) -> float:
        value = row.get(metric)
        if value is None or value != value:
            against_itself = metric.endswith("/vs_initial") and row["round"] == 0
            return 0.5 if against_itself else -math.inf
        return float(value)

    return int(max(reversed(promoted), key=rank)["round"])


def best_record(records: Sequence[RoundRecord]) -> RoundRecord:
    """The record of the `best_round`; `records` are those of all rounds so far."""
    rows = [{**record.metrics, "round": record.round, "gate/decision": record.decision} for record in records]
    best = best_round(rows, records[-1].gate)
    return next(record for record in records if record.round == best)


def was_evaluated(record: RoundRecord) -> bool:
    """Whether the round had an evaluation and so a gate: with `evaluation.every`, some have neither."""
    return record.metrics.get("gate/evaluated", True) is not False


def learning_rate(initial: float, earlier: Sequence[RoundRecord]) -> float:
    """The learning rate that the rounds before have left of `initial`."""
    for record in earlier:
        if record.decision == "lower_learning_rate":
            initial *= float(record.gate.get("learning_rate_factor", FACTOR))
    return initial


def _check(metrics: Mapping[str, Any], rule: Mapping[str, Any], earlier: Sequence[RoundRecord]) -> Check:
    metric = rule["metric"]
    kind = next(kind for kind in BOUNDS if rule.get(kind) is not None)
    value, bound, before = metrics.get(metric), float(rule[kind]), None
    compared = value
    against = rule.get("against", "previous")
    if kind in ("max_increase", "max_decrease"):
        before = _baseline(against, earlier).metrics.get(metric)
        change = None if value is None or before is None else value - before
        compared = change if kind == "max_increase" or change is None else -change

    def found(holds: bool, finding: str) -> Check:
        return Check(metric, value, kind, bound, before, holds, rule["otherwise"], finding)

    if value is None:
        return found(False, f"{metric} was not measured")
    if compared is None:
        return found(False, f"{metric} was not measured for {BASELINES[against]}")
    holds = compared >= bound if kind == "minimum" else compared <= bound  # of NaN neither
    if kind == "minimum" and holds and bound >= compared == 0.5 and _all_tied(metrics, metric):
        return found(False, f"{metric} is 0.500 from ties alone")
    if kind in ("minimum", "maximum"):
        words = {"minimum": ("is below", "is at least"), "maximum": ("is above", "is at most")}[kind]
        digits = 1 if metric.startswith("kl/") else 3
        return found(holds, f"{metric} {value:.{digits}f} {words[holds]} {bound:g}")
    moved = "rose" if kind == "max_increase" else "fell"
    limit = "at most" if holds else "more than"
    return found(
        holds, f"{metric} {moved} by {compared:.3g} from {before:.3g} of {BASELINES[against]}, {limit} {bound:g}"
    )


def _baseline(against: str, earlier: Sequence[RoundRecord]) -> RoundRecord:
    match against:
        case "initial":
            return earlier[0]
        case "best":
            return best_record(earlier)
    last = next(filter(was_evaluated, reversed(earlier)))
    return next(record for record in earlier if record.round == last.policy_round)


def _all_tied(metrics: Mapping[str, Any], metric: str) -> bool:
    win_rate = metric.removesuffix("_low")
    return "win_rate/" in metric and all(metrics.get(f"{win_rate}{end}") == 0.5 for end in ("", "_low", "_high"))

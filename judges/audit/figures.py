"""How good a judge is: figures with intervals, from the records that check.py makes of labelled pairs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.special import expit, logit

from iterdpo.seeds import derive_seed
from iterdpo.stats import NOTHING, Estimate, Floats, clustered_bootstrap, clustered_mean
from judges.audit.check import FROM_SCORES, FROM_VERDICTS, JudgedPair, orders
from judges.audit.stats import (
    best_temperature,
    calibrated_error,
    calibration_error,
    reliability,
    symmetric_rank_correlation,
)

CREDIT: dict[str | None, float] = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
WINNERS = ("chosen", "rejected")
SUBSET_FIGURES = ("accuracy", "accuracy_decided", "tie_rate", "coverage", "flip_rate")


def measure(
    pairs: Sequence[JudgedPair], *, seed: int = 0, confidence: float = 0.95, samples: int = 1_000
) -> dict[str, Any]:
    """The figures of a check, as `{"counts": …, "figures": {name: Estimate}, "subsets": …, "reliability": …, …}`.

    Intervals are over prompts (see judges/audit/stats.py); a metric with no data is None.

    Of the pairs that are labelled with a winner:

    accuracy                 the share judged right, of those judged; a tie is half right
    accuracy_strict          of all of them, also those not judged; a tie or an abstention is wrong
    accuracy_decided         of those judged with a winner
    accuracy_agreeing        of those with the same winner in both orders
    tie_rate                 ties, of those judged
    longer_wins              of those decided with different lengths: the longer one won
    longer_is_better         of the same pairs: the label says that the longer one is better
    length_bias              the difference of these two: what the judge likes in length beyond what the label does
    accuracy_chosen_longer   accuracy_decided of the pairs whose chosen is the longer one
    accuracy_chosen_shorter  and of those whose chosen is the shorter one
    ece, brier               calibration error (see `calibration_error`), mean squared error, of the
                             probability that the chosen is better
    ece_tempered             on one half of the prompts, of sigmoid(d / T) with the T that fits the other half best

    Of all pairs:

    coverage                 judged, not abstained
    tie_agreement            of those labelled a tie and judged: judged a tie
    flip_rate                of those judged in both orders: another verdict in the other order, to or from a tie too
    first_position           of the single comparisons with a winner: the one shown first won; 0.5 is fair
    position_bias            first_position - 0.5
    first_index              of the groups with a winner: the completion that came first in the group won
    length_rank_correlation       Spearman's, of score difference and length difference
    self_consistency         over repeats: the share of a pair's verdicts that are its commonest
    """
    reasons = Counter(reason for p in pairs if p.judgment.verdict is None for reason in p.judgment.reasons)
    subsets = sorted({p.subset for p in pairs if p.subset is not None})
    by_subset = {name: [p for p in pairs if p.subset == name] for name in subsets}
    probable = [p for p in pairs if not p.tie and p.judgment.probability is not None]
    probabilities = [p.judgment.probability for p in probable if p.judgment.probability is not None]
    drawn = {"seed": seed, "confidence": confidence, "samples": samples}
    return {
        "counts": {
            "pairs": len(pairs),
            "prompts": len({p.prompt_id for p in pairs}),
            "judged_prompts": len({p.prompt_id for p in pairs if p.judgment.verdict is not None and not p.tie}),
            "labelled_ties": sum(p.tie for p in pairs),
            "judged": sum(p.judgment.verdict is not None for p in pairs),
            "ties": sum(p.judgment.verdict == "tie" for p in pairs),
        },
        "figures": {
            **_shares(pairs, confidence),
            **_lengths(pairs, drawn),
            **_calibration(probable, drawn),
        },
        "subsets": {
            name: {"pairs": len(some), **{k: _shares(some, confidence)[k] for k in SUBSET_FIGURES}}
            for name, some in by_subset.items()
        },
        "calibration": {
            "probability": Counter(p.judgment.source for p in probable).most_common(1)[0][0] if probable else None,
            "temperature": _temperature(probable, seed),
            "ece_if_calibrated": calibrated_error(probabilities, seed=seed),
        },
        "reliability": reliability(probabilities, [p.prompt_id for p in probable]),
        "abstentions": dict(reasons.most_common()),
    }


def _mean(
    rows: Iterable[tuple[float, JudgedPair]], *, confidence: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    found = list(rows)
    prompts = [pair.prompt_id for _, pair in found]
    return clustered_mean([value for value, _ in found], prompts, bounds=bounds, confidence=confidence)


def _shares(pairs: Sequence[JudgedPair], confidence: float) -> dict[str, Estimate]:
    share = partial(_mean, confidence=confidence)
    judged = [(p.judgment.verdict, p) for p in pairs if p.judgment.verdict is not None]
    labelled = [(verdict, p) for verdict, p in judged if not p.tie]
    both = [(found, p) for p in pairs if (found := orders(p)) is not None]
    judgments = [(p.judgment, p.chosen_first, p) for p in pairs]
    judgments += [(p.swapped, not p.chosen_first, p) for p in pairs if p.swapped is not None]
    shown = [(s, p) for judgment, _, p in judgments for s in judgment.shown if s.verdict in WINNERS]
    single = [(float((s.verdict == "chosen") == s.chosen_first), p) for s, p in shown]
    grouped = [(j.verdict == "chosen", order, p) for j, order, p in judgments if j.verdict in WINNERS]
    repeated = [([p.judgment.verdict, *p.repeats], p) for p in pairs if p.repeats]
    return {
        "accuracy": share((CREDIT[verdict], p) for verdict, p in labelled),
        "accuracy_strict": share((float(p.judgment.verdict == "chosen"), p) for p in pairs if not p.tie),
        "accuracy_decided": share((CREDIT[verdict], p) for verdict, p in labelled if verdict != "tie"),
        "accuracy_agreeing": share((CREDIT[a], p) for (a, b), p in both if not p.tie and a in WINNERS and a == b),
        "coverage": share((float(p.judgment.verdict is not None), p) for p in pairs),
        "tie_rate": share((float(verdict == "tie"), p) for verdict, p in labelled),
        "tie_agreement": share((float(verdict == "tie"), p) for verdict, p in judged if p.tie),
        "flip_rate": share((float(a != b), p) for (a, b), p in both),
        "first_position": share(single),
        "position_bias": share(((first - 0.5, p) for first, p in single), bounds=(-0.5, 0.5)),
        "first_index": share((float(right == order), p) for right, order, p in grouped),
        "self_consistency": share((max(Counter(v).values()) / len(v), p) for v, p in repeated),
    }


def _lengths(pairs: Sequence[JudgedPair], drawn: dict[str, Any]) -> dict[str, Estimate]:
    share = partial(_mean, confidence=drawn["confidence"])
    uneven = [
        (p.judgment.verdict == "chosen", p.lengths[0] > p.lengths[1], p)
        for p in pairs
        if not p.tie and p.judgment.verdict in WINNERS and p.lengths[0] != p.lengths[1]
    ]
    judged = [p for p in pairs if p.judgment.verdict is not None]
    differences = [p.judgment.difference for p in judged], [p.lengths[0] - p.lengths[1] for p in judged]
    statistic, prompts = symmetric_rank_correlation(*differences), [p.prompt_id for p in judged]
    return {
        "longer_wins": share((float(right == longer), p) for right, longer, p in uneven),
        "longer_is_better": share((float(longer), p) for _, longer, p in uneven),
        "length_bias": share((((right == longer) - longer, p) for right, longer, p in uneven), bounds=(-1.0, 1.0)),
        "accuracy_chosen_longer": share((float(right), p) for right, longer, p in uneven if longer),
        "accuracy_chosen_shorter": share((float(right), p) for right, longer, p in uneven if not longer),
        "length_rank_correlation": clustered_bootstrap(statistic, prompts, **drawn),
    }


def _calibration(pairs: Sequence[JudgedPair], drawn: dict[str, Any]) -> dict[str, Estimate]:
    p = np.array([pair.judgment.probability for pair in pairs], np.float64)
    prompts = [pair.prompt_id for pair in pairs]
    other = [pair for pair in pairs if not _fits(pair, drawn["seed"])]
    temperature = _temperature(pairs, drawn["seed"])
    tempered = NOTHING
    if temperature is not None and other:
        best = expit(_differences(other) / temperature)
        tempered = calibration_error(best, [pair.prompt_id for pair in other], **drawn)
    return {
        "ece": calibration_error(p, prompts, **drawn),
        "ece_tempered": tempered,
        "brier": clustered_mean((1 - p) ** 2, prompts, confidence=drawn["confidence"]),
    }


def _temperature(pairs: Sequence[JudgedPair], seed: int) -> float | None:
    """The one that fits best the half of the prompts that `_fits` picks; None if verdicts are all or nothing."""
    if any(pair.judgment.source == FROM_VERDICTS for pair in pairs):
        return None
    return best_temperature(_differences([pair for pair in pairs if _fits(pair, seed)]))


def _fits(pair: JudgedPair, seed: int) -> bool:
    return derive_seed(seed, "temperature", pair.prompt_id) % 2 == 0


def _differences(pairs: Sequence[JudgedPair]) -> Floats:
    """Score of the chosen minus that of the rejected; of probabilities, the log-odds. [pairs]"""
    p = np.array([pair.judgment.probability for pair in pairs], np.float64)
    log_odds = logit(p.clip(1e-6, 1 - 1e-6))
    scored = np.array([pair.judgment.source == FROM_SCORES for pair in pairs], bool)
    differences: Floats = np.where(scored, [pair.judgment.difference for pair in pairs], log_odds)
    return differences

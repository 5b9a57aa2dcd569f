"""What a run achieved, in a sentence or a few, from its metrics and its configuration.

The interval of the win rate decides the words: above one half the policy beats the initial one, below it is worse,
and an interval that contains one half shows no difference, whatever the scores did.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from iterdpo.gate import best_round
from iterdpo.report.format import nats, number, percent
from iterdpo.run.read import Run

JUDGES = {"heldout": "the held-out judge", "train": "the training judge"}
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def headline(run: Run) -> str:
    """`Three rounds moved the held-out judge's score from 0.29 to 0.72; round 3 beats the initial policy on …`."""
    if "data" in run.config:
        return _offline_headline(run)
    evaluation, planned, metrics = run.config.get("evaluation") or {}, run.config.get("rounds"), run.metrics
    judge = "heldout" if evaluation.get("judge") else "train"
    if metrics.empty:
        return "There are no measurements yet: the evaluation of the initial policy has not finished."
    initial, last = metrics.iloc[0], metrics.iloc[-1]
    done = int(metrics.index[-1])
    if done == 0:
        score = value(initial, f"score/{judge}_judge")
        scored = f"; the initial policy scores {number(score)} by {JUDGES[judge]}" if score is not None else ""
        return f"None of the {planned} planned rounds is done yet{scored}."

    sentences = []
    if last["gate/decision"] == "stop":
        why = str(last.get("gate/reason") or "").removesuffix("; the run ends")
        sentences.append(f"The gate stopped the run in round {done} of {planned}{f': {why}' if why else ''}.")
    elif planned and done < planned:
        sentences.append(f"Unfinished: {done} of {planned} rounds done.")
    promoted = [r for r in metrics.index if r > 0 and metrics.at[r, "gate/decision"] == "promote"]
    gate = run.config.get("gate") or {}
    best = best_round([{**row, "round": r} for r, row in metrics.iterrows()], gate)
    shown: Any = best or (promoted[-1] if promoted else done)
    final = metrics.loc[shown]
    confidence = value(final, "evaluation/confidence") or float(evaluation.get("confidence", 0.95))
    comparison = _comparison(final, confidence)
    if promoted:
        some = f", {_word(len(promoted))} of them promoted," if len(promoted) < done else ""
        moved = _movement(initial, final, judge)
        score_moved = f" moved {JUDGES[judge]}'s score {moved};" if moved else ":"
        sentences.append(f"{_word(done).capitalize()} round{'s' if done > 1 else ''}{some}{score_moved} {comparison}")
    else:
        none = f"None of {_word(done)} rounds was" if done > 1 else "The one round was not"
        sentences.append(f"{none} promoted: the policy is still the initial one. R{comparison[1:]}")

    if promoted and best != promoted[-1]:
        which = f"Round {best}" if best else "The initial policy"
        sentences.append(f"{which} is the best by {gate['metric']}, and `policy` points to it.")
    high = value(final, "win_rate/vs_initial_high")
    if judge == "train":
        sentences.append(
            "There was no held-out judge: the training judge marked its own work, so this shows that the policy "
            "learned to please it, not that it improved."
        )
    elif high is not None and high < 0.5:
        before, after = value(initial, "score/train_judge"), value(final, "score/train_judge")
        if before is not None and after is not None and after > before:
            meanwhile = f"Meanwhile the training judge's score went {_movement(initial, final, 'train')}"
            sentences.append(f"{meanwhile}: the policy exploits that judge's errors.")
    elif (exploited := _exploited(metrics)) is not None:
        sentences.append(exploited)
    unjudged, completions = value(final, "evaluation/unjudged"), value(final, "evaluation/completions")
    if unjudged and completions and unjudged > 0.05 * completions:
        share = f"{unjudged:,.0f} of {completions:,.0f}"
        sentences.append(f"{share} held-out completions could not be judged and do not count.")
    unfinished = value(final, "length/unfinished_thoughts")
    if unfinished is not None and unfinished > 0.05:
        sentences.append(
            f"{percent(unfinished)} of the held-out completions are thoughts without an end, and lose against every answer "
            "(sampling.max_tokens limits reasoning and answer together)."
        )
    flips = value(last, "judge/flip_rate")
    if flips is not None and flips >= 0.5:
        sentences.append(
            f"The training judge's verdict changed with the order in {percent(flips)} of its comparisons. Random "
            "verdicts would change in half of them, so the judge decides by position."
        )
    return " ".join(sentences)


def value(row: pd.Series, key: str) -> float | None:
    """The metric, or None if it is missing or null."""
    found = row.get(key)
    return None if found is None or pd.isna(found) else float(found)


def _exploited(metrics: pd.DataFrame) -> str | None:
    """What to say if the last candidate pleases the training judge more, and the held-out judge less, than the policy before."""
    last = metrics.iloc[-1]
    high, after = value(last, "win_rate/vs_previous_high"), value(last, "score/train_judge")
    before = [r for r in metrics.index[:-1] if r == 0 or metrics.at[r, "gate/decision"] == "promote"]
    if high is None or high >= 0.5 or after is None:
        return None
    start = value(metrics.loc[before[-1]], "score/train_judge")
    if start is None or after <= start:
        return None
    return (
        f"In round {last.name} the training judge's score went from {number(start)} to {number(after)}, while the held-out "
        f"judge prefers the policy before: the candidate exploits the training judge's errors."
    )


def _comparison(row: pd.Series, confidence: float) -> str:
    """`round 3 beats the initial policy on 71 % of held-out prompts (95 % interval 65 to 77 %), at 14 nats of KL.`."""
    rate, low, high = (value(row, f"win_rate/vs_initial{end}") for end in ("", "_low", "_high"))
    kl = value(row, "kl/to_initial")
    subject, distance = f"round {row.name}", f", at {nats(kl)} nats of KL" if kl is not None else ""
    if rate is None:
        return f"{subject} was not compared with the initial policy{distance}."
    wins = f"{percent(rate)} of held-out prompts"
    if low is None or high is None:
        return f"{subject} wins on {wins}, without an interval{distance}."
    interval = f"({percent(confidence)} interval {_range(low, high)}){distance}."
    if low > 0.5:
        return f"{subject} beats the initial policy on {wins} {interval}"
    if high < 0.5:
        return f"{subject} is worse than the initial policy and wins on only {wins} {interval}"
    return f"{subject} is not distinguishable from the initial policy, with wins on {wins} {interval}"


def _offline_headline(run: Run) -> str:
    if run.metrics.empty:
        return "The offline round is not done yet."
    row = run.metrics.iloc[-1]
    kept, heldout = value(row, "pairs/kept"), value(row, "eval_rewards/accuracies")
    training = value(row, "rewards/accuracies")
    start = f"One offline round{f' on {kept:,.0f} pairs' if kept else ''}"
    if heldout is not None:
        n = run.config["data"].get("heldout") or 0
        low, high, among, interval = 0.0, 1.0, "", ""
        if n:
            from scipy.stats import binomtest

            low, high = binomtest(round(heldout * n), n).proportion_ci(0.95, method="wilson")
            among, interval = f"{n:,} ", f" ({percent(0.95)} interval {_range(low, high)})"
        words = "which is not distinguishable from chance" if low <= 0.5 <= high else "compared with one half by chance"
        return (
            f"{start}: the implicit reward prefers the chosen completion in {percent(heldout)} "
            f"of {among}held-out pairs{interval}, {words}."
        )
    if training is not None:
        return (
            f"{start}: while training, the implicit reward preferred the chosen completion in {percent(training)} of "
            "the pairs. None were held out, so the accuracy on other pairs is unknown."
        )
    return f"{start} is done, but recorded no accuracies."


def _movement(initial: pd.Series, final: pd.Series, judge: str) -> str | None:
    before, after = value(initial, f"score/{judge}_judge"), value(final, f"score/{judge}_judge")
    return None if before is None or after is None else f"from {number(before)} to {number(after)}"


def _range(low: float, high: float) -> str:
    return f"{percent(low, unit=False)} to {percent(high)}"


def _word(n: int) -> str:
    return WORDS[n] if n < len(WORDS) else str(n)

"""What the held-out evaluation reports. Pure functions of scores, tokens and log-probabilities.

All intervals are percentile bootstrap intervals over prompts: prompts are what the evaluation drew at random, and
several completions of one prompt are not independent.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from iterdpo.stats import NOTHING, Estimate, bootstrap_mean

Scores = Sequence[float | None]
"""Scores of one prompt's completions; None if the judge abstained."""

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""The token ids of one completion."""

ENDS = ("", "_low", "_high")
BASELINES = ("initial", "previous", "best")
"""The policies compared with. The best round so far is mostly the previous one, and then has its figures."""
OF_THOUGHTS = ("length/mean_reasoning_tokens", "length/unfinished_thoughts")
"""Metrics of thinking models alone."""
WITH_INTERVAL = (
    "score/train_judge",
    "score/heldout_judge",
    *(f"win_rate/vs_{name}" for name in BASELINES),
    "kl/to_initial",
)
WITHOUT = ("length/mean_tokens", "length/truncated", *OF_THOUGHTS, "distinct/1", "distinct/2", "evaluation/unjudged")

HELD = 2**21
"""N-grams held at a time (8 bytes each, with their copies some 75 MB)."""

MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: multiplying by it permutes the 64-bit integers


@dataclass(frozen=True, slots=True)
class Thoughts:
    """A thinking model's reasoning: `Thoughts(tokens=51200, unfinished=[[False], [True]], of_baselines={"initial": …})`.

    `unfinished` says of each prompt's completions whether they are thoughts without an end; `of_baselines` the same for
    the policies compared with. `tokens` are those of all reasoning.
    """

    tokens: int
    unfinished: Sequence[Sequence[bool]]
    of_baselines: Mapping[str, Sequence[Sequence[bool]]]


class Bootstrap(TypedDict, total=False):
    """How intervals are drawn, if not as `bootstrap_mean` does: `{"confidence": 0.95, "samples": 10_000, "seed": 0}`."""

    confidence: float
    samples: int
    seed: int


def evaluation_metrics(
    token_ids: Callable[[], Iterable[TokenIds]],
    scores: Mapping[str, Iterable[Scores]],
    baselines: Mapping[str, Mapping[str, Iterable[Scores]]],
    duels: Mapping[str, Mapping[str, Iterable[Sequence[Scores]]]],
    logps: Mapping[str, Iterable[Sequence[float]]] | None,
    *,
    prompts: int,
    truncated: int,
    thoughts: Thoughts | None = None,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The metrics of docs/metrics.md that the held-out completions decide.

    Memory does not grow with the tokens: of each prompt a number is held, and token ids are streamed. Whatever is
    given as an Iterable is read more than once, so it must be a list or an object that starts over.

    Args:
        token_ids: called once for each reading; yields the token ids of every completion, of a thinking model's those of
            its answer.
        scores: by the judge's role, the scores of each prompt's completions.
        baselines: the same for the policies compared with, by the policy's name.
        duels: by role and name, those of a judge that compares: for each prompt, one (candidate score, baseline
            score) pair per completion.
        logps: `policy` and `initial`, of each prompt the log-probabilities summed over each completion; None if the
            policy is the initial one.
        prompts: how many prompts were completed.
        truncated: how many completions reached the limit of tokens.
        thoughts: of a thinking model, the lengths of its reasoning, and which completions are unfinished thoughts.
        bootstrap: how intervals are drawn.

    Win rates are by the held-out judge if there is one. An unfinished thought loses against every answer.
    """
    decider = "heldout_judge" if "heldout_judge" in {*scores, *duels} else "train_judge"
    metrics: dict[str, Any] = {"win_rate/judge": decider.removesuffix("_judge")}
    for role in ("train_judge", "heldout_judge"):
        value = mean_score(scores[role], **bootstrap) if role in scores else NOTHING
        metrics |= _interval_keys(f"score/{role}", value)
    for name in BASELINES:
        if name == "best" and name not in {*baselines, *duels.get(decider, {})}:
            metrics |= {f"win_rate/vs_best{end}": metrics[f"win_rate/vs_previous{end}"] for end in ENDS}
            continue
        value = NOTHING
        if name in duels.get(decider, {}):
            value = bootstrap_mean(duel_shares(duels[decider][name]), **bootstrap)
        elif name in baselines and decider in scores:
            ours, theirs = scores[decider], baselines[name][decider]
            if thoughts is not None:
                ours, theirs = outscored(ours, thoughts.unfinished), outscored(theirs, thoughts.of_baselines[name])
            value = win_rate(ours, theirs, **bootstrap)
        metrics |= _interval_keys(f"win_rate/vs_{name}", value)
    kl = Estimate(0.0, 0.0, 0.0) if logps is None else sequence_kl(logps["policy"], logps["initial"], **bootstrap)
    completions = tokens = 0
    for completions, ids in enumerate(token_ids(), 1):  # noqa: B007  # read below
        tokens += len(ids)
    if decider in scores:
        unjudged = sum(score is None for group in scores[decider] for score in group)
    else:
        found = (sum(None in duel for p in by_prompt for duel in p) for by_prompt in duels[decider].values())
        unjudged = max(found, default=0)
    answers, of_thoughts = completions, {}
    if thoughts is not None:
        unfinished = sum(map(sum, thoughts.unfinished))
        answers -= unfinished
        of_thoughts = {
            "length/mean_reasoning_tokens": thoughts.tokens / completions,
            "length/unfinished_thoughts": unfinished / completions,
        }
    return metrics | {
        **_interval_keys("kl/to_initial", kl),
        "length/mean_tokens": tokens / answers if answers else None,
        "length/truncated": truncated / answers if answers else None,
        **of_thoughts,
        "distinct/1": distinct_n(token_ids, 1),
        "distinct/2": distinct_n(token_ids, 2),
        "evaluation/prompts": prompts,
        "evaluation/completions": completions,
        "evaluation/unjudged": unjudged,
    }


def unmeasured(metric: str, *, heldout_judge: bool, thinking: bool) -> str | None:
    """Why a held-out evaluation never measures `metric`, with the remedy; None if it does."""
    known = [*(f"{name}{end}" for name in WITH_INTERVAL for end in ENDS), *WITHOUT]
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join((*WITH_INTERVAL, *WITHOUT))}"
        return f"no metric of the held-out evaluation; {hint}"
    if metric.startswith("score/heldout_judge") and not heldout_judge:
        return (
            "no held-out judge is configured, so it would never be measured, and no round promoted; set evaluation.judge, "
            "or choose another metric"
        )
    if metric in OF_THOUGHTS and not thinking:
        return "the policy is no thinking model, so it would never be measured, and no round promoted; choose another metric"
    return None


def outscored(scores: Iterable[Scores], unfinished: Iterable[Sequence[bool]]) -> Iterator[Scores]:
    """Each prompt's scores for a contest: of an unfinished thought it is lower than every other, judged or not."""
    for of_prompt, thoughts in zip(scores, unfinished, strict=True):
        yield [-math.inf if thought else score for score, thought in zip(of_prompt, thoughts, strict=True)]


def mean_score(groups: Iterable[Scores], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    """The mean over prompts of the mean score of a prompt's judged completions."""
    means = (float(np.mean(judged)) for scores in groups if (judged := [s for s in scores if s is not None]))
    return bootstrap_mean(means, **bootstrap)


def win_rate(candidate: Iterable[Scores], baseline: Iterable[Scores], **bootstrap: Unpack[Bootstrap]) -> Estimate:
    """The share of held-out prompts on which the candidate's completion beats the baseline's; a tie is half a win.

    Both yield the scores of the same prompts in the same order. With several completions, a prompt counts with its
    share over all combinations; prompts on which either side has no score are left out.
    """
    outcomes = (
        [0.5 if a == b else float(a > b) for a in ours if a is not None for b in theirs if b is not None]
        for ours, theirs in zip(candidate, baseline, strict=True)
    )
    return bootstrap_mean((float(np.mean(prompt)) for prompt in outcomes if prompt), **bootstrap)


def duel_shares(prompts: Iterable[Sequence[Scores]]) -> Iterator[float]:
    """Of each prompt, the share of its duels that the candidate won; a tie is half a win.

    A duel is the scores of (the candidate's completion, the baseline's), which a judge gave side by side. Duels with
    an abstention are left out, and prompts that have no other.
    """
    for duels in prompts:
        judged = [(a, b) for a, b in duels if a is not None and b is not None]
        if judged:
            yield sum(0.5 if a == b else float(a > b) for a, b in judged) / len(judged)


def sequence_kl(
    policy_logps: Iterable[Sequence[float]],
    initial_logps: Iterable[Sequence[float]],
    **bootstrap: Unpack[Bootstrap],
) -> Estimate:
    """KL(policy || initial) in nats a completion, estimated on the policy's own completions y ~ policy:

        KL = E_y[ log policy(y|x) - log initial(y|x) ]

    from log-probabilities summed over each completion's tokens (no padding), grouped by prompt. Unbiased at
    temperature 1; the estimate may be slightly negative if the policies are close.
    """
    prompts = zip(policy_logps, initial_logps, strict=True)
    means = (float(np.mean(np.subtract(ours, theirs))) for ours, theirs in prompts)
    return bootstrap_mean(means, **bootstrap)


def logp_gap(reported: Iterable[Sequence[float]], computed: Iterable[float]) -> float | None:
    """Mean over completions of |sum of the engine's token log-probabilities - the policy's own sum|, in nats a token.

    What is left if both are the same policy is rounding. None if there is no completion.
    """
    gaps = (abs(sum(tokens) - whole) / len(tokens) for tokens, whole in zip(reported, computed, strict=True))
    means = np.fromiter(gaps, float)
    return float(means.mean()) if len(means) else None


def distinct_n(token_ids: Callable[[], Iterable[TokenIds]], n: int, *, held: int = HELD) -> float | None:
    """Distinct n-grams over all n-grams of the completions' tokens (Li et al., arXiv:1510.03055, Section 5.2).

    1 if nothing repeats. It falls as text grows: compare equal amounts. None if no completion has n tokens.

    `token_ids` is called once for each pass over the completions. A pass counts the n-grams whose hashes lie in a
    range, which is halved as often as more than `held` distinct ones are found; the next pass has the next range. The
    hash is one to one, so that the count is exact. A ValueError if n token ids of this size do not fit into 64 bits:
    of three tokens each must be below 2^21.
    """
    total = sum(max(0, len(ids) - n + 1) for ids in token_ids())
    distinct, first, width = 0, 0, 2**64
    while total and first < 2**64:
        last = min(first + width, 2**64) - 1
        found = np.empty(0, np.uint64)
        for hashes in _ngram_hashes(token_ids(), n, block=held // 2):
            found = _distinct(np.concatenate([found, hashes[(first <= hashes) & (hashes <= last)]]))
            while len(found) > held:
                width //= 2
                last = first + width - 1
                found = found[found <= last]
        distinct += len(found)
        first = last + 1
    return distinct / total if total else None


def _ngram_hashes(token_ids: Iterable[TokenIds], n: int, *, block: int) -> Iterator[NDArray[np.uint64]]:
    """A hash of each n-gram, equal for equal ones alone, computed for about `block` tokens at a time."""
    bits = 64 // n
    waiting: list[NDArray[np.uint64]] = []
    tokens = 0

    def hashes() -> NDArray[np.uint64]:
        flat, ends = np.concatenate(waiting), np.cumsum([len(ids) for ids in waiting])
        if bits < 64 and int(flat.max(initial=0)) >= 2**bits:
            raise ValueError(f"n-grams of {n} tokens are counted for token ids below {2**bits:,}, not {flat.max():,}")
        # n-grams end with their completion
        starts = np.arange(len(flat)) + n <= np.repeat(ends, np.diff(ends, prepend=0))
        packed = np.zeros(len(flat), np.uint64)
        for i in range(n):
            packed[: len(flat) - i] |= flat[i:] << np.uint64(bits * i)
        return packed[starts] * MIX

    for ids in token_ids:
        waiting.append(np.asarray(ids, np.uint64))
        tokens += len(ids)
        if tokens >= block:
            yield hashes()
            waiting, tokens = [], 0
    if waiting:
        yield hashes()


def _distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The sorted distinct `values`, which are overwritten. np.unique builds a hash table, which takes far longer."""
    values.sort()
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def _interval_keys(name: str, estimate: Estimate) -> dict[str, float | None]:
    return dict(zip((f"{name}{end}" for end in ENDS), estimate[:3], strict=True))

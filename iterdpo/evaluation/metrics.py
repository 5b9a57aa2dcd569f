"""The metrics of docs/metrics.md that the held-out completions decide."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iterdpo.evaluation.scores import Scores, best_of, mean_score, sequence_kl
from iterdpo.evaluation.texts import TokenIds, distinct_n, loops, refuses, self_bleu
from iterdpo.evaluation.wins import (
    Outcomes,
    agreement,
    combinations,
    combined_shares,
    duels,
    gap,
    length_controlled,
    mean_share,
    outscored,
    shares,
    sign_test,
    tied,
)
from iterdpo.stats import NOTHING, Bootstrap, Estimate

ROLES = ("train_judge", "heldout_judge")
ENDS = ("", "_low", "_high")
REFERENCES = ("reference", "model")
"""What a run may compare every round with besides other rounds: completions in the prompt file, and another model."""
BASELINES = ("initial", "previous", "best", *REFERENCES)
"""What is compared with. The best round so far is mostly the previous one, and then has its figures."""
OF_THOUGHTS = ("length/mean_reasoning_tokens", "length/unfinished_thoughts")
"""Metrics of thinking models alone."""
SELF_BLEU = "text/self_bleu"
"""Measured if it is asked for."""
OF_TWO_JUDGES = ("judges/agreement", "judges/gap")
WITH_INTERVAL = (
    *(f"score/{role}" for role in ROLES),
    *(f"{kind}/vs_{name}" for kind in ("win_rate", "length_controlled_win_rate") for name in BASELINES),
    *OF_TWO_JUDGES,
    "kl/to_initial",
)
OVER_TEMPERATURES = (
    *(f"score/{role}" for role in ROLES),
    *(f"win_rate/vs_{name}" for name in ("initial", *REFERENCES)),
)
"""What is also measured at further temperatures, against the same completions."""
WITHOUT = (
    *(f"win_rate/vs_{name}_{test}" for name in BASELINES for test in ("p", "ties")),
    "length/mean_tokens",
    "length/truncated",
    *OF_THOUGHTS,
    "distinct/1",
    "distinct/2",
    "text/loops",
    "text/refusals",
    "text/entropy",
    SELF_BLEU,
    "evaluation/unjudged",
)


@dataclass(frozen=True, slots=True)
class Thoughts:
    """A thinking model's reasoning: `Thoughts(tokens=51200, unfinished=[[False], [True]], of_baselines={"initial": …})`.

    `unfinished` says of each prompt's completions whether they are thoughts without an end; `of_baselines` the same for
    the policies compared with. `tokens` are those of all reasoning.
    """

    tokens: int
    unfinished: Sequence[Sequence[bool]]
    of_baselines: Mapping[str, Sequence[Sequence[bool]]]


def evaluation_metrics(
    token_ids: Callable[[], Iterable[TokenIds]],
    scores: Mapping[str, Iterable[Scores]],
    baselines: Mapping[str, Mapping[str, Iterable[Scores]]],
    compared: Mapping[str, Mapping[str, Iterable[Sequence[Scores]]]],
    logps: Mapping[str, Iterable[Sequence[float]]] | None,
    *,
    prompts: int,
    truncated: int,
    texts: Iterable[str] = (),
    lengths: Mapping[str, Sequence[float]] | None = None,
    entropy: float | None = None,
    thoughts: Thoughts | None = None,
    with_self_bleu: bool = False,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """All metrics of an evaluation.

    Without self-BLEU, memory does not grow with the tokens: of each prompt a number is held, and token ids and texts are
    streamed. What is an Iterable, but for `texts`, is read more than once, so it must be a list or an object that starts
    over.

    Args:
        token_ids: called once for each reading; yields the token ids of every completion, of a thinking model's those of
            its answer.
        scores: by the judge's role, the scores of each prompt's completions.
        baselines: the same for the policies compared with, by the policy's name.
        compared: by role and name, those of a judge that compares: for each prompt, one (candidate score, baseline
            score) pair per completion.
        logps: `policy` and `initial`, of each prompt the log-probabilities summed over each completion; None if the
            policy is the initial one.
        prompts: how many prompts were completed.
        truncated: how many completions reached the limit of tokens.
        texts: every completion, of a thinking model every answer.
        lengths: of `policy` and of the policies compared with, the mean tokens of each prompt's completions.
        entropy: in nats per token.
        thoughts: of a thinking model, the lengths of its reasoning, and which completions are unfinished thoughts.
        with_self_bleu: measure self-BLEU too, which holds all tokens in memory.
        bootstrap: how intervals are drawn.

    Win rates are by the held-out judge if there is one. An unfinished thought loses against every answer.
    """
    decider = ROLES["heldout_judge" in {*scores, *compared}]
    metrics: dict[str, Any] = {"win_rate/judge": decider.removesuffix("_judge")}
    for role in ROLES:
        value = mean_score(scores[role], **bootstrap) if role in scores else NOTHING
        metrics |= _interval_keys(f"score/{role}", value)

    def sides(role: str, name: str) -> tuple[Iterable[Scores], Iterable[Scores]] | None:
        """The scores of each prompt's completions, and of a baseline's, for a contest."""
        if name not in baselines or role not in scores or role not in baselines[name]:
            return None
        ours, theirs = scores[role], baselines[name][role]
        if thoughts is not None:
            ours, theirs = outscored(ours, thoughts.unfinished), outscored(theirs, thoughts.of_baselines[name])
        return ours, theirs

    def outcomes(role: str, name: str) -> Iterable[Outcomes] | None:
        """How each prompt's completions did against those of a baseline."""
        if name in compared.get(role, {}):
            return duels(compared[role][name])
        return None if (both := sides(role, name)) is None else combinations(*both)

    def of_prompts(role: str, name: str) -> list[float | None] | None:
        """The share of each prompt that was won against a baseline."""
        if name in compared.get(role, {}):
            return list(shares(duels(compared[role][name])))
        return None if (both := sides(role, name)) is None else list(combined_shares(*both))

    for name in BASELINES:
        found = of_prompts(decider, name)
        if name == "best" and found is None:
            twin = {key: value for key, value in metrics.items() if "/vs_previous" in key}
            metrics |= {key.replace("/vs_previous", "/vs_best"): value for key, value in twin.items()}
            continue
        if name in REFERENCES and found is None:
            continue
        won = found or []
        metrics |= _interval_keys(f"win_rate/vs_{name}", mean_share(won, **bootstrap))
        metrics |= {f"win_rate/vs_{name}_p": sign_test(won), f"win_rate/vs_{name}_ties": tied(won)}
        controlled = NOTHING
        if won and lengths is not None:
            longer = [ours - theirs for ours, theirs in zip(lengths["policy"], lengths[name], strict=True)]
            controlled = length_controlled(won, longer, confidence=bootstrap.get("confidence", 0.95))
        metrics |= _interval_keys(f"length_controlled_win_rate/vs_{name}", controlled)
    agreed = apart = NOTHING
    one, other = (outcomes(role, "initial") for role in ROLES)
    if one is not None and other is not None:
        agreed = agreement(one, other, **bootstrap)
        apart = gap(*(of_prompts(role, "initial") or () for role in ROLES), **bootstrap)
    metrics |= _interval_keys("judges/agreement", agreed) | _interval_keys("judges/gap", apart)
    kl = Estimate(0.0, 0.0, 0.0) if logps is None else sequence_kl(logps["policy"], logps["initial"], **bootstrap)
    completions = tokens = looping = 0
    for completions, ids in enumerate(token_ids(), 1):  # noqa: B007  # read below
        tokens += len(ids)
        looping += loops(ids)
    refusals = [refuses(text) for text in texts]
    if decider in scores:
        unjudged = sum(score is None for group in scores[decider] for score in group)
    else:
        missing = (sum(None in duel for p in by_prompt for duel in p) for by_prompt in compared[decider].values())
        unjudged = max(missing, default=0)
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
        **_best_of(scores, completions // prompts),
        "length/mean_tokens": tokens / answers if answers else None,
        "length/truncated": truncated / answers if answers else None,
        **of_thoughts,
        "distinct/1": distinct_n(token_ids, 1),
        "distinct/2": distinct_n(token_ids, 2),
        "text/loops": looping / answers if answers else None,
        "text/refusals": sum(refusals) / answers if refusals and answers else None,
        "text/entropy": entropy,
        **({SELF_BLEU: self_bleu(token_ids())} if with_self_bleu else {}),
        "evaluation/confidence": bootstrap.get("confidence"),
        "evaluation/prompts": prompts,
        "evaluation/completions": completions,
        "evaluation/unjudged": unjudged,
    }


def at_temperature(temperature: float) -> dict[str, str]:
    """The metrics at a further temperature, each with the metric that it is at the evaluation's own."""
    names = [f"{name}{end}" for name in OVER_TEMPERATURES for end in ENDS]
    return {f"temperature/{temperature:g}/{name}": name for name in names}


def best_of_names(completions: int, roles: Iterable[str]) -> list[tuple[str, int, str]]:
    """The metrics of the best of N of so many completions a prompt, as (metric, N, role), for N = 2, 4, 8, …"""
    sizes = [2**power for power in range(1, completions.bit_length()) if 2**power <= completions]
    return [(f"best_of/{n}/{role}", n, role) for role in roles for n in sizes]


def _best_of(scores: Mapping[str, Iterable[Scores]], completions: int) -> dict[str, float | None]:
    """The best of N as the training judge chooses it, scored by each judge."""
    if "train_judge" not in scores:
        return {}
    names = best_of_names(completions, [role for role in ROLES if role in scores])
    return {metric: best_of(n, scores["train_judge"], scores[role]) for metric, n, role in names}


def unmeasured(
    metric: str,
    *,
    heldout_judge: bool,
    thinking: bool,
    completions: int,
    references: bool = False,
    other_model: bool = False,
    temperatures: Iterable[float] = (),
    with_self_bleu: bool = False,
) -> str | None:
    """Why a held-out evaluation of so many completions a prompt never measures `metric`, with the remedy; None if it does."""
    best = [name for name, *_ in best_of_names(completions, ROLES)]
    further = [key for temperature in temperatures for key in at_temperature(temperature)]
    known = [*(f"{name}{end}" for name in WITH_INTERVAL for end in ENDS), *WITHOUT, *best, *further]
    if metric not in known:
        if metric.startswith("best_of/"):
            return f"evaluation.n = {completions}, which gives {', '.join(best) or 'no best of N'}; raise it"
        if metric.startswith("temperature/"):
            return f"evaluation.temperatures gives {', '.join(further) or 'no such metric'}; add the temperature to it"
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join((*WITH_INTERVAL, *WITHOUT))}"
        return f"no metric of the held-out evaluation; {hint}"
    never = "so it would never be measured, and no round promoted"
    if (metric.startswith(OF_TWO_JUDGES) or "heldout_judge" in metric) and not heldout_judge:
        return f"no held-out judge is configured, {never}; set evaluation.judge, or choose another metric"
    if "/vs_reference" in metric and not references:
        return f"there are no reference completions, {never}; set evaluation.reference_column, or choose another metric"
    if "/vs_model" in metric and not other_model:
        return f"there is no other model, {never}; set evaluation.against, or choose another metric"
    if metric == SELF_BLEU and not with_self_bleu:
        return f"it is not measured, {never}; set evaluation.self_bleu, or choose another metric"
    if metric in OF_THOUGHTS and not thinking:
        return f"the policy is no thinking model, {never}; choose another metric"
    return None


def _interval_keys(name: str, estimate: Estimate) -> dict[str, float | None]:
    return dict(zip((f"{name}{end}" for end in ENDS), estimate[:3], strict=True))

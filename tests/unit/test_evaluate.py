"""Held-out metrics worked out by hand, intervals by simulation, KL against its closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from iterdpo.evaluate import (
    ENDS,
    WITH_INTERVAL,
    WITHOUT,
    Bootstrap,
    Scores,
    Thoughts,
    distinct_n,
    duel_shares,
    evaluation_metrics,
    logp_gap,
    mean_score,
    sequence_kl,
    unmeasured,
    win_rate,
)
from iterdpo.stats import NOTHING, Estimate


def test_a_win_is_1_a_tie_is_half_and_a_loss_is_0() -> None:
    assert win_rate([[0.9], [0.2], [0.5], [0.5]], [[0.1], [0.3], [0.5], [0.4]]).value == (1 + 0 + 0.5 + 1) / 4


def test_a_prompt_counts_once_with_its_share_over_all_combinations() -> None:
    # first prompt: 3 against {1, 3} is 1 + 0.5, 2 against {1, 3} is 1 + 0: 2.5 of 4. Second: a loss.
    assert win_rate([[3.0, 2.0], [0.0]], [[1.0, 3.0], [1.0]]).value == (2.5 / 4 + 0) / 2


def test_abstentions_are_left_out_and_are_no_losses() -> None:
    candidate: list[Scores] = [[1.0, None], [None], [2.0], [None, None]]
    baseline: list[Scores] = [[0.0], [5.0], [None], [None]]
    assert win_rate(candidate, baseline) == Estimate(1.0, 1.0, 1.0, 1)


def test_where_nothing_was_judged_there_is_no_win_rate() -> None:
    assert win_rate([[None]], [[1.0]]) == NOTHING
    assert win_rate([], []) == NOTHING
    assert mean_score([[None, None], []]) == NOTHING


def test_the_two_sides_of_a_comparison_add_up_to_1() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = (generator.integers(0, 4, size=(30, 3)).astype(float).tolist() for _ in range(2))
    one, other = win_rate(ours, theirs).value, win_rate(theirs, ours).value
    assert one is not None
    assert other is not None
    assert one + other == pytest.approx(1)
    assert win_rate(ours, ours).value == pytest.approx(0.5)


def test_prompts_without_a_partner_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        win_rate([[1.0], [2.0]], [[1.0]])


def test_the_mean_score_is_over_prompts_and_not_over_completions() -> None:
    # means 2, 4 and none; over completions it would be (1 + 3 + 4) / 3
    assert mean_score([[1.0, 3.0], [4.0, None], [None]]).value == 3.0


def test_kl_is_the_mean_over_prompts_of_the_difference_of_log_probabilities() -> None:
    # first prompt: (-1 + 2.5 - 2 + 2) / 2 = 0.75; second: -3 + 2.5 = -0.5
    assert sequence_kl([[-1.0, -2.0], [-3.0]], [[-2.5, -2.0], [-2.5]]).value == 0.125
    assert sequence_kl([[-4.0, -5.0]], [[-4.0, -5.0]]) == Estimate(0.0, 0.0, 0.0, 1)


def test_kl_estimated_from_samples_agrees_with_the_closed_form() -> None:
    # completions of 3 tokens, each drawn alone: KL = 3 * sum_v p log(p / q)
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    q = np.array([0.1, 0.3, 0.2, 0.2, 0.2])
    ratio = np.log(p / q)
    exact = 3 * float(p @ ratio)
    prompts, completions = 4000, 2
    drawn = np.random.default_rng(4).choice(len(p), p=p, size=(prompts, completions, 3))
    interval = sequence_kl(np.log(p)[drawn].sum(-1).tolist(), np.log(q)[drawn].sum(-1).tolist(), samples=1000)
    error = math.sqrt(3 * float(p @ (ratio - p @ ratio) ** 2) / (prompts * completions))  # one standard error
    assert interval.value == pytest.approx(exact, abs=4 * error)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < exact < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([[1, 2, 1, 2], [1, 2]], 1, 2 / 6),
        ([[1, 2, 1, 2], [1, 2]], 2, 2 / 4),  # 12 21 12 | 12: no n-gram spans two completions
        ([[1, 2, 1, 2], [1, 2]], 3, 1.0),
        ([[1, 2, 1, 2], [1, 2]], 5, None),
        ([[7, 7, 7, 7]], 2, 1 / 3),
        ([[]], 1, None),
        ([], 1, None),
    ],
)
def test_distinct_n_is_distinct_n_grams_over_all(token_ids: list[list[int]], n: int, expected: float | None) -> None:
    assert distinct_n(lambda: token_ids, n) == expected


@pytest.mark.parametrize("held", [20, 100, 2_000])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_exact_however_few_ngrams_are_held_at_a_time(n: int, held: int) -> None:
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, 12, size=length) for length in generator.integers(0, 30, size=40)]
    grams = [tuple(text[i : i + n].tolist()) for text in texts for i in range(len(text) - n + 1)]
    passes = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from texts

    assert distinct_n(stream, n, held=held) == len(set(grams)) / len(grams)
    if len(set(grams)) > held:
        assert passes > 2  # one for the total, and at least two for the n-grams


def test_tokens_too_large_to_be_counted_exactly_are_refused() -> None:
    assert distinct_n(lambda: [[2**21 - 1, 0, 1]], 3) == 1.0
    with pytest.raises(ValueError, match="below 2,097,152"):
        distinct_n(lambda: [[2**21, 0, 1]], 3)


def test_duels_without_a_judged_one_leave_the_prompt_out() -> None:
    assert list(duel_shares([[[1.0, 0.0], [0.5, 0.5]], [[None, 1.0]], [[0.0, 1.0], [None, 0.0]]])) == [0.75, 0.0]


def test_the_gap_is_the_mean_over_completions_of_nats_a_token() -> None:
    # |-3 + 4| / 2 = 0.5 and |-1 + 1| / 1 = 0
    assert logp_gap([[-1.0, -2.0], [-1.0]], [-4.0, -1.0]) == 0.25
    assert logp_gap([], []) is None


def test_an_evaluation_has_the_figures_of_its_streams() -> None:
    bootstrap = Bootstrap(confidence=0.95, samples=100, seed=0)
    texts = [[1, 2], [1, 2, 3, 4], [1], [1]]  # two prompts, two completions each
    found = evaluation_metrics(
        lambda: iter(texts),
        {"train_judge": [[1.0, None], [0.0, 0.0]], "heldout_judge": [[0.5, 0.5], [0.0, None]]},
        {"initial": {"train_judge": [[2.0], [2.0]], "heldout_judge": [[0.0], [1.0]]}},
        {},
        {"policy": [[-1.0, -2.0], [-3.0, -1.0]], "initial": [[-2.0, -3.0], [-3.0, -1.0]]},
        prompts=2,
        truncated=1,
        bootstrap=bootstrap,
    )
    assert {k: v for k, v in found.items() if not k.endswith(("_low", "_high"))} == {
        "win_rate/judge": "heldout",
        "score/train_judge": 0.5,
        "score/heldout_judge": 0.25,
        "win_rate/vs_initial": 0.5,  # both completions of the first prompt win, the judged one of the second loses
        "win_rate/vs_previous": None,
        "win_rate/vs_best": None,
        "kl/to_initial": 0.5,  # (1 + 1) / 2 and 0
        "length/mean_tokens": 2.0,
        "length/truncated": 0.25,
        "distinct/1": 4 / 8,
        "distinct/2": 3 / 4,  # 12 | 12 23 34
        "evaluation/prompts": 2,
        "evaluation/completions": 4,
        "evaluation/unjudged": 1,
    }


def test_a_judge_that_compares_decides_by_its_duels_and_has_no_score() -> None:
    found = evaluation_metrics(
        lambda: [[1, 2], [3, 4]],
        {},
        {"initial": {}, "previous": {}},
        {"train_judge": {"initial": [[[1.0, 0.0]], [[None, None]]], "previous": [[[0.0, 1.0]], [[0.5, 0.5]]]}},
        None,
        prompts=2,
        truncated=0,
        bootstrap=Bootstrap(confidence=0.95, samples=100, seed=0),
    )
    assert (found["win_rate/vs_initial"], found["win_rate/vs_previous"]) == (1.0, 0.25)
    assert (found["score/train_judge"], found["kl/to_initial"], found["evaluation/unjudged"]) == (None, 0.0, 1)


def test_the_best_round_has_figures_of_its_own_only_if_it_is_not_the_previous_one() -> None:
    def found(**baselines: float) -> dict[str, float | None]:
        scores = {name: {"train_judge": [[score], [1.0]]} for name, score in baselines.items()}
        metrics = evaluation_metrics(
            lambda: [[1], [2]], {"train_judge": [[1.0], [2.0]]}, scores, {}, None, prompts=2, truncated=0, bootstrap={}
        )
        return {name: metrics[f"win_rate/vs_{name}"] for name in ("initial", "previous", "best")}

    assert found(initial=0.0, previous=1.0) == {"initial": 1.0, "previous": 0.75, "best": 0.75}
    assert found(initial=0.0, previous=1.0, best=2.0) == {"initial": 1.0, "previous": 0.75, "best": 0.5}
    assert found() == {"initial": None, "previous": None, "best": None}


def test_every_metric_with_an_interval_or_a_rule_is_one_that_an_evaluation_has() -> None:
    found = evaluation_metrics(
        lambda: [[1]],
        {"train_judge": [[1.0]], "heldout_judge": [[1.0]]},
        {},
        {},
        None,
        prompts=1,
        truncated=0,
        thoughts=Thoughts(0, [[False]], {}),
        bootstrap={},
    )
    known = {f"{name}{end}" for name in WITH_INTERVAL for end in ENDS} | {*WITHOUT}
    assert known == found.keys() - {"win_rate/judge", "evaluation/prompts", "evaluation/completions"}
    assert all(unmeasured(name, heldout_judge=True, thinking=True) is None for name in known)


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        ("kl/to_inital", "did you mean 'kl/to_initial'?"),
        ("evaluation/prompts", "no metric of the held-out evaluation"),
        ("pairs/kept", "no metric of the held-out evaluation; choose one of"),
        ("score/heldout_judge_high", "set evaluation.judge"),
        ("length/mean_reasoning_tokens", "no thinking model"),
    ],
)
def test_a_metric_that_will_not_be_measured_is_known_with_the_remedy(metric: str, why: str) -> None:
    assert why in (unmeasured(metric, heldout_judge=False, thinking=False) or "")

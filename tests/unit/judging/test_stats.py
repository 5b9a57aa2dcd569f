"""What a stage's judgments tell about their judge."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from iterdpo.judging import stats
from iterdpo.judging.stats import AbstentionCounts, JudgeMetrics
from iterdpo.testing import make_group
from iterdpo.types import Comparison, Judgment


def test_flips_and_first_position_are_counted_over_single_comparisons() -> None:
    groups = [make_group("?", ["a", "bb"]), make_group("!", ["a", "bb"])]
    judgments = [
        Judgment(groups[0].prompt.id, [0.5, 0.5], [None, None], [Comparison(0, 1, "first"), Comparison(1, 0, "first")]),
        Judgment(
            groups[1].prompt.id, [1.0, 0.0], [None, None], [Comparison(0, 1, "first"), Comparison(1, 0, "second")]
        ),
    ]
    metrics = JudgeMetrics().add(groups, judgments).result()
    assert metrics["flip_rate"] == 0.5  # the first prompt's pair of two
    assert metrics["first_position"] == 0.75  # first, first, first, second
    assert metrics["abstained"] == 0.0


@pytest.mark.parametrize(
    ("orders", "flipped"),
    [
        (("first", "second"), 0.0),  # the same completion won both times
        (("first", "first"), 1.0),
        (("tie", "tie"), 0.0),
        (("first", "tie"), 1.0),
        (("first", None), None),
    ],
)
def test_a_verdict_flips_where_the_other_order_says_another_thing(
    orders: tuple[Any, Any], flipped: float | None
) -> None:
    there, back = (
        Comparison(*pair, w, None if w else "late") for pair, w in zip(((0, 1), (1, 0)), orders, strict=True)
    )
    group = make_group("?", ["a", "bb"])
    metrics = JudgeMetrics().add([group], [Judgment(group.prompt.id, [0.5, 0.5], [None, None], [there, back])]).result()
    assert metrics["flip_rate"] == flipped
    decided = [w for w in orders if w in ("first", "second")]
    assert metrics["first_position"] == (decided.count("first") / len(decided) if decided else None)


def test_only_scored_completions_of_different_score_and_length_tell_whether_the_longer_wins() -> None:
    # "bb" beats "a"; "a" and "c" are alike in length, "bb" and "ddd" in score; the one with most tokens has no score.
    group = make_group("?", ["a", "bb", "c", "ddd", "eeeeee"])
    judgment = Judgment(group.prompt.id, [1.0, 2.0, 3.0, 2.0, None], [None] * 4 + ["late"])
    # a < bb, a < ddd: the longer wins. c > bb, c > ddd: the shorter.
    assert JudgeMetrics().add([group], [judgment]).result()["longer_wins"] == 0.5
    # Lengths 1, 2, 1, 3 and scores 1, 2, 3, 2 less their means 1.75 and 2: their products sum to 0.75+0+-0.75+0 = 0.
    assert JudgeMetrics().add([group], [judgment]).result()["length_correlation"] == pytest.approx(0.0, abs=1e-12)


def test_scores_that_are_all_alike_correlate_with_nothing() -> None:
    group = make_group("?", ["a", "bb"])
    assert (
        JudgeMetrics()
        .add([group], [Judgment(group.prompt.id, [1.0, 1.0], [None, None])])
        .result()["length_correlation"]
        is None
    )


def test_the_judge_that_rewards_length_is_seen() -> None:
    groups = [make_group("?", ["a", "bb", "cccc"]), make_group("!", ["aaa", "b", "cc"])]
    judgments = [Judgment(g.prompt.id, [float(len(c.text)) for c in g.completions], [None] * 3) for g in groups]
    metrics = JudgeMetrics().add(groups, judgments).result()
    assert metrics["longer_wins"] == 1.0
    assert metrics["length_correlation"] == pytest.approx(1.0)
    backwards = [Judgment(j.prompt_id, [-s for s in j.scores if s is not None], [None] * 3) for j in judgments]
    assert JudgeMetrics().add(groups, backwards).result()["length_correlation"] == pytest.approx(-1.0)


def test_length_correlation_is_within_prompts_so_long_answers_to_hard_questions_do_not_count() -> None:
    # Between the prompts length and score rise together; within each the shorter is better.
    groups = [make_group("?", ["a", "bb"]), make_group("!", ["aaaaaaaa", "bbbbbbbbb"])]
    judgments = [
        Judgment(groups[0].prompt.id, [1.0, 0.0], [None, None]),
        Judgment(groups[1].prompt.id, [9.0, 8.0], [None, None]),
    ]
    assert JudgeMetrics().add(groups, judgments).result()["length_correlation"] == pytest.approx(-1.0)


def test_what_cannot_be_told_is_none() -> None:
    group = make_group("?", ["a", "b"])
    metrics = JudgeMetrics().add([group], [Judgment(group.prompt.id, [None, None], ["no key", "no key"])]).result()
    assert metrics == {
        "abstained": 1.0,
        "flip_rate": None,
        "first_position": None,
        "longer_wins": None,
        "length_correlation": None,
        "intransitive": None,
    }


def test_abstentions_are_counted_by_reason_the_commonest_first() -> None:
    judgments = [
        Judgment("q", [None], ["no key"]),
        Judgment("p", [None, None, None, 1.0], ["late", "late", "odd", None]),
    ]
    counts = AbstentionCounts().add(judgments).result()
    assert list(counts.pop("abstentions").items()) == [("late", 2), ("no key", 1), ("odd", 1)]
    assert counts == {"completions": 5, "unjudged": 4}


def test_abstentions_by_design_are_left_out() -> None:
    judgments = [Judgment("q", [None, None, 1.0], ["by lot", "late", None])]
    counts = AbstentionCounts(leave_out=["by lot"]).add(judgments).result()
    assert counts == {"completions": 3, "unjudged": 1, "abstentions": {"late": 1}}


def test_reasons_beyond_the_limit_are_counted_without_being_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MOST_REASONS", 2)
    counts = AbstentionCounts().add([Judgment("q", [None] * 4, ["a", "b", "c", "b"])]).result()
    assert counts == {"completions": 4, "unjudged": 4, "abstentions": {"b": 2, "a": 1}}


@pytest.mark.parametrize("block", [1 << 17, 50])
def test_a_stage_counted_shard_by_shard_has_the_figures_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(stats, "BLOCK", block)
    rng = random.Random(0)
    groups = [make_group(str(n), ["x" * rng.randint(1, 40) for _ in range(4)]) for n in range(100)]
    judgments = [
        Judgment(
            g.prompt.id,
            [rng.random() + 0.01 * len(c.text) for c in g.completions],
            [None] * 4,
            [Comparison(i, j, rng.choice(("first", "second", "tie"))) for i, j in itertools.permutations(range(4), 2)],
        )
        for g in groups
    ]
    by_shard = JudgeMetrics()
    for start in range(0, 100, 7):
        by_shard.add(groups[start : start + 7], judgments[start : start + 7])
    centred = [
        np.array([[s, len(c.text)] for s, c in zip(j.scores, g.completions, strict=True)], dtype=float)
        for g, j in zip(groups, judgments, strict=True)
    ]
    scores, lengths = np.concatenate([table - table.mean(axis=0) for table in centred]).T
    found = by_shard.result()
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], rel=1e-12)
    if block > 400:  # completions
        assert found == JudgeMetrics().add(groups, judgments).result()

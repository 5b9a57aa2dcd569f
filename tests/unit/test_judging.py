"""What a stage's judgments tell about their judge."""

from __future__ import annotations

import pytest

from iterdpo.judging import abstention_counts, judge_metrics
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
    metrics = judge_metrics(groups, judgments)
    assert metrics["flip_rate"] == 0.5  # the first prompt's pair of two
    assert metrics["first_position"] == 0.75  # first, first, first, second
    assert metrics["abstained"] == 0.0


def test_the_judge_that_rewards_length_is_seen() -> None:
    groups = [make_group("?", ["a", "bb", "cccc"]), make_group("!", ["aaa", "b", "cc"])]
    judgments = [Judgment(g.prompt.id, [float(len(c.text)) for c in g.completions], [None] * 3) for g in groups]
    metrics = judge_metrics(groups, judgments)
    assert metrics["longer_wins"] == 1.0
    assert metrics["length_correlation"] == pytest.approx(1.0)
    backwards = [Judgment(j.prompt_id, [-s for s in j.scores if s is not None], [None] * 3) for j in judgments]
    assert judge_metrics(groups, backwards)["length_correlation"] == pytest.approx(-1.0)


def test_length_correlation_is_within_prompts_so_that_long_answers_to_hard_questions_do_not_count() -> None:
    # Between the prompts length and score rise together; within each the shorter is better.
    groups = [make_group("?", ["a", "bb"]), make_group("!", ["aaaaaaaa", "bbbbbbbbb"])]
    judgments = [
        Judgment(groups[0].prompt.id, [1.0, 0.0], [None, None]),
        Judgment(groups[1].prompt.id, [9.0, 8.0], [None, None]),
    ]
    assert judge_metrics(groups, judgments)["length_correlation"] == pytest.approx(-1.0)


def test_what_cannot_be_told_is_none() -> None:
    group = make_group("?", ["a", "b"])
    metrics = judge_metrics([group], [Judgment(group.prompt.id, [None, None], ["no key", "no key"])])
    assert metrics == {
        "abstained": 1.0,
        "flip_rate": None,
        "first_position": None,
        "longer_wins": None,
        "length_correlation": None,
        "intransitive": None,
    }


def test_abstentions_are_counted_by_reason_the_commonest_first() -> None:
    judgments = [Judgment("p", [None, None, 1.0], ["late", "late", None]), Judgment("q", [None], ["no key"])]
    assert abstention_counts(judgments) == {
        "completions": 4,
        "unjudged": 3,
        "abstentions": {"late": 2, "no key": 1},
    }

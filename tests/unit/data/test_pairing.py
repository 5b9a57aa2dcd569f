"""Groups and judgments to pairs: what is paired, what is left out, and that the account adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterdpo.data.pairing import PairCounts, Strategy, build_pairs
from iterdpo.types import Completion, CompletionGroup, Judgment, PreferencePair, Prompt

Judged = tuple[CompletionGroup, Judgment]
STRATEGIES: tuple[Strategy, ...] = ("best_worst", "best_random", "best_mean_2sd", "all_pairs")


def judged(texts: Sequence[str], scores: Sequence[float | None], *, cut: Sequence[int] = (), id: str = "p-0") -> Judged:
    """A group of completions with these texts and scores; those at the indices `cut` are truncated."""
    completions = [
        Completion(text, [10 + k, 20 + k], [-1.0, -2.0], "length" if k in cut else "stop")
        for k, text in enumerate(texts)
    ]
    reasons = [None if score is not None else "timed out" for score in scores]
    return CompletionGroup(Prompt(id, "?"), [1, 2], completions), Judgment(id, list(scores), reasons)


def build(*groups: Judged, **options: Any) -> tuple[list[PreferencePair], PairCounts]:
    return build_pairs([g for g, _ in groups], [j for _, j in groups], **options)


def texts(pairs: Sequence[PreferencePair]) -> list[str]:
    return [f"{pair.chosen.text}>{pair.rejected.text}" for pair in pairs]


def test_best_worst_takes_the_highest_score_against_the_lowest() -> None:
    pairs, counts = build(judged("abcd", [0.25, 0.75, -1.0, 0.5]))
    assert texts(pairs) == ["b>c"]
    assert (pairs[0].chosen_score, pairs[0].rejected_score) == (0.75, -1.0)
    assert counts == PairCounts(groups=1, groups_paired=1, kept=1)


def test_a_pair_carries_the_tokens_and_the_prompt_that_were_sampled() -> None:
    (pair,), _ = build(judged("ab", [1.0, 0.0]))
    assert (pair.prompt, pair.prompt_ids) == (Prompt("p-0", "?"), [1, 2])
    assert (pair.chosen.token_ids, pair.rejected.token_ids) == ([10, 20], [11, 21])


def test_all_pairs_takes_every_two_with_different_scores_largest_margins_first() -> None:
    pairs, counts = build(judged("abcd", [3.0, 0.0, 2.0, 2.0]), strategy="all_pairs")
    # margins 3, 2, 2, 1, 1; c and d tie with one another
    assert texts(pairs) == ["a>b", "c>b", "d>b", "a>c", "a>d"]
    assert counts == PairCounts(groups=1, groups_paired=1, kept=5)


@pytest.mark.parametrize(("most", "expected"), [(1, ["a>b"]), (2, ["a>b", "c>b"]), (None, ["a>b", "c>b", "a>c"])])
def test_max_pairs_per_prompt_keeps_the_largest_margins_of_each_prompt(most: int | None, expected: list[str]) -> None:
    one, two = judged("abc", [3.0, 0.0, 2.0]), judged("abc", [3.0, 0.0, 2.0], id="p-1")
    pairs, counts = build(one, two, strategy="all_pairs", max_pairs_per_prompt=most)
    assert texts(pairs) == expected * 2
    assert (counts.groups_paired, counts.kept) == (2, 2 * len(expected))


def test_best_mean_2sd_rejects_the_score_closest_to_two_deviations_below_the_mean() -> None:
    # Nine of 1, one of -2 and one of -5: mean 2/11 = 0.18, variance 38/11 - 0.03 = 3.42, so that -3.52 is aimed at: -2 is
    # 1.52 from it, and -5 1.48.
    texts_, scores = "abcdefghijk", [1.0] * 9 + [-2.0, -5.0]
    assert texts(build(judged(texts_, scores), strategy="best_mean_2sd")[0]) == ["a>k"]
    # With -6 the aim is (1/11) - 2 sqrt(49/11 - 1/121) = -4.13: -2 is 2.13 from it and -6 1.87; with -7 the aim is
    # 0 - 2 sqrt(62/11) = -4.75: -7 is 2.25 from it, -4 only 0.75.
    assert texts(build(judged(texts_, [1.0] * 9 + [-4.0, -7.0]), strategy="best_mean_2sd")[0]) == ["a>j"]
    assert texts(build(judged(texts_, [1.0] * 9 + [-4.0, -7.0]))[0]) == ["a>k"]


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.sampled_from([-1e9, -2.0, 0.0, 0.5, 3.0, 1e9]), min_size=2, max_size=5))
def test_of_up_to_five_completions_mean_2sd_rejects_the_worst(scores: list[float]) -> None:
    group = judged(
        "abcde"[: len(scores)], scores
    )  # of K numbers none is more than sqrt(K - 1) deviations from the mean
    found = [build(group, strategy=strategy)[0] for strategy in ("best_worst", "best_mean_2sd")]
    assert [p.rejected_score for p in found[0]] == [p.rejected_score for p in found[1]]


def test_scores_at_the_ends_of_a_floats_range_have_a_mean_too() -> None:
    group = judged("abc", [1e308, 1e308, -1e308])
    assert texts(build(group, strategy="best_mean_2sd")[0]) == ["a>c"]


def other(text: str, *, reason: str = "stop") -> Completion:
    return Completion(text, [99], [], reason)  # type: ignore[arg-type]


def test_the_best_is_chosen_against_another_sources_completion_although_all_tie() -> None:
    pairs, counts = build(judged("abc", [0.5, 1.0, None]), judged("ab", [1.0, 1.0], id="p-1"), others=[other("z")] * 2)
    assert texts(pairs) == ["b>z", "a>z"]
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [(1.0, None), (1.0, None)]
    assert (counts.groups_paired, counts.kept) == (2, 2)


@pytest.mark.parametrize(
    ("strategy", "side", "expected"),
    [
        ("best_worst", "rejected", ["b>z"]),
        ("all_pairs", "rejected", ["b>z", "c>z", "a>z"]),
        ("best_worst", "chosen", ["z>a"]),
        ("best_mean_2sd", "chosen", ["z>a"]),
        ("all_pairs", "chosen", ["z>a", "z>c", "z>b"]),
    ],
)
def test_the_strategy_says_which_completions_meet_that_of_another_source(
    strategy: Strategy, side: str, expected: list[str]
) -> None:
    group = judged("abc", [0.0, 1.0, 0.5])
    assert texts(build(group, others=[other("z")], others_are=side, strategy=strategy)[0]) == expected
    assert (
        texts(build(group, others=[other("z")], others_are=side, strategy=strategy, max_pairs_per_prompt=1)[0])
        == (expected[:1])
    )


def test_best_random_rejects_any_completion_against_a_chosen_one_of_another_source() -> None:
    groups = [judged("abc", [0.0, 1.0, 0.5], id=f"p-{i}") for i in range(40)]
    pairs, _ = build(*groups, others=[other("z")] * 40, others_are="chosen", strategy="best_random")
    assert {pair.rejected.text for pair in pairs} == set("abc")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        (None, {}, "unmatched"),
        (other("a"), {}, "identical"),
        (other("z", reason="length"), {"drop_truncated": True}, "truncated"),
        (other("z", reason="thought"), {"drop_truncated": True}, "unfinished_thoughts"),
    ],
)
def test_a_group_that_cannot_meet_another_sources_completion_is_counted_by_reason(
    given: Completion | None, options: dict[str, Any], reason: str, side: str
) -> None:
    pairs, counts = build(judged("a", [1.0]), others=[given], others_are=side, **options)
    assert (pairs, getattr(counts, reason), counts.groups_paired) == ([], 1, 0)
    assert reason.replace("_", " ") in counts.summary()


def test_an_unfinished_thought_of_another_source_may_be_rejected_and_is_never_chosen() -> None:
    group, thought = judged("a", [1.0]), other("z", reason="thought")
    assert texts(build(group, others=[thought])[0]) == ["a>z"]
    assert build(group, others=[thought], others_are="chosen")[1].unfinished_thoughts == 1


def test_best_random_draws_among_all_that_the_best_beats_and_never_always_the_first() -> None:
    groups = [judged("abcd", [0.0, 1.0, 2.0, 3.0], id=f"p-{i}") for i in range(60)]
    pairs, _ = build(*groups, strategy="best_random", seed=1)
    drawn = Counter(texts(pairs))
    assert set(drawn) == {"d>a", "d>b", "d>c"}
    assert max(drawn.values()) < 40  # 20 expected; 40 of 60 would be 5 standard deviations away


def test_best_random_is_the_same_for_the_same_seed_whatever_else_is_in_the_round() -> None:
    groups = [judged("abcd", [0.0, 1.0, 2.0, 3.0], id=f"p-{i}") for i in range(30)]
    whole, _ = build(*groups, strategy="best_random", seed=1)
    assert texts(build(*groups, strategy="best_random", seed=1)[0]) == texts(whole)
    assert texts(build(*groups[10:], strategy="best_random", seed=1)[0]) == texts(whole)[10:]
    assert texts(build(*groups, strategy="best_random", seed=2)[0]) != texts(whole)


def test_best_random_never_draws_one_that_is_too_close_to_the_best() -> None:
    groups = [judged("abcd", [0.0, 1.0, 2.5, 3.0], id=f"p-{i}") for i in range(20)]
    pairs, _ = build(*groups, strategy="best_random", min_margin=2.0)
    assert set(texts(pairs)) == {"d>a", "d>b"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("group", "options", "reason"),
    [
        (judged("abc", [0.5, 0.5, 0.5]), {}, "tied"),
        (judged("abc", [0.5, 0.4, 0.3]), {"min_margin": 0.25}, "tied"),
        (judged("abc", [None, None, 1.0]), {}, "unjudged"),
        (judged("abc", [None, None, None]), {}, "unjudged"),
        (judged("aaa", [1.0, 1.0, 1.0]), {}, "identical"),
        (judged("aaa", [1.0, 0.0, 0.5]), {}, "identical"),  # a judge that is not sure of itself makes no preference
        (judged("aba", [1.0, None, 0.0]), {}, "identical"),
        (judged("abc", [1.0, 0.0, 0.5], cut=[0, 1]), {"drop_truncated": True}, "truncated"),
        (judged("abc", [1.0, 0.0, 0.5], cut=[0, 1, 2]), {"drop_truncated": True}, "truncated"),
        (judged("aab", [None, None, None], cut=[0, 1]), {"drop_truncated": True}, "truncated"),  # the first that holds
        (judged("a", [1.0]), {}, "unjudged"),
    ],
)
def test_a_group_without_a_pair_is_counted_once_under_its_reason(
    group: Judged, options: dict[str, Any], reason: str, strategy: Strategy
) -> None:
    pairs, counts = build(group, strategy=strategy, **options)
    assert pairs == []
    left_out = {name: getattr(counts, name) for name in ("tied", "unjudged", "identical", "truncated")}
    assert left_out == {**dict.fromkeys(left_out, 0), reason: 1}
    assert (counts.groups, counts.groups_paired, counts.kept) == (1, 0, 0)


def test_a_margin_of_exactly_min_margin_makes_a_pair() -> None:
    assert texts(build(judged("ab", [0.75, 0.5]), min_margin=0.25)[0]) == ["a>b"]


def test_an_abstention_is_neither_the_worst_nor_a_tie() -> None:
    pairs, counts = build(judged("abcd", [None, 0.5, -3.0, None]))
    assert texts(pairs) == ["b>c"]
    assert counts.completions_unjudged == 2


def test_truncated_completions_are_counted_and_paired_unless_they_are_to_be_dropped() -> None:
    group = judged("abc", [1.0, 0.5, 0.0], cut=[0])
    kept, counts = build(group)
    assert texts(kept) == ["a>c"]
    assert counts.completions_truncated == 1
    kept, counts = build(group, drop_truncated=True)
    assert texts(kept) == ["b>c"]
    assert counts.completions_truncated == 1


def test_twins_are_one_completion() -> None:
    pairs, _ = build(judged("abab", [1.0, 0.0, 1.0, 0.0]), strategy="all_pairs")
    assert texts(pairs) == ["a>b"]
    assert (pairs[0].chosen.token_ids, pairs[0].rejected.token_ids) == ([10, 20], [11, 21])  # the first of each


def test_among_equal_scores_the_order_of_sampling_decides() -> None:
    assert texts(build(judged("abcd", [1.0, 1.0, 0.0, 0.0]))[0]) == ["a>c"]


def test_among_equal_scores_the_order_of_sampling_decides_also_where_there_are_twins() -> None:
    assert texts(build(judged("abac", [1.0, 1.0, 1.0, 0.0]))[0]) == ["a>c"]


def test_pairs_come_in_the_order_of_the_groups() -> None:
    groups = [judged("ab", [1.0, 0.0], id=f"p-{i}") for i in (3, 1, 2)]
    assert [pair.prompt.id for pair in build(*groups)[0]] == ["p-3", "p-1", "p-2"]


def test_a_judgment_too_few_is_an_error() -> None:
    group, _ = judged("ab", [1.0, 0.0])
    with pytest.raises(ValueError, match="shorter"):
        build_pairs([group], [])


def test_the_summary_names_only_what_was_left_out() -> None:
    _, counts = build(judged("ab", [1.0, 0.0]), judged("ab", [1.0, 1.0]), judged("ab", [None, 1.0]))
    assert counts.summary() == "kept 1 pairs of 3 groups (1 tied, 1 unjudged)"
    assert PairCounts(groups=2000, groups_paired=1500, kept=1500).summary() == "kept 1,500 pairs of 2,000 groups"
    assert asdict(counts)["tied"] == 1


SCORES = st.sampled_from([None, -1.0, 0.0, 0.25, 0.5, 1.0])
COMPLETIONS = st.lists(st.tuples(st.sampled_from("abcd"), SCORES, st.booleans()), min_size=2, max_size=5)
SETTINGS = {
    "strategy": st.sampled_from(STRATEGIES),
    "min_margin": st.sampled_from([0.0, 0.25, 0.6, 5.0]),
    "max_pairs_per_prompt": st.sampled_from([None, 1, 2]),
    "drop_truncated": st.booleans(),
    "seed": st.integers(0, 3),
}


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(COMPLETIONS, max_size=4), options=st.fixed_dictionaries(SETTINGS))
def test_whatever_the_groups_the_account_adds_up_and_every_pair_is_a_preference(
    rows: list[list[tuple[str, float | None, bool]]], options: dict[str, Any]
) -> None:
    groups = [
        judged([t for t, _, _ in row], [s for _, s, _ in row], cut=[k for k, r in enumerate(row) if r[2]], id=f"p-{i}")
        for i, row in enumerate(rows)
    ]
    pairs, counts = build(*groups, **options)

    assert counts.groups == len(rows)
    left_out = counts.tied + counts.unjudged + counts.identical + counts.truncated
    assert counts.groups == counts.groups_paired + left_out
    assert counts.kept == len(pairs)
    assert counts.completions_unjudged == sum(score is None for row in rows for _, score, _ in row)
    assert counts.completions_truncated == sum(cut for row in rows for _, _, cut in row)

    by_prompt = Counter(pair.prompt.id for pair in pairs)
    assert len(by_prompt) == counts.groups_paired
    most = options["max_pairs_per_prompt"] if options["strategy"] == "all_pairs" else 1
    assert most is None or max(by_prompt.values(), default=0) <= most
    assert len({(pair.prompt.id, pair.chosen.text, pair.rejected.text) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.chosen_score is not None
        assert pair.rejected_score is not None
        assert pair.chosen_score > pair.rejected_score
        assert pair.chosen_score - pair.rejected_score >= options["min_margin"]
        assert pair.chosen.text != pair.rejected.text
        assert not (options["drop_truncated"] and (pair.chosen.truncated or pair.rejected.truncated))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), scores=st.fixed_dictionaries(dict.fromkeys("abcd", SCORES)))
def test_the_order_of_the_completions_does_not_change_which_texts_all_pairs_pairs(
    data: st.DataObject, scores: dict[str, float | None]
) -> None:
    drawn = data.draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=6))
    shuffled = data.draw(st.permutations(drawn))
    one, _ = build(judged(drawn, [scores[t] for t in drawn]), strategy="all_pairs")
    other, _ = build(judged(shuffled, [scores[t] for t in shuffled]), strategy="all_pairs")
    assert Counter(texts(one)) == Counter(texts(other))


@settings(max_examples=50)
@given(
    scores=st.lists(st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=2, max_size=4), max_size=12),
    strategy=st.sampled_from(STRATEGIES),
    cut=st.booleans(),
)
def test_groups_paired_one_at_a_time_give_the_same_pairs_and_counts(
    scores: list[list[float | None]], strategy: Strategy, cut: bool
) -> None:
    groups = [
        judged([f"y {k % 3}" for k in range(len(s))], s, cut=[0] if n % 2 else [], id=f"p-{n}")
        for n, s in enumerate(scores)
    ]
    options: dict[str, Any] = {"strategy": strategy, "drop_truncated": cut, "seed": 3}
    together, counts = build(*groups, **options)
    apart = [build(group, **options) for group in groups]
    assert [pair for pairs, _ in apart for pair in pairs] == together
    assert sum((each for _, each in apart), PairCounts()) == counts


# Thinking models


def thought(
    answers: Sequence[str | None], scores: Sequence[float | None], *, reasoning: Sequence[str] | None = None
) -> Judged:
    """A group of completions with these answers after a thought of one token; None is a thought without an end."""
    group, judgment = judged([answer or "" for answer in answers], scores)
    thoughts = reasoning or [f"<think>{k}</think>" for k in range(len(answers))]
    completions = [
        replace(c, reasoning=said, reasoning_tokens=1 if answer is not None else 2)
        if answer is not None
        else replace(c, reasoning=said, reasoning_tokens=2, finish_reason="thought")
        for c, answer, said in zip(group.completions, answers, thoughts, strict=True)
    ]
    return replace(group, completions=completions), judgment


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_thought_without_an_end_is_rejected_and_never_chosen(strategy: Strategy) -> None:
    pairs, counts = build(thought(["a", None], [0.5, 0.25]), strategy=strategy)
    assert texts(pairs) == ["a>"]
    assert counts == PairCounts(groups=1, groups_paired=1, kept=1)
    pairs, counts = build(thought(["a", None], [0.5, 0.75]), strategy=strategy)
    assert not pairs
    assert counts == PairCounts(groups=1, unfinished_thoughts=1)
    pairs, _ = build(thought(["a", None, "b"], [0.5, 0.75, 0.25]), strategy=strategy)
    assert texts(pairs) == ["a>b"]


@pytest.mark.parametrize("options", [{}, {"drop_truncated": True}, {"answers_alone": True}])
def test_a_group_of_nothing_but_unfinished_thoughts_is_counted_as_such(options: dict[str, Any]) -> None:
    pairs, counts = build(thought([None, None], [0.5, 0.25]), **options)
    assert not pairs
    assert counts == PairCounts(groups=1, unfinished_thoughts=1)
    assert counts.summary() == "kept 0 pairs of 1 groups (1 unfinished thoughts)"


@pytest.mark.parametrize("options", [{"drop_truncated": True}, {"answers_alone": True}])
def test_unfinished_thoughts_are_left_out_with_truncated_ones_or_if_answers_alone_are_trained_on(
    options: dict[str, Any],
) -> None:
    pairs, _ = build(thought(["a", None, "b"], [0.5, 0.0, 0.25]), **options)
    assert texts(pairs) == ["a>b"]
    pairs, counts = build(thought(["a", None], [0.5, 0.0]), **options)
    assert (pairs, counts.unfinished_thoughts) == ([], 1)


def test_a_completion_that_is_cut_where_its_answer_begins_has_nothing_to_train_on_alone() -> None:
    group, judgment = thought(["a", ""], [0.5, 0.0])
    cut = replace(group.completions[1], token_ids=[11], finish_reason="length")
    cut_short = replace(group, completions=[group.completions[0], cut]), judgment
    assert texts(build(cut_short)[0]) == ["a>"]
    assert build(cut_short, answers_alone=True)[0] == []


def test_completions_of_one_answer_are_twins_unless_the_judge_sees_their_reasoning() -> None:
    group = thought(["a", "a"], [0.5, 0.25])
    assert build(group)[1].identical == 1
    assert texts(build(group, by_reasoning=True)[0]) == ["a>a"]
    assert build(thought(["a", "a"], [0.5, 0.25], reasoning=["t", "t"]), by_reasoning=True)[1].identical == 1


def test_an_empty_answer_and_a_thought_without_an_end_are_no_twins() -> None:
    assert texts(build(thought(["", None], [0.5, 0.25]))[0]) == [">"]

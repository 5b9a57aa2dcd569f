"""Judges made of others keep what these abstained from, and change scores as their formulas say."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.testing import make_group
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt
from judges import check_judge, judge_version, load_judge
from judges.audit.check import draw_again
from judges.combine import disagreement, tied, within_slope, z_scores
from judges.estimate import estimate
from judges.load import check_columns

MEMBER = '''
class Field:
    """The number in field `index` of a completion such as "1.5;-2;?"; "?" abstains. Counts and shows what was asked."""

    comparative = False

    def __init__(self, index=0, log=False):
        self.index = index
        self.log = __file__ + ".log" if log else None  # no argument: a file that is one is part of the version

    def score(self, completion):
        field = completion.split(";")[self.index].strip()
        self.write(completion)
        if field == "?":
            raise ValueError("no number")
        return float(field)

    def attach(self, run_dir, waiting):
        self.write("attached")

    def begin_stage(self):
        self.write("begun")

    def close(self):
        self.write("closed")

    def write(self, line):
        if self.log:
            with open(self.log, "a") as file:
                file.write(line + "\\n")


class Groups(Field):
    comparative = True
    needs_device = False

    def judge(self, groups):
        from iterdpo.types import Comparison, Judgment

        return [
            Judgment(g.prompt.id, [1.0, 0.0], [None, None], [Comparison(0, 1, "first")], {"cycles": 0}) for g in groups
        ]

    def usage(self):
        return {"calls": 2, "cost_usd": 0.5}
'''


@pytest.fixture
def field(tmp_path: Path) -> Any:
    """`field(1)` is the mapping of a judge that reads field 1 of a completion."""
    file = tmp_path / "member.py"
    file.write_text(MEMBER)
    return lambda index=0, name="Field", **args: {
        "use": f"{file}:{name}",
        "args": {**({} if index is None else {"index": index}), **args},
    }


def judged(use: str, *groups: CompletionGroup, **args: Any) -> list[Judgment]:
    judge = load_judge(use, args)
    assert isinstance(judge, JudgeBase)
    assert judge.version == judge_version(use, args)
    return checked_judgments(judge, groups)


def sized(*rows: tuple[str, int]) -> CompletionGroup:
    """Completions with their texts and numbers of tokens."""
    completions = [Completion(text, [7] * n, [-1.0] * n, "stop") for text, n in rows]
    return CompletionGroup(Prompt("p-sized", "x"), [1], completions)


class TestEnsemble:
    def test_scores_are_the_weighted_mean(self, field: Any) -> None:
        members = [{**field(0), "weight": 3}, field(1)]
        [judgment] = judged("ensemble", make_group("x", ["1;5", "0;-4"]), judges=members)
        assert judgment.scores == [(3 * 1 + 5) / 4, (3 * 0 - 4) / 4]
        assert judgment.details["judges"][1] == {"judge": "member.py:Field", "weight": 1.0, "scores": [5.0, -4.0]}

    def test_a_negative_weight_turns_a_judge_round(self, field: Any) -> None:
        members = [field(0), {**field(1), "weight": -1}]
        [judgment] = judged("ensemble", make_group("x", ["1;3", "2;0"]), judges=members)
        assert judgment.scores == [(1 - 3) / 2, (2 - 0) / 2]
        assert judgment.details["disagreement"] == 0.0  # the first likes 2 better, and the second, turned, 0

    def test_an_abstention_of_one_member_abstains_with_its_name_and_reason(self, field: Any) -> None:
        [judgment] = judged("ensemble", make_group("x", ["1;5", "2;?"]), judges=[field(0), field(1)])
        assert judgment.scores == [3.0, None]
        assert judgment.abstentions == [None, "member.py:Field: ValueError: no number"]

    def test_min_judges_lets_the_others_decide(self, field: Any) -> None:
        members = [field(0), field(1), {**field(2), "weight": 2}]
        group = make_group("x", ["1;?;4", "?;?;4", "?;?;?"])
        [judgment] = judged("ensemble", group, judges=members, min_judges=2)
        assert judgment.scores == [(1 + 2 * 4) / 3, None, None]
        assert judgment.abstentions[1] == "fewer than 2 judges gave a score; member.py:Field: ValueError: no number"

    def test_standardized_members_weigh_the_same_whatever_their_scale(self, field: Any) -> None:
        group = make_group("x", ["0;1000", "1;3000", "2;2000"])
        [judgment] = judged("ensemble", group, judges=[field(0), field(1)], standardize="group")
        z = math.sqrt(3 / 2)  # 0, 1, 2 have mean 1 and standard deviation sqrt(2/3)
        assert judgment.scores == pytest.approx([(-z - z) / 2, (0 + z) / 2, (z + 0) / 2])

    def test_standardizing_counts_only_what_all_judged(self, field: Any) -> None:
        group = make_group("x", ["0;1", "4;2", "100;?"])
        [judgment] = judged("ensemble", group, judges=[field(0), field(1)], standardize="group")
        assert judgment.scores == [-1.0, 1.0, None]  # with the 100, the first two would hardly differ

    def test_a_group_on_which_the_members_disagree_abstains(self, field: Any) -> None:
        # Of the three pairs of completions, the members order (0, 1) alike and the two others contrarily.
        group = make_group("x", ["1;2", "2;3", "3;1"])
        members = [field(0), field(1)]
        [judgment] = judged("ensemble", group, judges=members, max_disagreement=0.6)
        assert judgment.scores == [None] * 3
        assert judgment.abstentions == ["the judges disagree"] * 3
        assert judgment.details["disagreement"] == pytest.approx(2 / 3)
        [judgment] = judged("ensemble", group, judges=members, max_disagreement=0.7)
        assert judgment.scores == [1.5, 2.5, 2.0]

    def test_what_is_scored_alike_disagrees_with_nobody(self) -> None:
        assert disagreement([[1.0, 2.0], [3.0, 3.0]]) is None
        assert disagreement([[1.0, 2.0, None], [2.0, 1.0, 5.0]]) == 1.0
        assert disagreement([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]) == pytest.approx(2 / 3)

    def test_what_it_is_follows_from_its_members(self, field: Any) -> None:
        group = make_group("x", ["1", "0"])
        judge: Any = load_judge("ensemble", {"judges": [field(0), field(0, "Groups")]})
        assert judge.comparative
        assert judge.needs_device
        [judgment] = judge.judge([group])
        assert [c.winner for c in judgment.comparisons] == ["first"]
        assert not load_judge("ensemble", {"judges": [field(0)]}).comparative
        assert load_judge("ensemble", {"judges": [field(0)], "standardize": "group"}).comparative
        assert not load_judge("ensemble", {"judges": [field(0, "Groups")]}).needs_device

    def test_the_verdicts_of_two_members_are_not_mixed(self, field: Any) -> None:
        members = [field(0, "Groups"), field(0, "Groups")]
        [judgment] = judged("ensemble", make_group("x", ["1", "0"]), judges=members)
        assert judgment.comparisons == []

    def test_members_are_told_of_the_run_and_the_stage_and_when_to_close(self, field: Any, tmp_path: Path) -> None:
        wrapped = {"use": "z_score", "args": {"judge": field(1, log=True)}}
        judge = load_judge("ensemble", {"judges": [field(0, log=True), wrapped]})
        judge.attach(tmp_path, lambda message: nullcontext())
        judge.begin_stage()
        judge.close()
        assert (tmp_path / "member.py.log").read_text() == "attached\n" * 2 + "begun\n" * 2 + "closed\n" * 2
        assert [part.name for part in judge.parts()] == [
            judge.name,
            "member.py:Field",
            "z_score(member.py:Field)",
            "member.py:Field",
        ]

    @pytest.mark.parametrize(
        ("args", "complaint"),
        [
            ({"judges": []}, "give at least one"),
            ({"judges": ["exact_match"]}, "is given as"),
            ({"judges": [{"use": "F", "weight": 0}]}, "give a number other than 0"),
            ({"judges": [{"use": "F", "wieght": 2}]}, "is given as"),
            ({"judges": [{"use": "F"}], "standardize": "shard"}, "one of none, group"),
            ({"judges": [{"use": "F"}], "max_disagreement": 50}, "a share between 0 and 1"),
            ({"judges": [{"use": "F"}], "min_judges": 2}, "a number from 1 to 1"),
            ({"judges": [{"use": "nowhere.py:judge"}]}, "no such file nowhere.py"),
        ],
    )
    def test_a_mistake_is_found_before_loading(self, field: Any, args: dict[str, Any], complaint: str) -> None:
        for judge in args["judges"]:
            if isinstance(judge, dict) and judge["use"] == "F":
                judge["use"] = field()["use"]
        with pytest.raises(JudgeError, match=complaint):
            check_judge("ensemble", args)


class TestByTask:
    def test_each_prompt_is_judged_by_the_judge_of_its_task_in_the_order_of_the_groups(self, field: Any) -> None:
        groups = [make_group(f"x{i}", ["1;5", "0;-4"], task="chat" if i % 2 else "math") for i in range(4)]
        found = judged("by_task", *groups, judges={"math": field(0), "chat": field(1)})
        assert [j.scores for j in found] == [[1.0, 0.0], [5.0, -4.0]] * 2
        assert [j.prompt_id for j in found] == [g.prompt.id for g in groups]

    def test_another_task_goes_to_the_judge_for_the_rest_or_abstains_with_the_reason(self, field: Any) -> None:
        groups = [make_group("x", ["1;5"], kind=3), make_group("y", ["2;6"])]
        args = {"judges": {"math": field(0)}, "column": "kind"}
        assert [j.scores for j in judged("by_task", *groups, **args, otherwise=field(1))] == [[5.0], [6.0]]
        assert [j.abstentions for j in judged("by_task", *groups, **args)] == [
            ["column 'kind' is '3', not math"],
            ["column 'kind' is None, not math"],
        ]

    def test_it_compares_and_needs_a_device_if_any_of_its_judges_does(self, field: Any) -> None:
        judge: Any = load_judge("by_task", {"judges": {"math": field(0)}, "otherwise": field(0, "Groups")})
        assert judge.comparative
        assert not load_judge("by_task", {"judges": {"math": field(0)}}).comparative

    @pytest.mark.parametrize(
        ("args", "complaint"),
        [
            ({"judges": []}, "a mapping of tasks to judges"),
            ({"judges": {}}, "a mapping of tasks to judges"),
            ({"judges": {"use": "math", "args": {}}}, "a mapping of tasks to judges"),
            ({"judges": {"math": "math"}}, "is given as"),
            ({"judges": {1: {"use": "math"}}}, "the task 1 in `judges` is no text; put it into quotes"),
            ({"judges": {"math": {"use": "math"}}, "otherwise": "regex"}, "is given as"),
            ({"judges": {"math": {"use": "nowhere.py:judge"}}}, "no such file nowhere.py"),
            ({"judges": {"math": {"use": "exact_match", "args": {"column": "gold"}}}, "column": 3}, "column is 3"),
        ],
    )
    def test_a_mistake_is_found_before_loading(self, args: dict[str, Any], complaint: str) -> None:
        with pytest.raises(JudgeError, match=complaint):
            check_judge("by_task", args)

    def test_a_column_that_the_prompts_do_not_have_is_refused(self) -> None:
        args = {"judges": {"math": {"use": "exact_match", "args": {"column": "gold"}}}, "column": "tusk"}
        with pytest.raises(JudgeError, match=r"'by_task': asks for a column 'tusk' that the prompts do not have.*task"):
            check_columns("by_task", ["gold", "task"], args)
        check_columns("by_task", ["gold", "tusk"], args)

    def test_the_work_is_that_of_each_tasks_prompts(self) -> None:
        chat = {"use": "exact_match", "args": {"column": "gold"}}
        groups = [make_group(f"x{i}", ["a", "b"], task=task) for i, task in enumerate(["math", "chat", "none"])]
        assert estimate("by_task", {"judges": {"math": chat, "chat": chat}}, groups).calls == 4
        assert estimate("by_task", {"judges": {"math": chat}, "otherwise": chat}, groups).calls == 6


class TestZScore:
    def test_scores_are_in_standard_deviations_of_the_group(self, field: Any) -> None:
        first, second = judged("z_score", make_group("x", ["1", "3"]), make_group("y", ["7", "?", "7"]), judge=field())
        assert first.scores == [-1.0, 1.0]
        assert first.details["before_z_score"] == [1.0, 3.0]
        assert second.scores == [0.0, None, 0.0]  # no spread, and nothing becomes of the abstention
        assert second.abstentions[1] == "ValueError: no number"

    def test_what_rounding_leaves_of_equal_scores_is_no_difference(self) -> None:
        assert z_scores([0.1 + 0.2, 0.3]) == [0.0, 0.0]
        assert z_scores([None, None]) == [None, None]
        assert z_scores([5.0]) == [0.0]


class TestLength:
    def test_a_penalty_falls_on_each_token_above(self, field: Any) -> None:
        group = sized(("1", 10), ("1", 13), ("?", 99))
        [judgment] = judged("length_penalty", group, judge=field(), per_token=0.5, above=10)
        assert judgment.scores == [1.0, 1.0 - 0.5 * 3, None]

    def test_what_length_explains_is_taken_out(self, field: Any) -> None:
        groups = [sized(("1", 10), ("2", 20), ("3", 30)), sized(("5", 10), ("7", 30))]
        judgments = judged("length_regressed", *groups, judge=field(), min_completions=3)
        # Both groups' scores rise by 0.1 a token: nothing is left but each group's mean.
        assert judgments[0].scores == pytest.approx([2.0, 2.0, 2.0])
        assert judgments[1].scores == pytest.approx([6.0, 6.0])
        assert judgments[0].details["length_slope"] == pytest.approx(0.1)

    def test_the_slope_is_that_within_prompts(self) -> None:
        # Within each table y falls by 1 a step of x; between them it rises.
        assert within_slope([[(0, 1.0), (1, 0.0)], [(10, 101.0), (11, 100.0)], []]) == -1.0
        assert within_slope([[(5, 1.0), (5, 2.0)]]) == 0.0

    def test_quality_that_does_not_go_with_length_stays(self, field: Any) -> None:
        # Lengths -1, 1 and scores s, -s in mirrored groups: the least-squares slope is 0.
        groups = [sized(("2", 10), ("0", 12)), sized(("0", 10), ("2", 12))]
        judgments = judged("length_regressed", *groups, judge=field(), min_completions=2)
        assert [j.scores for j in judgments] == [[2.0, 0.0], [0.0, 2.0]]

    def test_too_few_completions_abstain(self, field: Any) -> None:
        [judgment] = judged("length_regressed", sized(("1", 10), ("2", 20), ("?", 3)), judge=field())
        reason = "too few completions judged together to estimate the effect of length"
        assert judgment.scores == [None] * 3
        assert judgment.abstentions == [reason, reason, "ValueError: no number"]


def test_what_a_member_leaves_out_by_design_is_no_failure_of_the_ensemble(field: Any) -> None:
    ensemble = load_judge("ensemble", {"judges": [field(0), field(1)]})
    ensemble.members[1].EXPECTED_ABSTENTIONS = ("ValueError: no number",)  # type: ignore[attr-defined]
    [judgment] = checked_judgments(ensemble, [make_group("x", ["1;?", "?;?", "2;3"])])
    assert judgment.abstentions == ["ValueError: no number", "member.py:Field: ValueError: no number", None]


def test_clip_keeps_scores_between_its_bounds(field: Any) -> None:
    group = make_group("x", ["-5", "0.5", "9", "?"])
    assert judged("clip", group, judge=field(), low=0, high=1)[0].scores == [0.0, 0.5, 1.0, None]
    assert judged("clip", group, judge=field(), high=1)[0].scores == [-5.0, 0.5, 1.0, None]


class TestTieBand:
    def test_near_scores_become_their_mean_and_others_stay(self, field: Any) -> None:
        group = make_group("x", ["1", "5", "1.5", "?"])
        assert judged("tie_band", group, judge=field(), width=0.5)[0].scores == [1.25, 5.0, 1.25, None]

    def test_a_chain_of_near_scores_is_one_tie(self) -> None:
        assert tied([0.0, 1.0, 2.0, 4.0], [1] * 4, width=1.0, length_ratio=None) == [1.0, 1.0, 1.0, 4.0]

    def test_with_a_ratio_only_completions_of_different_length_tie(self) -> None:
        # 10 and 14 tokens are alike at a ratio of 1.5; 10 and 16 are not.
        assert tied([1.0, 1.1], [10, 14], width=0.2, length_ratio=1.5) == [1.0, 1.1]
        assert tied([1.0, 1.1], [10, 16], width=0.2, length_ratio=1.5) == [1.05, 1.05]
        assert tied([1.0, 1.3], [10, 16], width=0.2, length_ratio=1.5) == [1.0, 1.3]
        assert tied([1.0, 1.1], [0, 2], width=0.2, length_ratio=1.5) == [1.05, 1.05]

    def test_what_lies_between_two_tied_scores_ties_with_them(self) -> None:
        # Joining 10 and 100 tokens alone would put their mean, 1.05, below the 1.07 that lies between.
        assert tied([1.0, 1.07, 1.1], [10, 30, 100], width=0.2, length_ratio=5) == [pytest.approx(3.17 / 3)] * 3

    def test_equal_scores_stay_equal_where_one_of_them_ties_with_a_third(self) -> None:
        # 3 tokens and none are unlike at a ratio of 2, 2 tokens and none are not.
        assert tied([0.0, 0.0, 1.0], [2, 3, 0], width=1, length_ratio=2) == [pytest.approx(1 / 3)] * 3

    @given(
        st.lists(st.tuples(st.none() | st.floats(-3, 3), st.integers(0, 40)), max_size=7),
        st.floats(0, 2),
        st.none() | st.floats(1, 4),
    )
    def test_no_order_is_turned_round_and_no_score_invented(
        self, rows: list[tuple[float | None, int]], width: float, ratio: float | None
    ) -> None:
        before = [s for s, _ in rows]
        after = tied(before, [n for _, n in rows], width=width, length_ratio=ratio)
        assert [s is None for s in after] == [s is None for s in before]
        for a, x in zip(before, after, strict=True):
            for b, y in zip(before, after, strict=True):
                if a is not None and b is not None and x is not None and y is not None:
                    assert x <= y if a <= b else x >= y
                    if ratio is None and abs(a - b) <= width:
                        assert x == y


class TestCached:
    def test_the_same_group_is_asked_once(self, field: Any, tmp_path: Path) -> None:
        log, path = tmp_path / "member.py.log", tmp_path / "new" / "cache.sqlite"
        args = {"judge": field(log=True), "path": str(path)}
        groups = [make_group("x", ["1", "2"]), make_group("y", ["3", "4"])]
        first = load_judge("cached", args).judge(groups[:1])
        assert log.read_text() == "1\n2\n"
        judge: Any = load_judge("cached", args)  # as another process would
        again = judge.judge([groups[1], groups[0], groups[1]])
        assert log.read_text() == "1\n2\n3\n4\n"
        assert again[1] == first[0]
        assert again[0] == again[2]
        assert judge.usage() == {"cached": 1}

    def test_comparisons_and_details_come_back(self, field: Any, tmp_path: Path) -> None:
        args = {"judge": field(0, "Groups"), "path": str(tmp_path / "cache.sqlite")}
        group = make_group("x", ["1", "2"])
        [first], [second] = load_judge("cached", args).judge([group]), load_judge("cached", args).judge([group])
        assert first == second
        assert first.comparisons
        assert first.details == {"cycles": 0}

    def test_a_judgment_with_an_abstention_is_asked_for_again(self, field: Any, tmp_path: Path) -> None:
        log = tmp_path / "member.py.log"
        args = {"judge": field(log=True), "path": str(tmp_path / "cache.sqlite")}
        group = make_group("x", ["1", "?"])
        assert load_judge("cached", args).judge([group])[0].scores == [1.0, None]
        load_judge("cached", args).judge([group])
        assert log.read_text() == "1\n?\n" * 2

    def test_other_content_and_another_judge_are_asked(self, field: Any, tmp_path: Path) -> None:
        path = str(tmp_path / "cache.sqlite")
        judged("cached", make_group("x", ["1;5"], gold="a"), judge=field(0), path=path)
        assert judged("cached", make_group("x", ["1;5"], gold="a"), judge=field(1), path=path)[0].scores == [5.0]
        judge: Any = load_judge("cached", {"judge": field(0), "path": path})
        judge.judge([make_group("x", ["1;5"], gold="b"), make_group("x", ["2;5"], gold="a")])
        assert judge.usage() == {"cached": 0}

    def test_another_repeat_is_another_draw_within_an_ensemble_too(self, field: Any, tmp_path: Path) -> None:
        cached = {"use": "cached", "args": {"judge": field(log=True), "path": str(tmp_path / "cache.sqlite")}}
        judge: Any = load_judge("ensemble", {"judges": [cached]})
        for repeat in (0, 1, 1, 0):
            draw_again(judge, repeat)
            judge.judge([make_group("x", ["1", "2"])])
        assert (tmp_path / "member.py.log").read_text() == "1\n2\n" * 2

    def test_where_it_keeps_them_is_not_part_of_the_version(self, field: Any, tmp_path: Path) -> None:
        versions = {judge_version("cached", {"judge": field(), "path": str(tmp_path / name)}) for name in "ab"}
        assert len(versions) == 1

    def test_a_file_that_is_no_database_is_refused(self, field: Any, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("not a database, but long enough to be read as one " * 50)
        judge = load_judge("cached", {"judge": field(), "path": str(tmp_path / "cache")})
        with pytest.raises(JudgeError, match=r"cannot be used: .*move the file away, or name another in `path`"):
            judge.judge([make_group("x", ["1"])])


def test_wrappers_nest_and_pass_on_what_the_inner_judge_says(field: Any) -> None:
    inner = {"use": "clip", "args": {"judge": field(0, "Groups"), "high": 0.5}}
    judge: Any = load_judge("length_penalty", {"judge": inner, "per_token": 0.1})
    assert judge.name == "length_penalty(clip(member.py:Groups))"
    assert judge.comparative
    assert not judge.needs_device
    [judgment] = judge.judge([sized(("1", 2), ("0", 1))])
    assert judgment.scores == pytest.approx([0.5 - 0.2, -0.1])
    assert judgment.details == {"cycles": 0, "before_clip": [1.0, 0.0], "before_length_penalty": [0.5, 0.0]}
    assert len(judgment.comparisons) == 1


def test_flipped_changes_the_sign_of_a_seeded_share_of_the_prompts(field: Any) -> None:
    groups = [make_group(f"prompt {i}", ["1", "3", "?"]) for i in range(400)]

    def wrong(**args: Any) -> list[bool]:
        found = [j.scores for j in judged("flipped", *groups, judge=field(), **args)]
        assert all(scores in ([1.0, 3.0, None], [-1.0, -3.0, None]) for scores in found)
        return [scores[0] == -1.0 for scores in found]

    assert sum(wrong(share=0.2)) == pytest.approx(80, abs=24)  # three standard deviations: 3 sqrt(400 x 0.2 x 0.8)
    assert wrong(share=0.2) == wrong(share=0.2) != wrong(share=0.2, seed=1)
    assert all(a <= b for a, b in zip(wrong(share=0.2), wrong(share=0.4), strict=True))  # more share, the same and more
    assert not any(wrong(share=0.0))
    assert all(wrong(share=1.0))


@pytest.mark.parametrize(
    ("use", "args", "complaint"),
    [
        ("clip", {}, "give numbers for one or both"),
        ("clip", {"low": 2, "high": 1}, "low first"),
        ("length_penalty", {"per_token": -1}, "per_token is -1; it is a number, 0 or more"),
        ("tie_band", {"width": 1, "length_ratio": 0.5}, "at least 1"),
        ("length_regressed", {"min_completions": 1}, "at least 2"),
        ("cached", {"path": ""}, "it is the file to keep judgments in"),
        ("flipped", {"share": 1.5}, "between 0 and 1"),
        ("flipped", {"share": 0.5, "seed": "a"}, "whole number"),
        ("z_score", {"judge": "reward_model"}, "is given as"),
    ],
)
def test_a_mistake_in_a_wrapper_is_found_before_loading(
    field: Any, use: str, args: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(JudgeError, match=complaint):
        check_judge(use, {"judge": field(), **args})


def test_the_version_follows_the_inner_judge(field: Any) -> None:
    assert judge_version("z_score", {"judge": field(0)}) != judge_version("z_score", {"judge": field(1)})

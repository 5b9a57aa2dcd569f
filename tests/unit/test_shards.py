"""Judging shard by shard: what is kept, what is asked again, when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from iterdpo.errors import JudgeError, JudgingStopped
from iterdpo.judge import NamedJudge
from iterdpo.shards import RETRY, EarlyJudge, judge_shards, read_judgments
from iterdpo.testing import make_group
from iterdpo.types import CompletionGroup, Judgment


class Fickle:
    """Scores lengths; abstains on texts in `broken`. `asked` lists the prompts that it was asked about."""

    name, version = "fickle", "1"

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.asked: list[str] = []

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        self.asked += [str(g.prompt.content) for g in groups]
        return [
            Judgment(
                g.prompt.id,
                [None if c.text in self.broken else float(len(c.text)) for c in g.completions],
                ["down" if c.text in self.broken else None for c in g.completions],
            )
            for g in groups
        ]


SHARDS = [
    ("shard-0000.jsonl", [make_group("1", ["a", "bb"]), make_group("2", ["x", "yy"])]),
    ("shard-0001.jsonl", [make_group("3", ["c", "dd"]), make_group("4", ["e", "ff"])]),
]


def named(judge: Fickle, **limits: float | None) -> NamedJudge:
    return NamedJudge("train_judge", "fickle", "1", lambda: judge, **limits)  # type: ignore[arg-type]


def judged(judge: Fickle, directory: Path, *, early: Path | None = None, **limits: float | None) -> list[Judgment]:
    return judge_shards(named(judge, **limits), lambda: judge, SHARDS, directory, total=8, early=early)


def test_a_shard_that_is_there_is_not_judged_again(tmp_path: Path) -> None:
    first = judged(Fickle(), tmp_path)
    again = Fickle()
    assert judged(again, tmp_path) == first == read_judgments(tmp_path)
    assert again.asked == []


def test_an_abstention_within_the_budget_stays_one(tmp_path: Path) -> None:
    judged(Fickle("a"), tmp_path, max_abstained=0.25)
    again = Fickle()
    assert judged(again, tmp_path, max_abstained=0.25)[0].scores == [None, 2.0]
    assert again.asked == []


@pytest.mark.parametrize("limits", [{"max_abstained": 0.2}, {"max_abstained_count": 1}])
def test_past_the_budget_the_stage_stops_with_the_reasons_and_goes_on_where_it_stopped(
    tmp_path: Path, limits: dict[str, float | None]
) -> None:
    broken = Fickle("a", "x")
    with pytest.raises(JudgingStopped, match=r"2 of 4 completions(?s:.*)2  down"):
        judged(broken, tmp_path, **limits)
    assert broken.asked == ["1", "2"]  # the second shard was not begun
    mended = Fickle()
    assert [j.scores for j in judged(mended, tmp_path, **limits)] == [[1.0, 2.0]] * 4
    assert mended.asked == ["1", "2", "3", "4"]


def test_only_the_groups_that_abstained_are_asked_again(tmp_path: Path) -> None:
    judged(Fickle("x", "e"), tmp_path)
    (tmp_path / RETRY).touch()
    mended = Fickle()
    assert [j.scores for j in judged(mended, tmp_path)] == [[1.0, 2.0]] * 4
    assert mended.asked == ["2", "4"]


def test_what_was_judged_early_is_taken_over(tmp_path: Path) -> None:
    judge = Fickle()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    early.put(SHARDS[0][1])
    assert early.join() > 0
    rest = Fickle()
    assert [j.scores for j in judged(rest, _made(tmp_path / "step"), early=tmp_path / "early")] == [[1.0, 2.0]] * 4
    assert rest.asked == ["3", "4"]


def test_what_abstained_early_is_asked_again_once_the_stage_had_stopped(tmp_path: Path) -> None:
    broken = Fickle("a", "x", "c", "e")
    early = EarlyJudge(named(broken), broken, tmp_path / "early")
    for _, groups in SHARDS:
        early.put(groups)
    early.join()
    step = _made(tmp_path / "step")
    with pytest.raises(JudgingStopped):
        judged(broken, step, early=tmp_path / "early", max_abstained=0.1)
    mended = Fickle()
    again = judged(mended, step, early=tmp_path / "early", max_abstained=0.1)
    assert [j.scores for j in again] == [[1.0, 2.0]] * 4
    assert mended.asked == ["1", "2", "3", "4"]


def test_what_another_judge_judged_early_is_not(tmp_path: Path) -> None:
    judge = Fickle()
    other = NamedJudge("train_judge", "fickle", "2", lambda: judge)
    early = EarlyJudge(other, judge, tmp_path / "early")
    early.put(SHARDS[0][1])
    early.join()
    rest = Fickle()
    judged(rest, _made(tmp_path / "step"), early=tmp_path / "early")
    assert rest.asked == ["1", "2", "3", "4"]


def test_an_early_error_that_is_the_users_to_mend_comes_with_the_next_shard(tmp_path: Path) -> None:
    class Refused(Fickle):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            raise JudgeError("no such model")

    judge = Refused()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    early.put(SHARDS[0][1])
    early.join()
    with pytest.raises(JudgeError, match="no such model"):
        early.put(SHARDS[1][1])


def _made(path: Path) -> Path:
    path.mkdir()
    return path

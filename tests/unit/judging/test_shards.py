"""Judging shard by shard: what is kept, what is asked again, when it stops."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError, JudgingStopped
from iterdpo.judging.judge import JudgeBase, NamedJudge
from iterdpo.judging.shards import RETRY, EarlyJudge, judge_key, judge_shards, read_judgments
from iterdpo.run.rundir import write_jsonl
from iterdpo.testing import make_group
from iterdpo.types import CompletionGroup, Judgment


class Fickle(JudgeBase):
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


def named(judge: JudgeBase, **limits: Any) -> NamedJudge:
    return NamedJudge("train_judge", "fickle", "1", lambda: judge, **limits)


def judged(judge: JudgeBase, directory: Path, *, early: Path | None = None, **limits: Any) -> list[Judgment]:
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
    tmp_path: Path, limits: dict[str, Any]
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
    assert [j.scores for j in read_judgments(tmp_path)] == [[1.0, 2.0]] * 4


def test_abstentions_by_design_use_up_no_budget_and_are_not_asked_again(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_abstained": 0.0, "by_design": ("down",)}
    judged(Fickle("a", "c"), tmp_path, **limits)
    (tmp_path / RETRY).touch()
    mended = Fickle()
    assert [j.scores for j in judged(mended, tmp_path, **limits)][:2] == [[None, 2.0], [1.0, 2.0]]
    assert mended.asked == []


class Ahead(Fickle):
    """Answers for a group when it has taken the one `lead` behind it. `events` lists what it took and answered."""

    ahead = True

    def __init__(self, *broken: str, lead: int = 3) -> None:
        super().__init__(*broken)
        self.lead = lead
        self.events: list[str] = []

    def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
        taken: list[CompletionGroup] = []
        try:
            for group in groups:
                self.events.append(f"took {group.prompt.content}")
                taken.append(group)
                if len(taken) == self.lead:
                    yield self.judge([taken.pop(0)])[0]
            for group in taken:
                yield self.judge([group])[0]
        finally:
            self.events.append("closed")


def test_a_judge_that_may_be_ahead_takes_groups_of_the_next_shard_before_it_has_answered_for_this_one(
    tmp_path: Path,
) -> None:
    judge = Ahead()
    seen: list[int] = []
    judge_shards(
        named(judge),
        lambda: judge,
        SHARDS,
        tmp_path,
        total=8,
        on_shard=lambda fresh: seen.append(len(judge.events)),
    )
    assert [j.scores for j in read_judgments(tmp_path)] == [[1.0, 2.0]] * 4
    assert judge.events == ["took 1", "took 2", "took 3", "took 4", "closed"]
    assert seen == [4, 4]  # the first shard was written as soon as it was whole


@pytest.mark.parametrize("there", [[0], [1], [0, 1], []])
def test_a_judge_that_may_be_ahead_is_asked_for_what_is_missing_alone(tmp_path: Path, there: list[int]) -> None:
    judged(Fickle(), tmp_path)
    for number in {0, 1} - set(there):
        (tmp_path / SHARDS[number][0]).unlink()
    judge = Ahead()
    assert [j.prompt_id for j in judged(judge, tmp_path)] == [g.prompt.id for _, groups in SHARDS for g in groups]
    assert judge.asked == [str(g.prompt.content) for n in {0, 1} - set(there) for g in SHARDS[n][1]]


@pytest.mark.parametrize("judge", [Fickle(), Ahead()])
def test_a_shard_that_is_there_between_two_that_are_not_keeps_its_judgments(tmp_path: Path, judge: Fickle) -> None:
    shards = [(f"shard-{n:04d}.jsonl", [make_group(str(n), ["a" * (n + 1)])]) for n in range(3)]
    write_jsonl(tmp_path / shards[1][0], [Judgment(shards[1][1][0].prompt.id, [7.0], [None]).to_json()])
    found = judge_shards(named(judge), lambda: judge, shards, tmp_path, total=3)
    assert [j.scores for j in found] == [[1.0], [7.0], [3.0]]
    assert judge.asked == ["0", "2"]


def test_a_judge_that_may_be_ahead_is_ended_where_the_budget_stops_the_stage_and_asked_again_for_what_abstained(
    tmp_path: Path,
) -> None:
    broken = Ahead("a", "e", lead=1)
    with pytest.raises(JudgingStopped):
        judged(broken, tmp_path, max_abstained=0.1)
    assert broken.events == ["took 1", "took 2", "closed"]
    judged(Ahead("e"), tmp_path, max_abstained=0.2)
    (tmp_path / RETRY).touch()
    mended = Ahead()
    assert [j.scores for j in judged(mended, tmp_path)] == [[1.0, 2.0]] * 4
    assert mended.asked == ["4"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda answers: answers[:-1], "no judgments for the last groups"),
        (lambda answers: [*answers, answers[0]], "more judgments than it has taken groups"),
        (lambda answers: answers[::-1], "must keep the order of the groups"),
    ],
)
def test_a_judge_that_may_be_ahead_is_held_to_the_contract(tmp_path: Path, wrong: Any, message: str) -> None:
    class Wrong(Fickle):
        ahead = True

        def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
            yield from wrong(self.judge(list(groups)))

    with pytest.raises(JudgeError, match=message):
        judged(Wrong(), tmp_path)


def test_a_judge_that_stops_taking_groups_is_an_error(tmp_path: Path) -> None:
    class Lazy(Fickle):
        ahead = True

        def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
            yield from (self.judge([group])[0] for _, group in zip(range(2), groups, strict=False))

    with pytest.raises(JudgeError, match="no judgments for the last groups"):
        judged(Lazy(), tmp_path)


def test_a_budget_that_known_judgments_exceed_stops_before_the_judge_is_loaded(tmp_path: Path) -> None:
    judged(Fickle("a", "x"), tmp_path)
    (tmp_path / SHARDS[1][0]).unlink()
    judge = Ahead()
    with pytest.raises(JudgingStopped):
        judged(judge, tmp_path, max_abstained=0.1)
    assert judge.events == []


def test_a_shard_that_cannot_be_read_costs_nothing_of_those_before_it(tmp_path: Path) -> None:
    def shards() -> Iterator[tuple[str, list[CompletionGroup]]]:
        yield SHARDS[0]
        raise ValueError("shard-0001.jsonl, line 3")

    judge = Fickle()
    with pytest.raises(ValueError, match="line 3"):
        judge_shards(named(judge), lambda: judge, shards(), tmp_path, total=8)
    assert len(read_judgments(tmp_path)) == 2


def test_shards_that_wait_are_judged_early_in_one_go(tmp_path: Path) -> None:
    begin = threading.Event()

    class Waits(Ahead):
        def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
            begin.wait()
            yield from super().judge_each(groups)

    judge = Waits()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    for _, groups in SHARDS:
        early.put(groups)
    begin.set()
    early.join()
    assert judge.events == ["took 1", "took 2", "took 3", "took 4", "closed"]
    assert [j.scores for j in judged(Fickle("a"), _made(tmp_path / "step"), early=tmp_path / "early")] == [
        [1.0, 2.0]
    ] * 4


def test_an_early_judge_that_is_cancelled_ends_with_the_shard_that_it_is_at(tmp_path: Path) -> None:
    begin = threading.Event()

    class Cancels(Ahead):
        def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
            begin.wait()
            for judgment in super().judge_each(groups):
                early.cancel()
                yield judgment

    judge = Cancels()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    for _, groups in SHARDS:
        early.put(groups)
    begin.set()
    early.join()
    assert judge.events[:3] == ["took 1", "took 2", "took 3"]
    assert judge.asked == ["1", "2"]


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
    once_more = Fickle()  # the run was killed before the stage was done
    assert judged(once_more, step, early=tmp_path / "early", max_abstained=0.1) == again
    assert once_more.asked == []


def test_what_another_judge_judged_early_is_not(tmp_path: Path) -> None:
    judge = Fickle()
    other = NamedJudge("train_judge", "fickle", "2", lambda: judge)
    early = EarlyJudge(other, judge, tmp_path / "early")
    early.put(SHARDS[0][1])
    early.join()
    rest = Fickle()
    judged(rest, _made(tmp_path / "step"), early=tmp_path / "early")
    assert rest.asked == ["1", "2", "3", "4"]


def test_what_was_judged_early_of_other_completions_is_not_taken_over(tmp_path: Path) -> None:
    judge = Fickle()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    early.put([make_group("1", ["another", "bb"]), make_group("2", ["x", "yy"])])
    early.join()
    rest = Fickle()
    assert judged(rest, _made(tmp_path / "step"), early=tmp_path / "early")[0].scores == [1.0, 2.0]
    assert rest.asked == ["1", "2", "3", "4"]


def test_a_judge_is_the_same_wherever_its_file_lies() -> None:
    keys = [judge_key(NamedJudge("train_judge", f"{place}my.py:f", "1", Fickle)) for place in ("", "here/", "../")]
    assert keys == [{"use": "my.py:f", "version": "1"}] * 3


def test_progress_hears_of_every_shard_judged_now_or_before(tmp_path: Path) -> None:
    judged(Fickle(), tmp_path)
    (tmp_path / SHARDS[0][0]).unlink()
    heard: list[int] = []
    judge = Fickle()
    judge_shards(
        named(judge), lambda: judge, SHARDS, tmp_path, total=8, on_shard=lambda fresh: heard.append(len(fresh))
    )
    assert (heard, judge.asked) == ([2, 2], ["1", "2"])


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


class Failing(Fickle):
    """Raises `error` the first time that it is asked."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().judge(groups)


def test_an_interruption_of_the_early_judge_comes_with_the_next_shard(tmp_path: Path) -> None:
    judge = Failing(KeyboardInterrupt("cancelled"))
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    early.put(SHARDS[0][1])
    early.join()
    with pytest.raises(KeyboardInterrupt, match="cancelled"):
        early.put(SHARDS[1][1])


def test_any_other_early_error_is_left_to_the_stage(tmp_path: Path) -> None:
    judge = Failing(OSError("no route"))
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    for _, groups in SHARDS:
        early.put(groups)
    early.join()
    early.put(SHARDS[0][1])  # raises nothing
    assert judge.asked == []  # after the error, nothing more
    rest = Fickle()
    judged(rest, _made(tmp_path / "step"), early=tmp_path / "early")
    assert rest.asked == ["1", "2", "3", "4"]


def test_what_was_judged_early_is_not_judged_early_again(tmp_path: Path) -> None:
    judge = Fickle()
    for _ in range(2):  # the run was killed between the two
        early = EarlyJudge(named(judge), judge, tmp_path / "early")
        early.put(SHARDS[0][1])
        early.join()
    assert judge.asked == ["1", "2"]


def test_a_cancelled_early_judge_begins_no_further_shard(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Fickle):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            begun.set()
            assert go_on.wait(10)
            return super().judge(groups)

    judge = Slow()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    for _, groups in SHARDS:
        early.put(groups)
    assert begun.wait(10)
    early.cancel()
    go_on.set()
    early.join()
    assert judge.asked == ["1", "2"]


WHERE = ContextVar("where", default="nowhere")


def test_the_early_judge_has_the_context_of_the_caller(tmp_path: Path) -> None:
    seen: list[str] = []

    class Looking(Fickle):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            seen.append(WHERE.get())
            return super().judge(groups)

    WHERE.set("in a flow run")
    judge = Looking()
    early = EarlyJudge(named(judge), judge, tmp_path / "early")
    early.put(SHARDS[0][1])
    early.join()
    assert seen == ["in a flow run"]


def _made(path: Path) -> Path:
    path.mkdir()
    return path

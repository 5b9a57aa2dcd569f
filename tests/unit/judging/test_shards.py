"""Judging shard by shard, and beside sampling: what is kept, what is asked again, when it stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import DataError, JudgeError, JudgingStopped
from iterdpo.judging.judge import JudgeBase, NamedJudge, RunJudge
from iterdpo.judging.shards import RETRY, StreamingJudge, completion_shards, judge_shards
from iterdpo.run.artifacts import read_judgments, write_completion_shard, write_judgment_shard
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
    ("shard-000000", [make_group("1", ["a", "bb"]), make_group("2", ["x", "yy"])]),
    ("shard-000001", [make_group("3", ["c", "dd"]), make_group("4", ["e", "ff"])]),
]


@pytest.fixture
def sampled(tmp_path: Path) -> list[Path]:
    """`SHARDS` as files of completions."""
    directory = tmp_path / "completions"
    directory.mkdir()
    for name, groups in SHARDS:
        write_completion_shard(directory / f"{name}.parquet", groups)
    return sorted(directory.glob("shard-*"))


def within_run(judge: JudgeBase, *, version: str = "1", **settings: Any) -> RunJudge:
    named = NamedJudge("train_judge", "fickle", version, lambda: judge, **settings)
    return RunJudge(named, Path(), lambda message: nullcontext())


def judged(
    judge: JudgeBase, directory: Path, *, streamed: Callable[[str], Path] | None = None, **limits: Any
) -> list[Judgment]:
    """What lies in `directory` once the shards have been judged."""
    directory.mkdir(exist_ok=True)
    judge_shards(within_run(judge, **limits), SHARDS, directory, total=8, streamed=streamed)
    return list(read_judgments(directory))


def streaming_judge(judge: JudgeBase, tmp_path: Path, **settings: Any) -> StreamingJudge:
    """One that works, whatever the judge needs."""
    streaming = StreamingJudge(within_run(judge, stream=True, **settings), tmp_path / "streaming")
    streaming.start()
    return streaming


def left_by(streaming: StreamingJudge, sampled: list[Path]) -> Callable[[str], Path]:
    return lambda name: streaming.path_of(sampled[0].with_name(f"{name}.parquet"))


def test_a_shard_that_is_there_is_not_judged_again(tmp_path: Path) -> None:
    first = judged(Fickle(), tmp_path)
    again = Fickle()
    assert judged(again, tmp_path) == first
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


def test_abstentions_by_design_use_up_no_budget_and_are_not_asked_again(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_abstained": 0.0, "expected_abstentions": ("down",)}
    judged(Fickle("a", "c"), tmp_path, **limits)
    (tmp_path / RETRY).touch()
    mended = Fickle()
    assert [j.scores for j in judged(mended, tmp_path, **limits)][:2] == [[None, 2.0], [1.0, 2.0]]
    assert mended.asked == []


class Ahead(Fickle):
    """Answers for a group when it has taken the one `lead` after it. `events` lists what it took and answered."""

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


def test_a_judge_that_may_be_ahead_takes_groups_of_the_next_shard_before_it_answers(tmp_path: Path) -> None:
    judge = Ahead()
    seen: list[int] = []
    judge_shards(
        within_run(judge),
        SHARDS,
        tmp_path,
        total=8,
        on_shard=lambda groups, judgments: seen.append(len(judge.events)),
    )
    assert [j.scores for j in read_judgments(tmp_path)] == [[1.0, 2.0]] * 4
    assert judge.events == ["took 1", "took 2", "took 3", "took 4", "closed"]
    assert seen == [4, 4]  # the first shard was written as soon as it was whole


@pytest.mark.parametrize("there", [[0], [1], [0, 1], []])
def test_a_judge_that_may_be_ahead_is_asked_for_what_is_missing_alone(tmp_path: Path, there: list[int]) -> None:
    judged(Fickle(), tmp_path)
    for number in {0, 1} - set(there):
        (tmp_path / f"{SHARDS[number][0]}.jsonl").unlink()
    judge = Ahead()
    assert [j.prompt_id for j in judged(judge, tmp_path)] == [g.prompt.id for _, groups in SHARDS for g in groups]
    assert judge.asked == [str(g.prompt.content) for n in {0, 1} - set(there) for g in SHARDS[n][1]]


@pytest.mark.parametrize("judge", [Fickle(), Ahead()])
def test_a_shard_that_is_there_between_two_that_are_not_keeps_its_judgments(tmp_path: Path, judge: Fickle) -> None:
    shards = [(f"shard-{n:06d}", [make_group(str(n), ["a" * (n + 1)])]) for n in range(3)]
    write_judgment_shard(tmp_path / f"{shards[1][0]}.jsonl", [Judgment(shards[1][1][0].prompt.id, [7.0], [None])])
    judge_shards(within_run(judge), shards, tmp_path, total=3)
    assert [j.scores for j in read_judgments(tmp_path)] == [[1.0], [7.0], [3.0]]
    assert judge.asked == ["0", "2"]


def test_a_judge_that_may_be_ahead_is_ended_if_the_budget_stops_the_stage(tmp_path: Path) -> None:
    broken = Ahead("a", "e", lead=1)
    with pytest.raises(JudgingStopped):
        judged(broken, tmp_path, max_abstained=0.1)
    assert broken.events == ["took 1", "took 2", "closed"]


def test_a_judge_that_may_be_ahead_is_asked_again_for_what_abstained(tmp_path: Path) -> None:
    with pytest.raises(JudgingStopped):
        judged(Ahead("a", "e", lead=1), tmp_path, max_abstained=0.1)
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
    (tmp_path / f"{SHARDS[1][0]}.jsonl").unlink()
    loaded: list[JudgeBase] = []
    judge = RunJudge(
        NamedJudge("train_judge", "fickle", "1", lambda: loaded.append(Ahead()) or loaded[-1], max_abstained=0.1),
        tmp_path,
        lambda message: nullcontext(),
    )
    with pytest.raises(JudgingStopped):
        judge_shards(judge, SHARDS, tmp_path, total=8)
    assert loaded == []


def test_a_shard_that_cannot_be_read_costs_nothing_of_those_before_it(tmp_path: Path, sampled: list[Path]) -> None:
    sampled[1].write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"shard-000001\.parquet: damaged"):
        judge_shards(within_run(Fickle()), completion_shards(sampled[0].parent), tmp_path, total=8)
    assert len(list(read_judgments(tmp_path))) == 2


def test_judgments_of_files_are_those_of_their_groups_under_the_same_names(tmp_path: Path, sampled: list[Path]) -> None:
    judge_shards(within_run(Fickle()), completion_shards(sampled[0].parent), tmp_path, total=8)
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == ["shard-000000.jsonl", "shard-000001.jsonl"]
    assert list(read_judgments(tmp_path)) == judged(Fickle(), tmp_path / "of groups")


def test_progress_hears_of_every_shard_judged_now_or_before(tmp_path: Path) -> None:
    judged(Fickle(), tmp_path)
    (tmp_path / f"{SHARDS[0][0]}.jsonl").unlink()
    heard: list[tuple[Any, Any]] = []
    judge = Fickle()
    judge_shards(
        within_run(judge),
        SHARDS,
        tmp_path,
        total=8,
        on_shard=lambda groups, judgments: heard.append((groups, judgments)),
    )
    assert [[g.prompt.content for g in groups] for groups, _ in heard] == [["1", "2"], ["3", "4"]]
    assert [[j.scores for j in judgments] for _, judgments in heard] == [[[1.0, 2.0]] * 2] * 2
    assert judge.asked == ["1", "2"]


# Beside sampling


@pytest.mark.parametrize(
    ("stream", "needs_device", "starts"),
    [(None, True, False), (None, False, True), (False, False, False), (True, True, True)],
)
def test_judging_streams_if_the_judge_needs_no_device_or_the_configuration_says_so(
    tmp_path: Path, sampled: list[Path], stream: bool | None, needs_device: bool, starts: bool
) -> None:
    judge = Fickle()
    judge.needs_device = needs_device
    streaming = StreamingJudge(within_run(judge, stream=stream), tmp_path / "streaming")
    streaming.start()
    streaming.put(sampled[0])
    assert (streaming.join() is not None) == starts
    assert judge.asked == (["1", "2"] if starts else [])
    assert streaming.path_of(sampled[0]).exists() == starts


def test_a_judge_that_the_configuration_keeps_from_streaming_is_not_loaded(tmp_path: Path) -> None:
    def load() -> JudgeBase:
        raise AssertionError("loaded")

    judge = RunJudge(NamedJudge("train_judge", "fickle", "1", load, stream=False), tmp_path, lambda m: nullcontext())
    streaming = StreamingJudge(judge, tmp_path / "streaming")
    streaming.start()
    assert streaming.join() is None


def test_shards_that_wait_are_judged_in_one_go(tmp_path: Path, sampled: list[Path]) -> None:
    begin = threading.Event()

    class Waits(Ahead):
        def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
            begin.wait()
            yield from super().judge_each(groups)

    judge = Waits()
    streaming = streaming_judge(judge, tmp_path)
    for shard in sampled:
        streaming.put(shard)
    begin.set()
    streaming.join()
    assert judge.events == ["took 1", "took 2", "took 3", "took 4", "closed"]
    found = judged(Fickle("a"), tmp_path / "step", streamed=left_by(streaming, sampled))
    assert [j.scores for j in found] == [[1.0, 2.0]] * 4


def test_shards_that_wait_are_found_after_sampling_has_ended_and_its_step_was_sealed(
    tmp_path: Path, sampled: list[Path]
) -> None:
    sealed, begin = threading.Event(), threading.Event()

    class Waits(Fickle):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            begin.set()
            assert sealed.wait(10)
            return super().judge(groups)

    partial = tmp_path / "round" / "completions.partial"
    partial.mkdir(parents=True)
    judge = Waits()
    streaming = streaming_judge(judge, tmp_path)
    for shard in sampled:
        streaming.put(shard.rename(partial / shard.name))
    assert begin.wait(10)
    partial.rename(partial.with_suffix(""))
    sealed.set()
    streaming.join()
    assert judge.asked == ["1", "2", "3", "4"]


def test_a_streaming_judge_that_is_cancelled_ends_with_the_shard_that_it_is_at(
    tmp_path: Path, sampled: list[Path]
) -> None:
    begin = threading.Event()

    class Cancels(Ahead):
        def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
            begin.wait()
            for judgment in super().judge_each(groups):
                streaming.cancel()
                yield judgment

    judge = Cancels()
    streaming = streaming_judge(judge, tmp_path)
    for shard in sampled:
        streaming.put(shard)
    begin.set()
    streaming.join()
    assert judge.events[:3] == ["took 1", "took 2", "took 3"]
    assert judge.asked == ["1", "2"]


def test_what_was_judged_beside_sampling_is_taken_over(tmp_path: Path, sampled: list[Path]) -> None:
    streaming = streaming_judge(Fickle(), tmp_path)
    streaming.put(sampled[0])
    seconds = streaming.join()
    assert seconds is not None
    assert seconds > 0
    rest = Fickle()
    found = judged(rest, tmp_path / "step", streamed=left_by(streaming, sampled))
    assert [j.scores for j in found] == [[1.0, 2.0]] * 4
    assert rest.asked == ["3", "4"]
    streaming.clear()
    assert not (tmp_path / "streaming").exists()


def test_what_abstained_beside_sampling_is_asked_again_once_the_stage_had_stopped(
    tmp_path: Path, sampled: list[Path]
) -> None:
    broken = Fickle("a", "x", "c", "e")
    streaming = streaming_judge(broken, tmp_path)
    for shard in sampled:
        streaming.put(shard)
    streaming.join()
    streamed, step = left_by(streaming, sampled), tmp_path / "step"
    with pytest.raises(JudgingStopped):
        judged(broken, step, streamed=streamed, max_abstained=0.1)
    mended = Fickle()
    again = judged(mended, step, streamed=streamed, max_abstained=0.1)
    assert [j.scores for j in again] == [[1.0, 2.0]] * 4
    assert mended.asked == ["1", "2", "3", "4"]
    once_more = Fickle()  # the run was killed before the stage was done
    assert judged(once_more, step, streamed=streamed, max_abstained=0.1) == again
    assert once_more.asked == []


def test_what_another_judge_judged_beside_sampling_is_not_taken_over(tmp_path: Path, sampled: list[Path]) -> None:
    other = streaming_judge(Fickle(), tmp_path, version="2")
    other.put(sampled[0])
    other.join()
    own = StreamingJudge(within_run(Fickle()), tmp_path / "streaming")
    assert own.path_of(sampled[0]) != other.path_of(sampled[0])
    rest = Fickle()
    judged(rest, tmp_path / "step", streamed=left_by(own, sampled))
    assert rest.asked == ["1", "2", "3", "4"]


def test_what_was_judged_of_other_completions_is_not_taken_over(tmp_path: Path, sampled: list[Path]) -> None:
    before = sampled[0].read_bytes()
    write_completion_shard(sampled[0], [make_group("1", ["another", "bb"]), make_group("2", ["x", "yy"])])
    streaming = streaming_judge(Fickle(), tmp_path)
    streaming.put(sampled[0])
    streaming.join()
    sampled[0].write_bytes(before)
    rest = Fickle()
    assert judged(rest, tmp_path / "step", streamed=left_by(streaming, sampled))[0].scores == [1.0, 2.0]
    assert rest.asked == ["1", "2", "3", "4"]


def test_an_error_beside_sampling_that_is_the_users_to_mend_comes_with_the_next_shard(
    tmp_path: Path, sampled: list[Path]
) -> None:
    streaming = streaming_judge(Failing(JudgeError("no such model")), tmp_path)
    streaming.put(sampled[0])
    streaming.join()
    with pytest.raises(JudgeError, match="no such model"):
        streaming.put(sampled[1])


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


def test_an_interruption_of_the_streaming_judge_comes_with_the_next_shard(tmp_path: Path, sampled: list[Path]) -> None:
    streaming = streaming_judge(Failing(KeyboardInterrupt("cancelled")), tmp_path)
    streaming.put(sampled[0])
    streaming.join()
    with pytest.raises(KeyboardInterrupt, match="cancelled"):
        streaming.put(sampled[1])


def test_any_other_error_beside_sampling_is_left_to_the_stage(tmp_path: Path, sampled: list[Path]) -> None:
    judge = Failing(OSError("no route"))
    streaming = streaming_judge(judge, tmp_path)
    for shard in sampled:
        streaming.put(shard)
    streaming.join()
    streaming.put(sampled[0])  # raises nothing
    assert judge.asked == []  # after the error, nothing more
    rest = Fickle()
    judged(rest, tmp_path / "step", streamed=left_by(streaming, sampled))
    assert rest.asked == ["1", "2", "3", "4"]


def test_what_was_judged_beside_sampling_is_not_judged_there_again(tmp_path: Path, sampled: list[Path]) -> None:
    judge = Fickle()
    for _ in range(2):  # the run was killed between the two
        streaming = streaming_judge(judge, tmp_path)
        streaming.put(sampled[0])
        streaming.join()
    assert judge.asked == ["1", "2"]


def test_a_cancelled_streaming_judge_begins_no_further_shard(tmp_path: Path, sampled: list[Path]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Fickle):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            begun.set()
            assert go_on.wait(10)
            return super().judge(groups)

    judge = Slow()
    streaming = streaming_judge(judge, tmp_path)
    for shard in sampled:
        streaming.put(shard)
    assert begun.wait(10)
    streaming.cancel()
    go_on.set()
    streaming.join()
    assert judge.asked == ["1", "2"]


WHERE = ContextVar("where", default="nowhere")


def test_the_streaming_judge_has_the_context_of_the_caller(tmp_path: Path, sampled: list[Path]) -> None:
    seen: list[str] = []

    class Looking(Fickle):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            seen.append(WHERE.get())
            return super().judge(groups)

    WHERE.set("in a flow run")
    streaming = streaming_judge(Looking(), tmp_path)
    streaming.put(sampled[0])
    streaming.join()
    assert seen == ["in a flow run"]

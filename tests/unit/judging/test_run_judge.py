"""A judge within a run: when it is loaded, what it is told, what it has used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from iterdpo.judging.judge import JudgeBase, NamedJudge, Waiting
from iterdpo.judging.run_judge import RunJudge
from iterdpo.types import CompletionGroup, Judgment


class Noting(JudgeBase):
    """`told` lists what it was told, `calls` what it says that it has used."""

    name = "noting"

    def __init__(self) -> None:
        self.told: list[object] = []
        self.calls = 0

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return []

    def usage(self) -> dict[str, float]:
        return {"calls": self.calls}

    def attach(self, run_dir: Path, waiting: Waiting) -> None:
        self.told.append((run_dir, waiting))

    def begin_stage(self) -> None:
        self.told.append("begin_stage")

    def close(self) -> None:
        self.told.append("close")


WAITING: Waiting = lambda message: nullcontext()  # noqa: E731
RUN_DIR = Path("run")


@pytest.fixture
def loaded() -> list[Noting]:
    """The judges that were loaded."""
    return []


@pytest.fixture
def judge(loaded: list[Noting]) -> RunJudge:
    def load() -> JudgeBase:
        loaded.append(Noting())
        return loaded[-1]

    return RunJudge(NamedJudge("heldout_judge", "noting", "1", load), RUN_DIR, WAITING)


def test_what_names_a_judge_loads_nothing(judge: RunJudge, loaded: list[Noting]) -> None:
    assert (judge.role, judge.key) == ("heldout_judge", {"use": "noting", "version": "1"})
    judge.release()
    assert loaded == []


def test_a_judge_is_loaded_once_and_told_of_the_run(judge: RunJudge, loaded: list[Noting]) -> None:
    assert judge.load() is judge.load() is loaded[0]
    judge.begin_stage()
    judge.release()
    judge.load()
    assert loaded[0].told == [(RUN_DIR, WAITING), "begin_stage", "close"]
    assert len(loaded) == 1


def test_what_a_judge_used_before_a_stage_is_not_counted_in_it(judge: RunJudge, loaded: list[Noting]) -> None:
    judge.load()
    loaded[0].calls = 24
    judge.begin_stage()
    loaded[0].calls = 72
    assert judge.used() == {"calls": 48}
    assert judge.used() == {"calls": 0}


@pytest.mark.parametrize("place", ["", "here/", "../"])
def test_a_judge_is_the_same_wherever_its_file_lies(place: str) -> None:
    named = NamedJudge("train_judge", f"{place}my.py:f", "1", Noting)
    assert RunJudge(named, RUN_DIR, WAITING).key == {"use": "my.py:f", "version": "1"}

"""The contract between a judge and everything downstream of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase, NamedJudge, RunJudge, Waiting, checked_judgments, judgment_from_scores
from iterdpo.testing import make_group
from iterdpo.types import CompletionGroup, Judgment

GROUP = make_group("2+2?", ["4", "5"])


class Answers(JudgeBase):
    """A judge that gives prepared judgments."""

    name = "answers"
    version = "1"

    def __init__(self, *judgments: Judgment) -> None:
        self.judgments = list(judgments)

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return self.judgments


def test_a_judge_has_a_default_for_everything_but_its_name_and_its_judgments(tmp_path: Path) -> None:
    judge = Answers(Judgment(GROUP.prompt.id, [1.0, 0.0], [None, None]))
    assert (judge.comparative, judge.needs_device, judge.ahead, judge.repeat) == (False, True, False, 0)
    judge.attach(tmp_path, lambda message: nullcontext())
    judge.begin_stage()
    assert list(judge.judge_each([GROUP])) == judge.judgments
    assert judge.usage() == {}
    judge.close()
    assert list(judge.parts()) == [judge]
    with pytest.raises(TypeError, match="abstract"):
        JudgeBase()  # type: ignore[abstract]


def test_good_judgments_pass_unchanged() -> None:
    judgment = Judgment(GROUP.prompt.id, [1.0, None], [None, "timed out"])
    assert checked_judgments(Answers(judgment), [GROUP]) == [judgment]


@pytest.mark.parametrize(
    ("judgments", "complaint"),
    [
        ([], "returned 0 judgments for 1 groups"),
        ([Judgment("p-other", [1.0, 2.0], [None, None])], "answered for prompt 'p-other'"),
        ([Judgment(GROUP.prompt.id, [1.0], [None])], "returned 1 scores and 1 abstentions for 2 completions"),
        ([Judgment(GROUP.prompt.id, [1.0, None], [None, None])], "gave neither score nor reason"),
        ([Judgment(GROUP.prompt.id, [1.0, None], [None, ""])], "gave neither score nor reason"),
        ([Judgment(GROUP.prompt.id, [1.0, math.nan], [None, None])], "scored nan"),
        ([Judgment(GROUP.prompt.id, [1.0, -math.inf], [None, None])], "scored -inf"),
    ],
)
def test_a_broken_contract_is_named(judgments: list[Judgment], complaint: str) -> None:
    with pytest.raises(JudgeError, match=complaint):
        checked_judgments(Answers(*judgments), [GROUP])


def test_a_judge_that_returns_nothing_is_named() -> None:
    judge = Answers()
    judge.judgments = None  # type: ignore[assignment]
    with pytest.raises(JudgeError, match="judge 'answers' returned nothing for 1 groups"):
        checked_judgments(judge, [GROUP])


def test_numbers_of_every_kind_become_floats() -> None:
    group = make_group("x", ["a", "b", "c", "d"])
    judgment = judgment_from_scores(group, [True, 2, np.float32(0.5), np.array(-3)])
    assert judgment.scores == [1.0, 2.0, 0.5, -3.0]
    assert judgment.abstentions == [None] * 4


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "the judge returned None"),
        (math.nan, "the judge returned nan"),
        (math.inf, "the judge returned inf"),
        ("7", "the judge returned str '7', not a number"),
        ([1.0], "the judge returned list '[1.0]', not a number"),
    ],
)
def test_what_is_no_finite_number_abstains_with_its_reason(raw: object, reason: str) -> None:
    judgment = judgment_from_scores(GROUP, [1.0, raw])
    assert judgment.scores == [1.0, None]
    assert judgment.abstentions == [None, reason]


def test_a_missing_score_is_an_error_and_not_a_guess() -> None:
    with pytest.raises(JudgeError, match="1 scores for 2 completions"):
        judgment_from_scores(GROUP, [1.0])


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

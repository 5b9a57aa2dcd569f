"""What the tests of judges by rule share."""

from __future__ import annotations

from typing import Any

from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.testing import make_group


def scores(judge: Any, *completions: str, **columns: Any) -> list[float | None]:
    assert isinstance(judge, JudgeBase)
    [judgment] = checked_judgments(judge, [make_group("q", completions, **columns)])
    return judgment.scores


def reason(judge: Any, completion: str, **columns: Any) -> str:
    [judgment] = checked_judgments(judge, [make_group("q", [completion], **columns)])
    assert judgment.scores == [None]
    assert judgment.abstentions[0]
    return judgment.abstentions[0]

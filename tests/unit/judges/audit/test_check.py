"""What is kept of a judge's verdicts on labelled pairs, also if it ends early."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from iterdpo.errors import UserError
from iterdpo.types import Comparison, CompletionGroup, Judgment
from judges.audit.check import check_judge_on, interpret
from judges.audit.labelled import LabelledGroup
from tests.unit.judges.audit.faulty_judges import Scores, labelled


def test_a_soft_comparing_judges_probability_is_the_mean_over_the_orders() -> None:
    # The rejected is completion 0: the chosen wins with 0.7 where it is shown second, with 0.9 where it is shown first.
    comparisons = [Comparison(0, 1, "second", probability=0.3), Comparison(1, 0, "first", probability=0.9)]
    found = interpret(Judgment("p-1", [0.2, 0.8], [None, None], comparisons), chosen=1, rejected=0)
    assert found.verdict == "chosen"
    assert found.scores == (0.8, 0.2)
    assert found.probability == pytest.approx(0.8)
    assert [(s.chosen_first, s.verdict) for s in found.shown] == [(False, "chosen"), (True, "chosen")]


def test_a_judge_that_gives_up_half_way_leaves_what_it_has_said() -> None:
    class Mortal(Scores):
        calls = 0

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            self.calls += 1
            if self.calls == 3:
                raise UserError("the endpoint is gone")
            return super().judge(groups)

    check = check_judge_on(Mortal(lambda g, rng: (1.0, 0.0)), labelled(500))
    assert len(check.pairs) == 128
    assert str(check.turn.stopped) == "the endpoint is gone"
    with pytest.raises(UserError, match="gone"):
        check_judge_on(Mortal(lambda g, rng: (1.0, 0.0)), iter_raising())


def iter_raising() -> Iterator[LabelledGroup]:
    raise UserError("gone before the first block")
    yield


def test_the_mistakes_that_are_kept_are_those_it_is_surest_of() -> None:
    def score(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        gap = float(group.prompt.id.removeprefix("p-")) / 10  # surer with each row, and always wrong
        return (0.0, gap) if group.completions[0].text.startswith("good") else (gap, 0.0)

    check = check_judge_on(Scores(score), labelled(200))
    assert [m.labelled.row for m in check.mistakes] == list(range(200, 188, -1))

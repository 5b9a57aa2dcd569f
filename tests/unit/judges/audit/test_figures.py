"""What is said of a judge is true: figures of judges whose faults are known by construction."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from iterdpo.judging.judge import JudgeBase
from iterdpo.types import CompletionGroup, Judgment
from judges.audit.check import check_judge_on
from judges.audit.figures import measure
from tests.unit.judges.audit.faulty_judges import PAIRS, Faulty, Scores, holds, labelled


def test_a_comparing_judges_accuracy_flips_and_biases_are_what_it_was_built_with() -> None:
    right_longer, right_shorter, blind, longer = 0.9, 0.6, 0.2, 0.4
    judge = Faulty(right={True: right_longer, False: right_shorter}, blind=blind)
    check = check_judge_on(judge, labelled(PAIRS, longer=longer, subsets=["math", "code"]), seed=3)
    report = measure(check.pairs, seed=3, samples=300)
    found = report["figures"]
    right = longer * right_longer + (1 - longer) * right_shorter  # 0.72
    # Shown with what it holds for the better one first, it says so, blind or not; in the other order it does unless
    # it is blind. So it contradicts itself with P = blind, which is a tie, whatever it knows.
    truth = {
        "flip_rate": blind,
        "tie_rate": blind,
        "accuracy_agreeing": right,
        "accuracy_decided": right,
        "accuracy": (1 - blind) * right + blind / 2,
        "first_position": (1 + blind) / 2,
        "position_bias": blind / 2,
        "longer_is_better": longer,
        "longer_wins": longer * right_longer + (1 - longer) * (1 - right_shorter),
        "length_bias": longer * right_longer + (1 - longer) * (1 - right_shorter) - longer,
        "accuracy_chosen_longer": right_longer,
        "accuracy_chosen_shorter": right_shorter,
        "coverage": 1.0,
    }
    wrong = {name: (found[name], value) for name, value in truth.items() if not holds(found[name], value)}
    assert not wrong
    assert found["first_position"].n > PAIRS  # single comparisons, two a pair
    assert found["accuracy"].high - found["accuracy"].low < 0.04
    assert report["subsets"].keys() == {"code", "math"}
    assert sum(s["pairs"] for s in report["subsets"].values()) == PAIRS
    assert all(holds(s["accuracy_decided"], right) for s in report["subsets"].values())


def test_a_judge_that_reads_both_at_once_is_shown_them_in_both_orders() -> None:
    blind, right = 0.3, 0.8
    judge = Faulty(right={True: right, False: right}, blind=blind, compares=False)
    found = measure(check_judge_on(judge, labelled(PAIRS), seed=1).pairs, samples=50)["figures"]
    assert holds(found["flip_rate"], blind)
    assert holds(found["first_index"], (1 + blind) / 2)
    assert holds(found["accuracy"], (1 - blind) * right + blind / 2)  # blind in a random order: a coin
    assert found["first_position"].value is None  # it makes no single comparisons
    assert found["first_index"].n == 2 * PAIRS


def test_one_that_always_takes_the_first_of_the_group_is_noticed() -> None:
    found = measure(check_judge_on(Scores(lambda g, rng: (1.0, 0.0)), labelled(1_000)).pairs, samples=50)["figures"]
    assert found["first_index"].value == 1.0
    assert holds(found["accuracy"], 0.5)
    assert found["flip_rate"].value is None  # scores one by one, as far as it says: not shown in both orders


def test_an_overconfident_judges_calibration_is_what_it_was_built_with() -> None:
    gaps, temperature = (0.3, 0.9, 1.6, 2.4), 2.0  # differences of score; their sigmoids lie in different bins

    def score(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        gap = rng.choice(gaps)
        right = rng.random() < 1 / (1 + math.exp(-gap / temperature))
        good = group.completions[0].text.startswith("good")
        return (gap, 0.0) if good == right else (0.0, gap)

    report = measure(check_judge_on(Scores(score), labelled(PAIRS)).pairs, samples=500)
    found = report["figures"]
    claimed = [1 / (1 + math.exp(-gap)) for gap in gaps]
    true = [1 / (1 + math.exp(-gap / temperature)) for gap in gaps]
    ece = sum(c - t for c, t in zip(claimed, true, strict=True)) / len(gaps)
    brier = sum(t * (1 - c) ** 2 + (1 - t) * c**2 for c, t in zip(claimed, true, strict=True)) / len(gaps)
    assert holds(found["ece"], ece)
    assert holds(found["brier"], brier)
    assert holds(found["accuracy"], sum(true) / len(true))
    assert report["calibration"]["temperature"] == pytest.approx(temperature, rel=0.25)
    assert found["ece_tempered"].value < ece / 2
    assert report["calibration"]["ece_if_calibrated"] < 0.02
    bins = report["reliability"]
    assert [b["confidence"] for b in bins] == pytest.approx(claimed)
    assert all(holds(b["accuracy"], t) for b, t in zip(bins, true, strict=True))


def test_self_consistency_is_what_independent_verdicts_give() -> None:
    right, repeats = 0.8, 3

    class Moody(Scores):
        repeat = 0

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            self.seed = self.repeat
            return super().judge(groups)

    def score(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        good = group.completions[0].text.startswith("good") == (rng.random() < right)
        return (1.0, 0.0) if good else (0.0, 1.0)

    judge = Moody(score)
    found = measure(check_judge_on(judge, labelled(PAIRS), repeats=repeats).pairs, samples=50)["figures"]
    # Of three verdicts all are alike with P = 1 - 3 c (1 - c), and else two of three: 1 - 3c(1-c) + (2/3) 3c(1-c).
    assert holds(found["self_consistency"], 1 - right * (1 - right))
    assert judge.repeat == 0


def test_labelled_ties_count_apart() -> None:
    says_tie = 0.7

    def score(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return (0.0, 0.0) if rng.random() < says_tie else (1.0, 0.0)

    report = measure(check_judge_on(Scores(score), labelled(PAIRS, ties=0.3)).pairs, samples=50)
    found, counts = report["figures"], report["counts"]
    assert holds(found["tie_agreement"], says_tie)
    assert found["tie_agreement"].n == counts["labelled_ties"]
    assert found["accuracy"].n == counts["pairs"] - counts["labelled_ties"]
    assert holds(found["tie_rate"], says_tie)


def test_abstentions_lower_coverage_and_are_counted_by_reason() -> None:
    class Picky(JudgeBase):
        name, version = "picky", "1"

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            said = []
            for n, g in enumerate(groups):
                reason = ("too long", "refused", None, None)[n % 4]
                said.append(Judgment(g.prompt.id, [1.0, 0.0 if reason is None else None], [None, reason]))
            return said

    report = measure(check_judge_on(Picky(), labelled(64)).pairs, samples=50)
    assert report["abstentions"] == {"too long": 16, "refused": 16}
    assert report["figures"]["coverage"].value == 0.5
    assert report["figures"]["accuracy"].n == 32


def test_the_correlation_with_length_is_that_of_the_differences() -> None:
    # The score difference is the length difference with P = 0.75, and its opposite otherwise.
    def score(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        a, b = (len(c.text) for c in group.completions)
        return (a, b) if rng.random() < 0.75 else (b, a)

    found = measure(check_judge_on(Scores(score, seed=1), labelled(PAIRS)).pairs, samples=300)["figures"]
    assert holds(found["length_rank_correlation"], 0.75 - 0.25)  # of two values of equal size: P(same sign) - P(other)
    assert holds(found["longer_wins"], 0.75)

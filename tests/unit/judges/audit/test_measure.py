"""What is said of a judge is true: figures of judges whose faults are known by construction, and the intervals' coverage."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iterdpo.errors import DataError, UserError
from iterdpo.judging.judge import JudgeBase
from iterdpo.run.artifacts import write_completion_shard
from iterdpo.run.rundir import RunDir, write_jsonl
from iterdpo.types import Comparison, Completion, CompletionGroup, Judgment, Prompt
from judges.audit import stats as estimates
from judges.audit.agreement import Sample, compare_judges, measure_agreement, read_samples
from judges.audit.measure import LabelledPair, check_judge_on, look_at, measure, read_labelled
from judges.audit.stats import Estimate
from judges.load import load_judge

PAIRS = 4_000


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def labelled(
    count: int, *, longer: float = 0.5, ties: float = 0.0, subsets: Sequence[str] = (), seed: int = 0
) -> Iterator[LabelledPair]:
    """Pairs whose completions say whether they are the chosen one; the chosen is the longer one with P = `longer`."""
    rng = random.Random(f"pairs {seed}")
    for row in range(1, count + 1):
        long = rng.random() < longer
        chosen, rejected = (
            f"{name} {'x' * (60 if more else 20)}" for name, more in (("good", long), ("evil", not long))
        )
        yield LabelledPair(
            Prompt(f"p-{row}", f"question {row}"),
            [1],
            Completion(chosen, [1], [], "stop"),
            Completion(rejected, [1], [], "stop"),
            tie=rng.random() < ties,
            subset=rng.choice(subsets) if subsets else None,
            row=row,
        )


class Faulty(JudgeBase):
    """Knows the truth of a pair with P = `right` (by whether the better is the longer), and tells it, except that with
    P = `blind` in each single look it names what comes first without reading."""

    name, version, comparative = "faulty", "1", True

    def __init__(self, *, right: dict[bool, float], blind: float, compares: bool = True, seed: int = 0) -> None:
        self.right, self.blind, self.compares, self.seed = right, blind, compares, seed

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [self.judge_one(group) for group in groups]

    def judge_one(self, group: CompletionGroup) -> Judgment:
        texts = [c.text for c in group.completions]
        good = 0 if texts[0].startswith("good") else 1
        knows = (
            random.Random(f"{self.seed} {group.prompt.id}").random()
            < self.right[len(texts[good]) > len(texts[1 - good])]
        )
        better = good if knows else 1 - good

        def verdict(first: int) -> int:
            shown = random.Random(f"{self.seed} {group.prompt.id} {texts[first]}")
            return first if shown.random() < self.blind else better

        if not self.compares:
            won = verdict(0)
            return Judgment(group.prompt.id, [float(won == 0), float(won == 1)], [None, None])
        wins = [verdict(0), verdict(1)]
        scores = [wins.count(0) / 2, wins.count(1) / 2]
        comparisons = [
            Comparison(0, 1, "first" if wins[0] == 0 else "second"),
            Comparison(1, 0, "first" if wins[1] == 1 else "second"),
        ]
        return Judgment(group.prompt.id, scores, [None, None], comparisons)


class Scores(JudgeBase):
    """Scores by a function of (group, a generator of the prompt's own)."""

    name, version = "scores", "1"

    def __init__(self, score: Any, seed: int = 0) -> None:
        self.score, self.seed = score, seed

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        return [
            Judgment(
                g.prompt.id,
                list(self.score(g, random.Random(f"{self.seed} {g.prompt.id}"))),
                [None] * len(g.completions),
            )
            for g in groups
        ]


# Known by construction


def test_a_comparing_judges_accuracy_flips_position_and_length_bias_are_what_it_was_built_with() -> None:
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


def test_a_soft_comparing_judges_probability_is_the_mean_over_the_orders() -> None:
    pair = next(labelled(1))
    # The rejected is completion 0: the chosen wins with 0.7 where it is shown second, with 0.9 where it is shown first.
    comparisons = [Comparison(0, 1, "second", probability=0.3), Comparison(1, 0, "first", probability=0.9)]
    look = look_at(pair, Judgment("p-1", [0.2, 0.8], [None, None], comparisons), chosen_first=False)
    assert look.verdict == "chosen"
    assert look.scores == (0.8, 0.2)
    assert look.probability == pytest.approx(0.8)
    assert [(s.chosen_first, s.verdict) for s in look.shown] == [(False, "chosen"), (True, "chosen")]


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
    assert holds(found["length_correlation"], 0.75 - 0.25)  # of two values of equal size: P(same sign) - P(other)
    assert holds(found["longer_wins"], 0.75)


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
    assert str(check.stopped) == "the endpoint is gone"
    with pytest.raises(UserError, match="gone"):
        check_judge_on(Mortal(lambda g, rng: (1.0, 0.0)), iter_raising())


def iter_raising() -> Iterator[LabelledPair]:
    raise UserError("gone before the first block")
    yield


def test_the_mistakes_that_are_kept_are_those_it_is_surest_of() -> None:
    def score(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        gap = float(group.prompt.id.removeprefix("p-")) / 10  # surer with each row, and always wrong
        return (0.0, gap) if group.completions[0].text.startswith("good") else (gap, 0.0)

    check = check_judge_on(Scores(score), labelled(200))
    assert [m.pair.row for m in check.mistakes] == list(range(200, 188, -1))


# Intervals


def covered(draw: Any, truth: float, *, seeds: int) -> float:
    return float(np.mean([holds(draw(np.random.default_rng(seed)), truth) for seed in range(seeds)]))


# Of 1,000 intervals at 95 %, 93.6 to 96.4 % hold the truth but for 5 in 100 such tests; the seeds are fixed. Counts are
# whole numbers, so that the coverage of a share's interval is a little off 95 % for any single share: at 150 of 300 it
# is 94 %, and near the bounds it is more than 95 %.


@pytest.mark.parametrize(("share", "count"), [(0.5, 300), (0.8, 100), (0.97, 300), (0.02, 200)])
def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says(share: float, count: int) -> None:
    names = [str(i) for i in range(count)]
    rate = covered(lambda rng: estimates.mean(rng.random(count) < share, names), share, seeds=1_000)
    assert 0.925 <= rate <= 0.99


def test_the_interval_of_a_mean_with_ties_holds_the_truth_as_often_as_it_says() -> None:
    names = [str(i) for i in range(300)]

    def draw(rng: np.random.Generator) -> Estimate:
        return estimates.mean(rng.choice([1.0, 0.5, 0.0], p=[0.6, 0.2, 0.2], size=300), names)

    assert 0.93 <= covered(draw, 0.7, seeds=400) <= 0.98


def test_pairs_of_one_prompt_do_not_count_as_independent() -> None:
    names = [str(i // 5) for i in range(500)]  # 100 prompts of five pairs, all right or all wrong

    def draw(rng: np.random.Generator) -> Estimate:
        return estimates.mean(np.repeat(rng.random(100) < 0.7, 5), names)

    assert 0.93 <= covered(draw, 0.7, seeds=400) <= 0.98
    independent = [str(i) for i in range(500)]
    narrow = covered(lambda rng: estimates.mean(np.repeat(rng.random(100) < 0.7, 5), independent), 0.7, seeds=400)
    assert narrow < 0.7  # what is avoided


def test_the_intervals_of_a_difference_and_of_the_position_hold_the_truth_as_often_as_they_say() -> None:
    names = [str(i) for i in range(300)]

    def difference(rng: np.random.Generator) -> Estimate:
        return estimates.mean(rng.choice([1.0, 0.0, -1.0], p=[0.3, 0.6, 0.1], size=300), names, bounds=(-1.0, 1.0))

    assert 0.93 <= covered(difference, 0.2, seeds=400) <= 0.98

    def first(rng: np.random.Generator) -> Estimate:  # two comparisons a pair; a fifth of the pairs say "first" twice
        flipped = rng.random(300) < 0.2
        values = np.stack([np.ones(300), flipped], axis=1).ravel()
        return estimates.mean(values, [str(i // 2) for i in range(600)])

    assert 0.93 <= covered(first, 0.6, seeds=400) <= 0.99


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_interval_of_the_calibration_error_holds_the_truth_as_often_as_it_says(temperature: float) -> None:
    """Also of a calibrated judge, whose error is 0: every sample shows more, by chance."""
    gaps = np.array([0.3, 0.9, 1.6, 2.4])
    claimed, true = 1 / (1 + np.exp(-gaps)), 1 / (1 + np.exp(-gaps / temperature))
    names = [str(i) for i in range(600)]

    def draw(rng: np.random.Generator) -> Estimate:
        at = rng.integers(4, size=600)
        right = rng.random(600) < true[at]
        p = np.where(right, claimed[at], 1 - claimed[at])
        return estimates.calibration_error(p, names, samples=200)

    assert covered(draw, float((claimed - true).mean()), seeds=100) >= 0.9


def test_the_intervals_of_kappa_and_of_the_rank_correlation_hold_the_truth_as_often_as_they_say() -> None:
    names = [str(i) for i in range(300)]

    def of_kappa(rng: np.random.Generator) -> Estimate:  # fair coins that agree with P = 0.8: kappa = (0.8 - 0.5) / 0.5
        a = rng.integers(2, size=300)
        b = np.where(rng.random(300) < 0.8, a, 1 - a)
        return estimates.bootstrap(estimates.kappa(a, b, categories=3), names, samples=200)

    assert covered(of_kappa, 0.6, seeds=100) >= 0.9

    def of_ranks(rng: np.random.Generator) -> Estimate:  # bivariate normal: Spearman's is 6/pi asin(rho / 2)
        x = rng.normal(size=300)
        y = 0.5 * x + math.sqrt(0.75) * rng.normal(size=300)
        return estimates.bootstrap(estimates.symmetric_rank_correlation(x, y), names, samples=200)

    assert covered(of_ranks, 6 / math.pi * math.asin(0.25), seeds=100) >= 0.9


# By hand


def test_the_interval_of_a_share_is_that_of_agresti_and_coull() -> None:
    # 8 of 10, z = 1.959964: n' = 10 + z² = 13.8415, p' = (8 + z²/2) / n' = 0.71674,
    # p' ± z sqrt(p' (1 - p') / n') = 0.71674 ± 0.23737
    found = estimates.mean([1.0] * 8 + [0.0] * 2, [str(i) for i in range(10)])
    assert found == (pytest.approx(0.8), pytest.approx(0.4794, abs=1e-4), pytest.approx(0.9541, abs=1e-4), 10)


def test_calibration_error_by_hand() -> None:
    # Confidences 0.9, 0.9, 0.6, 0.8; right, right, right, wrong. Gaps of the bins: |2 - 1.8|, |1 - 0.6|, |0 - 0.8|.
    assert estimates.calibration_error([0.9, 0.9, 0.6, 0.2], list("abcd")).value == pytest.approx((0.2 + 0.4 + 0.8) / 4)
    # A coin that knows it: half right, with confidence one half.
    assert estimates.calibration_error([0.5, 0.5], list("ab")).value == 0.0
    # Sure, and right three times of four.
    assert estimates.calibration_error([1.0, 1.0, 1.0, 0.0], list("abcd")).value == pytest.approx(0.25)


def test_kappa_by_hand() -> None:
    # [[20, 5], [10, 15]]: observed 35/50 = 0.7; by chance 0.5 · 0.6 + 0.5 · 0.4 = 0.5; (0.7 - 0.5) / (1 - 0.5) = 0.4
    a = [0] * 25 + [1] * 25
    b = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert estimates.kappa(a, b, categories=3)(np.ones(50)) == pytest.approx(0.4)
    assert math.isnan(estimates.kappa([1, 1], [1, 1], categories=3)(np.ones(2)))


def test_rank_correlations_by_hand() -> None:
    assert estimates.kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)  # two pairs alike, one contrary
    assert estimates.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # tau-b: one tie in x
    assert estimates.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(1 - 6 * 2 / (3 * 8))
    assert estimates.spearman([1, 1], [1, 2]) is None
    assert estimates.kendall([1, 1], [1, 2]) is None


def test_the_best_temperature_by_hand() -> None:
    # Right three times of four at a difference of 1: sigmoid(1 / T) = 3/4, so 1 / T = ln 3.
    assert estimates.best_temperature([1, 1, 1, -1]) == pytest.approx(1 / math.log(3))
    assert estimates.best_temperature([1, -1]) is None  # a coin
    assert estimates.best_temperature([1, 2]) is None  # never wrong
    assert estimates.best_temperature([]) is None


# Two judges


def groups(count: int, size: int) -> list[CompletionGroup]:
    return [
        CompletionGroup(Prompt(f"p-{i}", f"q {i}"), [1], [Completion(f"c {k}", [1], [], "stop") for k in range(size)])
        for i in range(count)
    ]


def agree(a: Any, b: Any, some: Sequence[CompletionGroup], chosen: int | None = None) -> dict[str, Any]:
    samples = [Sample(g, chosen) for g in some]
    return measure_agreement(compare_judges(lambda: a, lambda: b, lambda: samples), samples=300)


def test_two_judges_agreement_is_what_they_were_built_with() -> None:
    def coin(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return (1.0, 0.0) if rng.random() < 0.5 else (0.0, 1.0)

    def follows(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        said = coin(group, rng)
        return said if rng.random() < 0.8 else said[::-1]

    found = agree(Scores(coin), Scores(follows), groups(2_000, 2), chosen=0)["figures"]
    assert holds(found["agreement"], 0.8)
    assert holds(found["opposite"], 0.2)
    assert holds(found["kappa"], 0.6)  # (0.8 - 0.5) / (1 - 0.5)
    assert holds(found["kendall"], 0.6)  # of two: 1 where they agree, -1 where not
    assert holds(found["accuracy_a"], 0.5)
    assert holds(found["accuracy_gain"], 0.0)


def test_larger_groups_count_every_two_completions_and_abstentions_are_left_out() -> None:
    class Forgets(Scores):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            return [Judgment(g.prompt.id, [3.0, 2.0, None], [None, None, "no idea"]) for g in groups]

    a, b = Scores(lambda g, rng: (1.0, 2.0, 2.0)), Forgets(None)
    report = agree(a, b, groups(10, 3))
    assert report["counts"] == {"groups": 10, "pairs": 30, "judged_by_both": 10, "unjudged_a": 0, "unjudged_b": 20}
    assert report["confusion"]["second"] == {"first": 10, "second": 0, "tie": 0}
    assert report["figures"]["agreement"].value == 0.0
    assert report["figures"]["spearman"].value == pytest.approx(-1.0)


def test_the_differences_that_are_kept_are_opposite_verdicts_first() -> None:
    def a(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return 1.0, 0.0

    def b(group: CompletionGroup, rng: random.Random) -> tuple[float, float]:
        return (0.0, 0.0) if group.prompt.id != "p-70" else (0.0, 1.0)

    samples = [Sample(g) for g in groups(100, 2)]
    kept = compare_judges(lambda: Scores(a), lambda: Scores(b), lambda: samples).differences
    assert [d.rated.prompt_id for d in kept[:3]] == ["p-70", "p-0", "p-1"]


# Data


def test_pairs_keep_their_other_columns_for_the_judge_and_never_the_label(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "gold": "4", "subset": "math", "tie": False},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Hey", "gold": None, "subset": "chat", "tie": True},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello", "gold": None, "subset": "chat", "tie": None},
    ]
    write_jsonl(path, rows)
    pairs, account = read_labelled(str(path), subset_column="subset")
    first, second = list(pairs)
    assert first.prompt.columns == {"gold": "4", "subset": "math"}
    assert (first.tie, first.subset, second.tie, second.row) == (False, "math", True, 2)
    assert account.summary() == "kept 2 of 3 pairs (1 have identical completions)"
    judge_file = tmp_path / "exact.py"
    judge_file.write_text("def exact(completion, gold):\n    return float(completion == gold)\n")
    check = check_judge_on(load_judge(f"{judge_file}:exact", {}), [first])
    assert check.pairs[0].look.scores == (1.0, 0.0)


def test_mistakes_in_the_data_name_the_row_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"prompt": "a", "chosen": "b", "rejected": "c", "tie": "maybe"}])
    with pytest.raises(DataError, match=r"row 1, column 'tie' is 'maybe'; it must be true"):
        list(read_labelled(str(path))[0])
    write_jsonl(path, [{"prompt": "a", "chosen": "b", "rejected": "c", "kind": "x"}])
    with pytest.raises(DataError, match=r"row 1: no column 'kin', only .*did you mean 'kind'\? set --subset-column"):
        list(read_labelled(str(path), subset_column="kin")[0])
    write_jsonl(path, [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DataError, match="has one completion a row"):
        read_labelled(str(path))
    write_jsonl(path, [{"prompt": "a"}])
    with pytest.raises(DataError, match="prompts alone cannot be judged"):
        read_samples(str(path))
    with pytest.raises(UserError, match="--round is for a run directory"):
        read_samples(str(path), round=1)


def test_two_judges_read_pairs_completions_and_a_runs_shards(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"prompt": f"q {i}", "chosen": "good", "rejected": "evil"} for i in range(50)])
    pairs = list(read_samples(str(path), seed=1))
    assert {s.chosen for s in pairs} == {0, 1}  # in random order
    assert all(s.group.completions[s.chosen or 0].text == "good" for s in pairs)

    write_jsonl(path, [{"prompt": "q", "completions": ["a", "b", "c"], "gold": "a"}])
    [sample] = read_samples(str(path))
    assert [c.text for c in sample.group.completions] == ["a", "b", "c"]
    assert sample.group.prompt.columns == {"gold": "a"}

    run = tmp_path / "run"
    for number in (1, 2):
        (run / f"round-00{number}" / "completions").mkdir(parents=True)
        write_completion_shard(run / f"round-00{number}" / "completions" / "shard-000000.parquet", groups(number, 2))
    RunDir(run).write_config({})
    assert len(list(read_samples(str(run)))) == 2  # the last round
    assert len(list(read_samples(str(run), round=1))) == 1
    with pytest.raises(UserError, match="no completions of round 7; rounds with completions: 1, 2"):
        read_samples(str(run), round=7)
    [shard] = read_samples(str(run / "round-001" / "completions" / "shard-000000.parquet"))
    assert shard.group.prompt.id == "p-0"

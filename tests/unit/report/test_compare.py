"""Arms side by side, with numbers derived by hand; intervals by simulation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from iterdpo.report import compare
from iterdpo.report.compare import (
    SCORE,
    ArmRuns,
    Curve,
    Point,
    Trial,
    at_matched_kl,
    budget_of,
    difference,
    pairs_of,
    score_at,
    verdict,
    win_share,
    write_comparison,
)
from iterdpo.run.rundir import RunDir, Step, read_json
from iterdpo.stats import Floats


def point(round: int, scores: Floats, kl: float) -> Point:
    values = np.stack([scores, np.full(len(scores), 0.5), scores, np.full(len(scores), kl)], axis=1)
    return Point(round, round * 10, tuple(f"p-{i}" for i in range(len(scores))), values)


def curve(*points: tuple[float, float], prompts: int = 4) -> Curve:
    """A run whose prompts all have the same score and KL, by round."""
    return Curve([point(t, np.full(prompts, score), kl) for t, (kl, score) in enumerate(points)])


def test_a_win_share_counts_every_combination_and_a_tie_as_half() -> None:
    assert win_share(np.array([1.0, 3.0]), np.array([1.0, 2.0, math.nan])) == (0.5 + 0 + 1 + 1) / 4
    assert math.isnan(win_share(np.array([math.nan]), np.array([1.0])))
    assert win_share(np.array([-math.inf]), np.array([0.0])) == 0  # a thought without an end


def test_a_score_at_a_kl_is_linear_in_the_root_of_the_kl() -> None:
    path = np.array([[[0.0, 0.0], [4.0, 1.0], [16.0, 3.0]]])
    found = [float(score_at(path, np.array([kl]))[0]) for kl in (0.0, 1.0, 4.0, 9.0, 16.0)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 2.0, 3.0])
    back = np.array([[[0.0, 0.0], [9.0, 3.0], [4.0, 0.0]]])
    assert score_at(back, np.array([4.0]))[0] == pytest.approx(2.0)  # where it is first reached


def test_a_difference_at_matched_kl_is_at_the_largest_kl_that_both_reach() -> None:
    far, near = {0: curve((0, 0.0), (4, 1.0), (16, 3.0))}, {0: curve((0, 0.0), (9, 1.0))}
    found = at_matched_kl("far", "near", far, near)
    assert found is not None
    assert found["kl"] == 9
    assert found["value"] == pytest.approx(2.0 - 1.0)
    assert at_matched_kl("far", "one", far, {0: curve((0, 0.0))}) is None  # a point is no curve
    ended = difference("far", "near", far, near)
    assert ended is not None
    assert ended["value"] == pytest.approx(3.0 - 1.0)


def test_a_difference_is_of_prompts_and_seeds_that_both_have() -> None:
    ours = {0: Curve([point(1, np.array([1.0, 2.0, 9.0]), 1)]), 1: curve((1, 5.0))}
    theirs = {0: Curve([point(1, np.array([0.5, 1.0]), 1)])}
    found = difference("a", "b", ours, theirs)
    assert found is not None
    assert (found["seeds"], found["value"]) == (1, pytest.approx(0.75))
    assert found["seeds_low"] is None  # one seed says nothing about others
    assert difference("a", "b", {1: curve((1, 5.0))}, theirs) is None


def test_a_prompt_that_one_arm_has_no_figure_of_is_left_out_of_both() -> None:
    path = [point(0, np.array([0.0, 0.0, 0.0]), 0.0), point(1, np.array([1.0, 2.0, 9.0]), 4.0)]
    ours, theirs = {0: Curve(path)}, {0: Curve([point(t, np.array([0.0, 1.0 * t, math.nan]), 4.0 * t) for t in (0, 1)])}
    for found in (difference("a", "b", ours, theirs), at_matched_kl("a", "b", ours, theirs)):
        assert found is not None
        assert found["value"] == pytest.approx(
            1.5 - 0.5
        )  # the third prompt, whose 9 has no partner, is in neither mean
        assert (found["low"], found["high"]) == pytest.approx((1.0, 1.0))  # 1 - 0 and 2 - 1: resampled alike in both


def test_arms_without_a_prompt_that_both_have_figures_of_have_no_difference() -> None:
    ours, theirs = (
        {0: Curve([point(t, np.array(s), float(t)) for t in (0, 1)])} for s in ([1.0, math.nan], [math.nan, 1.0])
    )
    assert difference("a", "b", ours, theirs) is None
    assert at_matched_kl("a", "b", ours, theirs) is None
    assert math.isnan(point(0, np.array([math.nan]), 0).means()[SCORE])


def test_a_budget_has_what_another_policy_sampled_for_the_pairs_and_its_judgments(tmp_path: Path) -> None:
    made = {
        "completions": {"prompts": 4, "completions": 8, "tokens": 80},
        "others": {"prompts": 4, "completions": 4, "tokens": 40},
        "judgments": {},  # of a judge that counts no calls
        "against": {"usage": {"calls": 6}},
    }
    for name, counts in made.items():
        step = Step(tmp_path / "round-001" / name, {})
        step.begin()
        step.finish(counts=counts, seconds={"total": 2.0})
    found = budget_of(RunDir(tmp_path))
    assert found == {"completions": 12, "judge_calls": 8 + 6, "steps": 0, "tokens": 120, "seconds": 8.0}


def test_few_arms_are_all_compared_and_many_with_the_first() -> None:
    assert pairs_of(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs_of(list("abcde")) == [("b", "a"), ("c", "a"), ("d", "a"), ("e", "a")]


@pytest.mark.parametrize(
    ("shift", "said"),
    [(0.5, "a scores higher than b by"), (-0.5, "a scores lower than b by"), (0.0, "cannot be told apart")],
)
def test_the_verdict_is_that_of_both_intervals(shift: float, said: str) -> None:
    generator = np.random.default_rng(0)
    ours, theirs = {}, {}
    for seed in range(5):
        base = generator.normal(size=50)
        theirs[seed] = Curve([point(0, base, 0)])
        ours[seed] = Curve([point(0, base + shift + 0.1 * generator.normal(size=50), 0)])
    found = difference("a", "b", ours, theirs)
    assert found is not None
    assert said in verdict([found])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Five seeds with a spread of 0.3, each with 40 prompts of spread 1: Student's covers 95 %, the bootstrap less."""
    generator, true, times = np.random.default_rng(1), 0.2, 400
    covered = {"seeds": 0, "nested": 0}
    for _ in range(times):
        curves = {
            seed: Curve([point(0, true + 0.3 * generator.normal() + generator.normal(size=40), 0)]) for seed in range(5)
        }
        zero = {seed: Curve([point(0, np.zeros(40), 0)]) for seed in range(5)}
        found = difference("a", "b", curves, zero, samples=400)
        assert found is not None
        covered["seeds"] += found["seeds_low"] <= true <= found["seeds_high"]
        covered["nested"] += found["low"] <= true <= found["high"]
    assert 0.925 <= covered["seeds"] / times <= 0.975
    assert covered["nested"] / times >= 0.8


def test_the_page_has_the_arms_their_budgets_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {"new": curve((0, 0.0), (4, 1.0)), "old": curve((0, 0.0), (9, 0.5))}
    for one, steps in zip(curves.values(), (8, 16), strict=True):
        one.budget.update(completions=64, judge_calls=64, steps=steps, tokens=1280, seconds=75)
    monkeypatch.setattr(compare, "read_curve", lambda arm, root: curves[arm.name])
    arms = [
        ArmRuns("new", "iterative", 1, {"dpo.beta": "<script>alert(1)</script>"}, {0: tmp_path, 1: tmp_path}),
        ArmRuns("old", "offline", 1, {}, {0: tmp_path}),
        ArmRuns("never", "offline", 1, {}, {}),
    ]
    page = write_comparison(
        tmp_path,
        arms,
        trials=[Trial("new", {"dpo.beta": "<script>alert(1)</script>"}, 0.5, 3.0)],
        title="Does <b>it</b> help?",
        seeds=[0, 1],
        settings={"a": "</pre>"},
    ).read_text()
    assert "Not finished yet: old/seed-1, never/seed-0, never/seed-1." in page
    assert (tmp_path / "against_kl.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in page
    assert "Does &lt;b&gt;it&lt;/b&gt; help?" in page
    assert "The arms differ in optimizer steps." in page
    assert "1 min 15 s" in page
    assert page.count("<svg") == 3
    assert "new minus old" in page
    found = read_json(tmp_path / "compare.json")
    assert [d["at"] for d in found["differences"]] == ["end", "kl"]
    assert found["arms"]["new"]["end"]["score"]["value"] == 1.0
    assert compare.METRICS[SCORE] == "score"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterdpo.report.headline import headline
from iterdpo.run.read import read_run
from iterdpo.run.rundir import RunDir, write_jsonl

ONLINE = {"rounds": 3, "evaluation": {"judge": {"use": "lexicon"}, "confidence": 0.95}}
INITIAL = {"round": 0, "score/heldout_judge": 0.29, "score/train_judge": 0.59, "gate/decision": "promote"}

Judge = Callable[..., str]


def outcome(round: int, rate: float | None = 0.71, decision: str = "promote") -> dict[str, Any]:
    """A round's metrics, its win rate known to 6 points either way."""
    ends = {"_low": rate - 0.06, "_high": rate + 0.06} if rate is not None else {}
    rates = {"win_rate/vs_initial": rate, **{f"win_rate/vs_initial{end}": x for end, x in ends.items()}}
    scores = {"score/heldout_judge": 0.72, "score/train_judge": 0.85, "kl/to_initial": 14.2}
    return {"round": round, **scores, **rates, "gate/decision": decision}


@pytest.fixture
def say(tmp_path: Path) -> Judge:
    def say(*rows: dict[str, Any], config: dict[str, Any] = ONLINE) -> str:
        RunDir(tmp_path).write_config(config)
        write_jsonl(tmp_path / "metrics.jsonl", rows)
        return headline(read_run(tmp_path)).replace("\N{NO-BREAK SPACE}", " ")

    return say


def test_a_win_rate_above_half_beats_the_initial_policy(say: Judge) -> None:
    assert say(INITIAL, outcome(1), outcome(2), outcome(3)) == (
        "Three rounds moved the held-out judge's score from 0.29 to 0.72; round 3 beats the initial policy on 71 % of "
        "held-out prompts (95 % interval 65 to 77 %), at 14 nats of KL."
    )


def test_an_interval_with_half_in_it_distinguishes_nothing_whatever_the_scores_did(say: Judge) -> None:
    said = say(INITIAL, outcome(1), outcome(2), outcome(3, 0.54))
    assert "round 3 is not distinguishable from the initial policy, with wins on 54 % of held-out prompts" in said
    assert "beats" not in said


def test_a_win_rate_below_half_is_worse_and_a_risen_training_score_is_called_exploiting(say: Judge) -> None:
    said = say(INITIAL, outcome(1), outcome(2), outcome(3, 0.3) | {"score/heldout_judge": 0.2})
    assert "from 0.29 to 0.20; round 3 is worse than the initial policy and wins on only 30 %" in said
    assert "Meanwhile the training judge's score went from 0.59 to 0.85" in said


def test_a_candidate_that_pleases_the_training_judge_alone_is_told_of(say: Judge) -> None:
    rates = {"win_rate/vs_previous": 0.3, "win_rate/vs_previous_high": 0.4}
    said = say(INITIAL, outcome(1), outcome(2, decision="keep") | rates | {"score/train_judge": 0.9})
    assert said.endswith(
        "In round 2 the training judge's score went from 0.85 to 0.90, while the held-out judge prefers the policy before: "
        "the candidate exploits the training judge's errors."
    )
    for other in ({"score/train_judge": 0.8}, {"win_rate/vs_previous_high": 0.5}):
        said = say(INITIAL, outcome(1), outcome(2, decision="keep") | rates | {"score/train_judge": 0.9} | other)
        assert "exploits" not in said


def test_the_policy_that_was_promoted_last_is_the_one_judged(say: Judge) -> None:
    said = say(INITIAL, outcome(1), outcome(2), outcome(3, 0.2, "keep"))
    assert said.startswith("Three rounds, two of them promoted, moved")
    assert "round 2 beats the initial policy on 71 %" in said


def test_nothing_promoted_says_that_the_policy_is_still_the_initial_one(say: Judge) -> None:
    said = say(INITIAL, *(outcome(r, 0.47, "keep") for r in (1, 2, 3)))
    assert said.startswith("None of three rounds was promoted: the policy is still the initial one. Round 3 is not")


def test_a_stopped_run_says_where(say: Judge) -> None:
    assert say(INITIAL, outcome(1), outcome(2, 0.3, "stop")).startswith("The gate stopped the run in round 2 of 3.")


def test_a_stopped_run_says_why_in_the_gates_words(say: Judge) -> None:
    why = {"gate/reason": "kl/to_initial 31.2 is above 20; the run ends"}
    said = say(INITIAL, outcome(1), outcome(2, 0.3, "stop") | why)
    assert said.startswith(
        "The gate stopped the run in round 2 of 3: kl/to_initial 31.2 is above 20. Two rounds, one of"
    )
    why = {"gate/reason": "kl/to_initial 31.2 is above 20; the run ends after 2 rounds without a promotion"}
    assert "is above 20; the run ends after 2 rounds without a promotion." in say(
        INITIAL, outcome(1, 0.3, "stop") | why
    )


def test_the_best_round_is_the_one_judged_if_a_later_one_was_promoted(say: Judge) -> None:
    config = ONLINE | {"gate": {"metric": "win_rate/vs_initial"}}
    said = say(INITIAL, outcome(1, 0.8), outcome(2, 0.6), config=config)
    assert "round 1 beats the initial policy on 80 %" in said
    assert "Round 1 is the best by win_rate/vs_initial, and `policy` points to it." in said
    assert "is the best by" not in say(INITIAL, outcome(1, 0.6), outcome(2, 0.8), config=config)
    lower = ONLINE | {"gate": {"metric": "score/heldout_judge"}}
    said = say(INITIAL | {"score/heldout_judge": 0.9}, outcome(1), config=lower)
    assert "The initial policy is the best by score/heldout_judge, and `policy` points to it." in said


def test_without_a_heldout_judge_the_training_judge_marks_its_own_work(say: Judge) -> None:
    row = outcome(1) | {"score/heldout_judge": None}
    said = say(INITIAL | {"score/heldout_judge": None}, row, config={"rounds": 1, "evaluation": {"judge": None}})
    assert said.startswith("One round moved the training judge's score from 0.59 to 0.85;")
    assert "There was no held-out judge" in said


def test_a_run_that_goes_on_says_how_far_it_is(say: Judge) -> None:
    assert say() == "There are no measurements yet: the evaluation of the initial policy has not finished."
    assert (
        say(INITIAL)
        == "None of the 3 planned rounds is done yet; the initial policy scores 0.29 by the held-out judge."
    )
    assert say(INITIAL, outcome(1)).startswith("Unfinished: 1 of 3 rounds done. One round moved")


def test_a_win_rate_that_was_not_measured_is_not_made_up(say: Judge) -> None:
    said = say(INITIAL, outcome(1), outcome(2), outcome(3, None))
    assert "round 3 was not compared with the initial policy, at 14 nats of KL." in said


def test_many_abstentions_are_mentioned_and_few_are_not(say: Judge) -> None:
    row = outcome(1) | {"evaluation/completions": 100}
    many = say(INITIAL, row | {"evaluation/unjudged": 30})
    few = say(INITIAL, row | {"evaluation/unjudged": 2})
    assert "30 of 100 held-out completions could not be judged" in many
    assert "could not be judged" not in few


def test_many_unfinished_thoughts_are_mentioned_and_few_are_not(say: Judge) -> None:
    many, few = (say(INITIAL, outcome(1) | {"length/unfinished_thoughts": share}) for share in (0.3, 0.02))
    assert "30 % of the held-out completions are thoughts without an end, and lose against every answer" in many
    assert "thoughts" not in few


def test_a_judge_that_goes_by_the_place_is_told_of(say: Judge) -> None:
    row = {"round": 1, "gate/decision": "promote"}
    assert "the judge decides by position" in say(INITIAL, row | {"judge/flip_rate": 0.5})
    assert "the judge decides by position" not in say(INITIAL, row | {"judge/flip_rate": 0.4})


# Wilson's interval of 63 % in 200, by hand: centre (0.63 + 3.8416/400) / 1.019208 = 0.62755, half-width
# 1.96 sqrt(0.2331/200 + 0.0049²) / 1.019208 = 0.06633.
def test_an_offline_round_reports_accuracy_on_heldout_pairs_with_its_interval(say: Judge) -> None:
    row = {"round": 1, "pairs/kept": 1600, "eval_rewards/accuracies": 0.63, "gate/decision": "promote"}
    assert say(row, config={"data": {"heldout": 200}}) == (
        "One offline round on 1,600 pairs: the implicit reward prefers the chosen completion in 63 % of 200 held-out "
        "pairs (95 % interval 56 to 69 %), compared with one half by chance."
    )
    said = say(row | {"eval_rewards/accuracies": 0.53}, config={"data": {"heldout": 200}})
    assert said.endswith("which is not distinguishable from chance.")


def test_an_offline_round_without_heldout_pairs_claims_nothing_of_new_ones(say: Judge) -> None:
    said = say({"round": 1, "rewards/accuracies": 0.71}, config={"data": {"heldout": 0}})
    assert "preferred the chosen completion in 71 % of the pairs. None were held out" in said
    assert say(config={"data": {}}) == "The offline round is not done yet."

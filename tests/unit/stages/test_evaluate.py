"""The held-out evaluation: what decides it, what is compared with what, and what goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.verify import verify
from iterdpo.data.prompts import PromptFile
from iterdpo.errors import ChildFailed, ConfigError, DataError, StaleStepError
from iterdpo.run.artifacts import Evaluation, PolicyCheckpoint, read_groups, read_judgments
from iterdpo.run.rundir import directory_digest, read_json, read_manifest
from iterdpo.stages.evaluate import evaluate
from iterdpo.stages.evaluate import inputs as evaluate_inputs
from iterdpo.stages.plan import first_pending
from iterdpo.stages.runs import IterativeRun
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import CompletionGroup, Judgment
from tests.unit.stages.harness import HELDOUT, PER_ROUND, Lengths, Room, finish

BASELINE = Evaluation(Path("evaluation"), "e4c3", 0)


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    path = build_tiny_checkpoint(tmp_path_factory.mktemp("candidate"), seed=1)
    return PolicyCheckpoint(path, directory_digest(path), 1)


def initial(run: IterativeRun) -> Evaluation:
    return evaluate(run, 0, run.initial, {})


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = read_json(evaluation.path / "metrics.json")
    return found


def key(run: IterativeRun) -> dict[str, Any]:
    return evaluate_inputs(run, run.initial, {"initial": BASELINE})


def test_the_key_has_the_policies_the_heldout_prompts_the_judges_the_baselines_and_the_seed(room: Room) -> None:
    run = room.open(heldout_judge=Lengths())
    found = key(run)
    assert {name: value for name, value in found.items() if name not in ("evaluation", "sampling")} == {
        "model": run.initial.digest,
        "policy": run.initial.digest,
        "prompts": {"per_round": 6, "heldout": 4, "column": "prompt", "content": run.prompts.heldout.digest()},
        "judges": {
            "train_judge": {"use": "lengths", "version": "1"},
            "heldout_judge": {"use": "other", "version": "1"},
        },
        "baselines": {"initial": "e4c3"},
        "seed": 0,
    }
    assert found["evaluation"].keys() == {"n", "temperature", "confidence", "bootstrap_samples"}
    assert (found["sampling"]["n"], found["sampling"]["temperature"]) == (1, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation": {"n": 2}},
        {"evaluation": {"temperature": 0.5}},
        {"evaluation": {"confidence": 0.9}},
        {"sampling": {"max_tokens": 8}},
        {"prompts": {"heldout": 3}},
        {"version": "2"},
        {"seed": 1},
    ],
)
def test_the_key_changes_with_what_decides_the_metrics(room: Room, changes: dict[str, Any]) -> None:
    assert key(room.open(**changes)) != key(room.open())


@pytest.mark.parametrize(
    "changes", [{"evaluation": {"max_logp_gap": 1.0}}, {"gate": {"minimum": 0.9}}, {"dpo": {"beta": 0.5}}]
)
def test_the_key_is_the_same_if_the_metrics_are(room: Room, changes: dict[str, Any]) -> None:
    assert key(room.open(**changes)) == key(room.open())


def test_the_initial_policy_is_no_distance_from_itself(room: Room) -> None:
    run = room.open()
    evaluation = initial(run)
    metrics = metrics_of(evaluation)
    assert (metrics["score/train_judge"], metrics["kl/to_initial"], metrics["win_rate/vs_initial"]) == (2.0, 0.0, None)
    assert metrics["sampler/logp_gap"] is None
    assert not (evaluation.path / "logps.json").exists()
    assert [p.id for p in PromptFile.open(run.dir.root / "heldout.jsonl")] == [p.id for p in run.prompts.heldout]
    assert [g.prompt for g in read_groups(evaluation.completions)] == list(run.prompts.heldout)


def test_all_judges_judge_and_the_one_that_never_trained_decides(room: Room) -> None:
    run = room.open(heldout_judge=Lengths(score=3.0))
    evaluation = initial(run)
    metrics = metrics_of(evaluation)
    assert (metrics["score/train_judge"], metrics["score/heldout_judge"]) == (2.0, 3.0)
    assert metrics["win_rate/judge"] == "heldout"
    places = evaluation.judgments()
    assert list(places) == ["heldout_judge", "train_judge"]
    assert [j.scores for j in read_judgments(places["heldout_judge"])] == [[3.0]] * HELDOUT


def test_a_candidate_is_compared_with_the_baselines_prompt_by_prompt(room: Room, candidate: PolicyCheckpoint) -> None:
    run = room.open(evaluation={"n": 2})
    before = initial(run)
    room.sampler.reply = lambda ids, k: "abc"  # the baseline's are "ab" and "abab"
    evaluation = evaluate(run, 1, candidate, {"initial": before, "previous": before})
    metrics = metrics_of(evaluation)
    assert metrics["win_rate/vs_initial"] == metrics["win_rate/vs_previous"] == 0.5
    assert (metrics["score/train_judge"], metrics["length/mean_tokens"]) == (3.0, 3.0)
    logps = read_json(evaluation.path / "logps.json")
    assert [len(group) for group in logps["policy"]] == [len(group) for group in logps["initial"]] == [2] * HELDOUT
    assert metrics["sampler/logp_gap"] > 1  # the sampler says -1 for every token, and is no engine


def test_self_bleu_is_measured_if_it_is_asked_for(room: Room) -> None:
    assert "text/self_bleu" not in metrics_of(initial(room.open()))
    metrics = metrics_of(initial(room.open(evaluation={"self_bleu": True}, redo=True)))
    assert metrics["text/self_bleu"] == 1.0  # all are "ab"


def test_seeds_are_the_same_in_every_round(room: Room, candidate: PolicyCheckpoint) -> None:
    run = room.open()
    before = initial(run)
    seeds, room.sampler.seeds = room.sampler.seeds, []
    evaluate(run, 1, candidate, {"initial": before})
    assert room.sampler.seeds == seeds
    assert len(set(seeds)) == HELDOUT


def test_greedy_completions_are_one_a_prompt(room: Room) -> None:
    run = room.open(evaluation={"n": 3, "temperature": 0})
    assert metrics_of(initial(run))["evaluation/completions"] == HELDOUT
    assert (key(run)["sampling"]["n"], key(run)["sampling"]["temperature"]) == (1, 0)


def test_an_engine_that_does_not_sample_from_the_policy_is_found_out(room: Room, candidate: PolicyCheckpoint) -> None:
    run = room.open(evaluation={"max_logp_gap": 0.05})
    before = initial(run)
    with pytest.raises(ChildFailed, match=r"evaluation\.max_logp_gap = 0\.05\): it does not sample from this policy"):
        evaluate(run, 1, candidate, {"initial": before})


def test_what_is_evaluated_is_not_evaluated_again(room: Room) -> None:
    first = initial(room.open())
    room.sampler.asked.clear()
    room.judge.asked.clear()
    assert initial(room.open()) == first
    assert (room.sampler.asked, room.judge.asked) == ([], [])


def test_other_settings_are_refused_and_with_redo_the_old_goes_to_the_attic(room: Room) -> None:
    first = initial(room.open())
    with pytest.raises(StaleStepError, match=r"round-000/evaluation was made with sampling\.n = 1"):
        initial(room.open(evaluation={"n": 2}))
    run = room.open(evaluation={"n": 2}, redo=True)
    assert metrics_of(initial(run))["evaluation/completions"] == 2 * HELDOUT
    kept = read_manifest(run.dir.attic / "round-000" / "evaluation")
    assert kept is not None
    assert kept.digest == first.digest


def test_an_interrupted_evaluation_samples_and_judges_only_what_is_missing(room: Room) -> None:
    class Interrupted(Lengths):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            if self.asked:
                raise KeyboardInterrupt
            return super().judge(groups)

    healthy, room.judge = room.judge, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        initial(room.open(sampling={"shard_size": 2}))
    room.judge = healthy
    room.sampler.asked.clear()
    initial(room.open(sampling={"shard_size": 2}))
    assert room.sampler.asked == []
    assert [len(groups) for groups in healthy.asked] == [2]


class PrefersFirst(Lengths):
    """Compares: the first of a group, the candidate's, is the better one."""

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        self.asked.append(list(groups))
        return [Judgment(g.prompt.id, [1.0, 0.0], [None, None]) for g in groups]


def test_duels_of_a_judge_that_compares_stream_and_twins_tie_without_it(
    room: Room, candidate: PolicyCheckpoint
) -> None:
    judge = room.judge = PrefersFirst(comparative=True)
    run = room.open(prompts={"heldout": PER_ROUND}, sampling={"shard_size": 2})
    before = initial(run)
    assert judge.asked == []  # there is nothing to compare with
    assert metrics_of(before)["win_rate/vs_initial"] is None

    differing = list(run.prompts.heldout)[:3]
    differing_ids = run.prompt_ids(differing)
    room.sampler.reply = lambda ids, k: "another" if ids in differing_ids else "ab"
    evaluation = evaluate(run, 1, candidate, {"initial": before, "previous": before})

    asked = [group for shard in judge.asked for group in shard]
    assert [[c.text for c in group.completions] for group in asked] == [["another", "ab"]] * 3  # one baseline: once
    assert [group.prompt.id for group in asked] == [p.id for p in differing]
    assert [len(shard) for shard in judge.asked] == [2, 1]
    place = evaluation.path / "judgments" / "train_judge" / "vs-round-000"
    assert [p.name for p in sorted(place.iterdir())] == ["shard-000000.jsonl", "shard-000001.jsonl"]
    assert metrics_of(evaluation)["win_rate/vs_initial"] == (3 * 1 + 3 * 0.5) / 6


def with_references(room: Room) -> None:
    """Tale i has a reference completion of i letters."""
    rows = [{"prompt": f"Tale {i}", "gold": "x" * i} for i in range(40)]
    (room.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_reference_completions_are_judged_once_and_every_round_is_compared_with_them(
    room: Room, candidate: PolicyCheckpoint
) -> None:
    with_references(room)
    run = room.open(evaluation={"reference_column": "gold", "n": 2}, heldout_judge=Lengths())
    before = initial(run)
    lengths = [len(prompt.columns["gold"]) for prompt in run.prompts.heldout]
    wins = [(0.5 * (x < 2) + 0.5 * (x < 4) + 0.25 * (x in (2, 4))) for x in lengths]  # "ab" and "abab"
    metrics = metrics_of(before)
    assert metrics["win_rate/vs_reference"] == sum(wins) / HELDOUT
    assert metrics["length_controlled_win_rate/vs_reference"] is not None
    references = room.root / "run" / "round-000" / "references"
    assert [g.completions[0].text for g in read_groups(references / "completions")] == ["x" * n for n in lengths]
    asked = len(room.judge.asked)
    room.sampler.reply = lambda ids, k: "y" * 50
    metrics = metrics_of(evaluate(run, 1, candidate, {"initial": before, "previous": before}))
    assert metrics["win_rate/vs_reference"] == 1.0
    assert len(room.judge.asked) == asked + 1  # the candidate's alone
    assert "win_rate/vs_reference" not in metrics_of(initial(room.open(evaluation={"n": 2}, redo=True)))


def test_a_judge_that_compares_sees_each_completion_beside_the_reference(room: Room) -> None:
    with_references(room)
    judge = room.judge = PrefersFirst(comparative=True)
    metrics = metrics_of(initial(room.open(evaluation={"reference_column": "gold", "n": 2})))
    asked = [group for shard in judge.asked for group in shard]
    assert [[c.text[:1] for c in group.completions] for group in asked] == [["a", "x"]] * 2 * HELDOUT
    assert metrics["win_rate/vs_reference"] == 1.0


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=2)


def replies(room: Room, texts: dict[str, str]) -> None:
    """Completions by the digest of the policy that is loaded; all others are "ab" and "abab"."""
    room.sampler.reply = lambda ids, k: texts.get(room.sampler.loaded[-1], "ab" * (k + 1))


def test_another_model_is_sampled_once_and_every_round_is_compared_with_it(
    room: Room, candidate: PolicyCheckpoint, other: Path
) -> None:
    against = {"evaluation": {"against": {"model": str(other)}, "n": 2}}
    run = room.open(**against, heldout_judge=Lengths())
    assert run.compared_model is not None
    replies(room, {run.compared_model.digest: "abc", candidate.digest: "abcd"})
    before = initial(run)
    metrics = metrics_of(before)
    assert (metrics["win_rate/vs_model"], metrics["win_rate/vs_model_ties"]) == (0.5, 1.0)  # "ab" loses, "abab" wins
    assert metrics["length_controlled_win_rate/vs_model"] is not None
    step = run.dir.round_dir(0) / "other_model"
    assert [[c.text for c in g.completions] for g in read_groups(step / "completions")] == [["abc"] * 2] * HELDOUT
    assert sorted(path.name for path in (step / "judgments").iterdir()) == ["heldout_judge", "train_judge"]
    assert room.sampler.seeds[:HELDOUT] == room.sampler.seeds[HELDOUT:]  # as every round's

    loaded = room.sampler.loaded.copy()
    metrics = metrics_of(evaluate(run, 1, candidate, {"initial": before, "previous": before}))
    assert [metrics[f"win_rate/vs_model{end}"] for end in ("", "_low", "_high")] == [1.0] * 3
    assert room.sampler.loaded == [*loaded, candidate.digest]
    assert "win_rate/vs_model" not in metrics_of(initial(room.open(evaluation={"n": 2}, redo=True)))


def test_what_is_compared_with_is_a_step_with_its_own_key(room: Room, other: Path, tmp_path: Path) -> None:
    moved = build_tiny_checkpoint(tmp_path / "moved", seed=2)  # the same model, elsewhere
    room.sections["evaluation"]["against"] = {"model": str(other)}
    first = initial(room.open())
    assert initial(room.open(evaluation={"against": {"model": str(moved)}})) == first
    for changes in ({"evaluation": {"n": 2}}, {"seed": 1}, {"version": "2"}, {"sampling": {"max_tokens": 8}}):
        with pytest.raises(StaleStepError, match="round-000/other_model"):
            initial(room.open(**changes))
    with pytest.raises(StaleStepError, match="round-000/other_model was made with policy"):
        initial(room.open(evaluation={"against": {"model": room.sections["model"]["path"]}}))
    plain = room.open(evaluation={"against": None})
    assert "against" not in key(plain)["evaluation"]
    with pytest.raises(StaleStepError, match=r"round-000/evaluation was made with baselines\.model"):
        initial(plain)


def test_a_model_that_is_the_initial_one_ties_with_it_everywhere(room: Room) -> None:
    against = {"evaluation": {"against": {"model": room.sections["model"]["path"]}}}
    judge = room.judge = PrefersFirst(comparative=True)
    metrics = metrics_of(initial(room.open(**against)))
    assert (metrics["win_rate/vs_model"], metrics["win_rate/vs_model_ties"], judge.asked) == (0.5, 1.0, [])


def test_a_judge_that_compares_sees_each_completion_beside_the_models(room: Room, other: Path) -> None:
    judge = room.judge = PrefersFirst(comparative=True)
    run = room.open(evaluation={"against": {"model": str(other)}, "n": 2})
    assert run.compared_model is not None
    replies(room, {run.compared_model.digest: "xyz"})
    evaluation = initial(run)
    asked = [[c.text for c in group.completions] for shard in judge.asked for group in shard]
    assert asked == [["ab", "xyz"], ["abab", "xyz"]] * HELDOUT
    assert metrics_of(evaluation)["win_rate/vs_model"] == 1.0
    assert [p.name for p in (evaluation.path / "judgments" / "train_judge").iterdir()] == ["vs-model"]


def test_the_gate_and_its_rules_decide_by_the_win_rate_against_another_model(room: Room, other: Path) -> None:
    rule = {"metric": "win_rate/vs_model_low", "max_decrease": 0.1, "against": "best"}
    gate = {"metric": "win_rate/vs_model", "minimum": 0.9, "rules": [rule]}
    run = room.open(rounds=1, gate=gate, evaluation={"against": {"model": str(other)}})
    [_, record] = finish(run)
    assert record.decision == "keep"
    assert record.reason.startswith("win_rate/vs_model 0.500 is below 0.9")
    assert first_pending(room.open(rounds=1, gate=gate, evaluation={"against": {"model": str(other)}})) is None
    assert record.metrics.keys() >= {"win_rate/vs_model_low", "length_controlled_win_rate/vs_model_high"}
    with pytest.raises(ConfigError, match=r"'win_rate/vs_model': there is no other model, .*set evaluation\.against"):
        room.open(gate={"metric": "win_rate/vs_model"})


def test_a_model_that_the_engine_cannot_take_is_refused_at_once(room: Room) -> None:
    wider = build_tiny_checkpoint(room.root / "wider", intermediate_size=256)
    remedy = r"and name that: evaluation\.reference_column"
    with pytest.raises(ConfigError, match=rf"evaluation\.against\.model .*names or shapes.*{remedy}"):
        room.open(evaluation={"against": {"model": str(wider)}})
    with pytest.raises(ConfigError, match=r"evaluation\.against\.model '/nowhere': no such directory"):
        room.open(evaluation={"against": {"model": "/nowhere"}})


def test_further_temperatures_are_compared_with_what_stays_the_same(room: Room, candidate: PolicyCheckpoint) -> None:
    with_references(room)
    section = {"n": 2, "reference_column": "gold", "temperatures": [0, 0.5, 1.0]}
    run = room.open(evaluation=section)
    before = initial(run)
    step = run.dir.round_dir(0) / "temperatures"
    found = read_json(step / "metrics.json")
    assert {name.partition("/")[2].partition("/")[0] for name in found} == {"0", "0.5"}  # 1 is the evaluation's own
    # "ab" alone against "ab" and "abab"; at 0.5 both against both
    assert (found["temperature/0/win_rate/vs_initial"], found["temperature/0.5/win_rate/vs_initial"]) == (0.25, 0.5)
    assert (found["temperature/0/score/train_judge"], found["temperature/0.5/score/train_judge"]) == (2.0, 3.0)
    assert "temperature/0/win_rate/vs_previous" not in found
    seeds = room.sampler.seeds
    assert seeds[:HELDOUT] == seeds[HELDOUT : 2 * HELDOUT] == seeds[2 * HELDOUT :]

    room.sampler.reply = lambda ids, k: "y" * 50
    evaluate(run, 1, candidate, {"initial": before, "previous": before})
    found = read_json(run.dir.round_dir(1) / "temperatures" / "metrics.json")
    assert found["temperature/0/win_rate/vs_initial"] == found["temperature/0.5/win_rate/vs_reference_low"] == 1.0
    manifest = read_manifest(run.dir.round_dir(1) / "temperatures")
    assert manifest is not None
    assert manifest.inputs["baselines"].keys() == {"initial", "reference"}

    asked = len(room.sampler.asked)
    assert initial(room.open(evaluation={**section, "temperatures": [1.0]})) == before  # the evaluation is the same
    with pytest.raises(StaleStepError, match=r"round-000/temperatures was made with evaluation\.temperatures = \[0"):
        initial(room.open(evaluation={**section, "temperatures": [0, 0.7]}))
    assert len(room.sampler.asked) == asked


def test_a_judge_that_compares_sees_a_greedy_completion_beside_the_first_of_the_initial_policy(room: Room) -> None:
    judge = room.judge = PrefersFirst(comparative=True)
    room.sampler.reply = lambda ids, k: "greedy" if len(room.sampler.asked) > 1 else "ab" * (k + 1)
    initial(room.open(evaluation={"n": 2, "temperatures": [0]}))
    asked = [[c.text for c in group.completions] for shard in judge.asked for group in shard]
    assert asked == [["greedy", "ab"]] * HELDOUT


def test_a_run_with_further_temperatures_is_followed_and_its_rules_are_about_them(room: Room) -> None:
    rules = [{"metric": "temperature/0.5/win_rate/vs_initial", "max_increase": 0.5, "against": "initial"}]
    settings = {"evaluation": {"temperatures": [0.5]}, "gate": {"minimum": 0.0, "rules": rules}}
    records = finish(room.open(rounds=1, **settings))
    assert [record.metrics["temperature/0.5/win_rate/vs_initial"] for record in records] == [0.5, 0.5]
    assert records[1].decision == "promote"
    assert records[1].metrics["time/temperatures_s"] > 0
    assert first_pending(room.open(rounds=1, **settings)) is None
    assert verify(room.root / "run").problems == []
    with pytest.raises(ConfigError, match=r"temperature/0\.7/.*: evaluation\.temperatures gives temperature/0\.5/"):
        room.open(evaluation={"temperatures": [0.5]}, gate={"rules": [{**rules[0], "metric": "temperature/0.7/x"}]})


def test_references_that_are_not_there_are_named(room: Room) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.reference_column = 'gold': the held-out prompts have no such"):
        room.open(evaluation={"reference_column": "gold"})
    rows = [{"prompt": f"Tale {i}", "gold": None if i % 2 else "x"} for i in range(40)]
    (room.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"prompts\.jsonl: row \d+: .*'gold'.*has no text"):
        initial(room.open(evaluation={"reference_column": "gold"}, prompts={"heldout": 20}))
    assert room.sampler.asked == []


def test_with_spending_the_intervals_of_later_rounds_are_of_a_higher_coverage(
    room: Room, candidate: PolicyCheckpoint
) -> None:
    run = room.open(evaluation={"looks": "spending"})
    before = initial(run)
    assert metrics_of(before)["evaluation/confidence"] == 0.95
    found = [metrics_of(evaluate(run, t, candidate, {"initial": before})) for t in (1, 2)]
    assert [m["evaluation/confidence"] for m in found] == [pytest.approx(0.975), pytest.approx(1 - 0.05 / 6)]
    assert key(run)["evaluation"]["looks"] == "spending"

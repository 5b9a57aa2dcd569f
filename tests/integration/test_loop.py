"""The loop through the Python API, with a fake sampler: adding rounds, doing again, keeping, stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import run_rounds
from iterdpo import read_run
from iterdpo.config import Config, parse_config
from iterdpo.errors import ChildFailed, StaleStepError
from iterdpo.run.rundir import RunDir, read_jsonl
from iterdpo.testing import FakeSampler
from tests.integration.harness import Workspace
from tests.unit.run.tracked import tensorboard, wandb_offline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trained_here")]


def longer(prompt: str, completion: str) -> int:
    return len(completion)


def shorter(prompt: str, completion: str) -> int:
    return -len(completion)


def vowels(prompt: str, completion: str) -> int:
    return sum(letter in "aeiou" for letter in completion)


def config_of(workspace: Workspace, **changes: Any) -> Config:
    values = {**workspace.config, "judge": {"use": "given:below"}, "evaluation": {"max_logp_gap": 1e3}, **changes}
    return parse_config(Config, values)


def sampler() -> FakeSampler:
    return FakeSampler(lambda ids, k: "abcdefghij"[: 3 + (k * 2 + ids[-1]) % 7])


def run(config: Config, judge: Any = longer, **options: Any) -> FakeSampler:
    fake = sampler()
    run_rounds(config, judge=judge, heldout_judge=vowels, sampler=fake, prefect=False, **options)
    return fake


def test_rounds_are_added_and_a_changed_judge_is_refused_or_done_again_without_sampling(workspace: Workspace) -> None:
    first = run(config_of(workspace, rounds=1))
    assert len(first.loaded) == 2  # the initial policy, and the candidate to evaluate
    assert run(config_of(workspace, rounds=1)).loaded == []  # nothing to do

    second = run(config_of(workspace, rounds=2))
    assert second.loaded == [first.loaded[-1], second.loaded[-1]]  # from the first round's policy on
    assert [row["round"] for row in read_jsonl(workspace.run_dir / "metrics.jsonl")] == [0, 1, 2]

    with pytest.raises(StaleStepError, match=r"judge|evaluation"):
        run(config_of(workspace, rounds=1), judge=shorter)
    completions = workspace.run_dir / "round-001" / "completions" / "MANIFEST.json"
    sampled = completions.stat().st_mtime_ns
    run(config_of(workspace, rounds=1), judge=shorter, redo=True)
    assert completions.stat().st_mtime_ns == sampled
    assert list((workspace.run_dir / "attic").glob("*/round-001/policy/model.safetensors"))
    assert [record.round for record in RunDir(workspace.run_dir).records()] == [0, 1]


@pytest.mark.parametrize(("otherwise", "rounds"), [("keep", [0, 1, 2]), ("stop", [0, 1])])
def test_a_candidate_that_fails_the_gate_is_not_the_next_rounds_start(
    workspace: Workspace, otherwise: str, rounds: list[int]
) -> None:
    gate = {"metric": "win_rate/vs_previous", "minimum": 0.9, "otherwise": otherwise}  # the fake always draws
    fake = run(config_of(workspace, rounds=2, gate=gate))
    records = RunDir(workspace.run_dir).records()
    assert [record.round for record in records] == rounds
    assert [record.decision for record in records[1:]] == [otherwise] * (len(rounds) - 1)
    assert {record.policy_round for record in records} == {0}
    assert (workspace.run_dir / "policy").resolve() == Path(workspace.config["model"]["path"]).resolve()
    initial = fake.loaded[0]
    assert fake.loaded.count(initial) == len(rounds) - 1


def test_trackers_show_a_lineage_of_three_rounds_in_two_starts_as_one_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    dpo = {**workspace.config["dpo"], "trackers": ["tensorboard", "wandb"]}
    for rounds in (2, 3):
        run(config_of(workspace, rounds=rounds, dpo=dpo))
    rows = read_jsonl(workspace.run_dir / "metrics.jsonl")
    logs = [read_jsonl(workspace.run_dir / f"round-00{r}" / "policy" / "train_log.jsonl") for r in (1, 2, 3)]
    steps = [row["loss"] for log in logs for row in log]
    scores = [row["score/heldout_judge"] for row in rows]
    scalars, texts = tensorboard(workspace.run_dir / "trackers")
    ids, points = wandb_offline(workspace.run_dir / "trackers")
    assert len(ids) == 1
    for found in (scalars, points):
        assert found["train/loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(steps, 1)]
        assert found["round/score/heldout_judge"] == [(r, pytest.approx(score)) for r, score in enumerate(scores)]
        assert [value for _, value in found["round/gate/promoted"]] == [
            row["gate/decision"] == "promote" for row in rows
        ]
        assert [round for round, _ in found["round/win_rate/vs_initial"]] == [1, 2, 3]
    assert [round for round, _ in texts["completions"]] == [0, 1, 2, 3]
    tables = points["round/completions"]
    assert [(round, len(table)) for round, table in tables] == [(r, 8) for r in range(4)]
    assert tables[3][1][0].keys() == {"prompt", "completion", "train_judge", "heldout_judge"}


def test_an_engine_that_does_not_sample_from_the_policy_stops_the_run(workspace: Workspace) -> None:
    with pytest.raises(ChildFailed, match=r"does not sample from this policy"):
        run(config_of(workspace, evaluation={}))  # the fake reports -1 for every token


def test_completions_on_which_a_judge_fails_are_unjudged_and_the_run_says_why(workspace: Workspace) -> None:
    def picky(prompt: str, completion: str) -> float:
        if len(completion) % 4 == 0:
            raise RuntimeError(f"no verdict on {completion[:3]!r}")
        return float("nan") if len(completion) % 4 == 1 else len(completion)

    config = config_of(workspace, judge={"use": "given:below", "max_abstained": 0.9})
    fake = FakeSampler(lambda ids, k: "abcdefghij"[: 1 + (sum(ids) + k) % 9])
    run_rounds(config, judge=picky, sampler=fake, prefect=False)
    found = read_run(workspace.run_dir)
    reasons = found.abstentions(1)
    assert any("RuntimeError" in reason for reason in reasons)
    assert any("nan" in reason for reason in reasons)
    judged = found.completions(1)
    assert judged[judged.text.str.len() % 4 < 2].score.isna().all()
    assert judged[judged.text.str.len() % 4 >= 2].score.notna().all()

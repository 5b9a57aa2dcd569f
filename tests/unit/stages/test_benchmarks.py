"""Benchmarks of a policy: a program in place of `lm_eval`, and the real one if it is installed."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from flows.verify import verify
from iterdpo.errors import ChildFailed, ConfigError
from iterdpo.run.artifacts import PolicyCheckpoint
from iterdpo.run.rundir import read_json, read_manifest
from iterdpo.stages.benchmarks import benchmark, benchmark_steps, settings
from iterdpo.stages.plan import first_pending
from tests.unit.stages.harness import Room, finish

STAND_IN = """
import json, pathlib, sys
config = json.loads(pathlib.Path(sys.argv[-1]).read_text())
policy = pathlib.Path(config["model_args"]["pretrained"])
scores = json.loads(pathlib.Path(__file__).with_name("scores.json").read_text())
score = scores.get(policy.parent.name, 0.5)
if score is None:
    raise KeyError("no task named copies")
out = pathlib.Path(config["output_path"]) / "a policy"
out.mkdir(parents=True)
results = {task: {"alias": task, "acc,none": score, "acc_stderr,none": 0.1} for task in config["tasks"]}
(out / "results_2026.json").write_text(json.dumps({"results": results, "higher_is_better": {}}))
"""


@pytest.fixture
def harness(room: Room, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the scores that the stand-in gives, by the directory of the policy's round."""
    package = room.root / "stand-in" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (package / "scores.json").write_text("{}")
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "lm_eval" else find(name, *a))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "lm-eval" else version(name))
    return package / "scores.json"


def test_a_candidate_that_loses_more_than_its_budget_is_not_promoted(room: Room, harness: Path) -> None:
    harness.write_text(json.dumps({"round-001": 0.48, "round-002": 0.3}))
    run = room.open(rounds=2, evaluation={"benchmarks": {"tasks": ["copies"], "max_loss": 0.05}})
    records = finish(run)
    assert [record.decision for record in records] == ["promote", "promote", "keep"]
    assert records[1].reason.endswith(", and the other rule holds")
    assert records[2].reason == "benchmark/max_loss 0.200 is above 0.05; the policy before is kept"
    assert records[2].metrics["benchmark/copies/acc,none"] == 0.3
    assert records[2].gate["rules"] == [{"metric": "benchmark/max_loss", "maximum": 0.05, "otherwise": "keep"}]
    assert [check["holds"] for check in records[2].checks] == [True, False]
    assert first_pending(run) is None
    assert not verify(run.dir.root).problems
    step = run.dir.round_dir(1) / "benchmarks"
    assert sorted(path.name for path in step.iterdir()) == ["MANIFEST.json", "results.json"]
    manifest = read_manifest(step)
    assert manifest is not None
    assert manifest.counts == {"tasks": 1, "lm_eval": "9.9"}


def test_a_rule_of_the_gate_may_name_a_benchmark(room: Room, harness: Path) -> None:
    harness.write_text(json.dumps({"round-001": 0.25}))
    rule = {"metric": "benchmark/copies/acc,none", "max_decrease": 0.1, "against": "initial", "otherwise": "stop"}
    gate = {**room.sections["gate"], "rules": [rule]}
    run = room.open(rounds=2, gate=gate, evaluation={"benchmarks": {"tasks": ["copies"]}})
    records = finish(run)
    assert [record.decision for record in records] == ["promote", "stop"]
    assert records[1].reason.startswith("benchmark/copies/acc,none fell by 0.25 from 0.5 of the initial policy")
    with pytest.raises(ConfigError, match="no metric of the held-out evaluation"):
        room.open(gate=gate)


def test_what_the_harness_says_when_it_fails_is_in_the_error(room: Room, harness: Path) -> None:
    harness.write_text(json.dumps({"round-001": None}))
    run = room.open(rounds=1, evaluation={"benchmarks": {"tasks": ["copies"]}})
    with pytest.raises(ChildFailed, match=r"lm_eval failed: KeyError: 'no task named copies' .*benchmarks\.log"):
        finish(run)
    harness.write_text("{}")
    assert len(finish(run)) == 2  # goes on where it failed


def test_changed_tasks_make_the_step_stale_and_a_changed_budget_decides_again(room: Room, harness: Path) -> None:
    folder = room.root / "tasks"
    folder.mkdir()
    (folder / "copies.yaml").write_text("task: copies")
    section: dict[str, Any] = {"tasks": ["copies"], "include_path": str(folder), "max_loss": 0.05}
    finish(room.open(rounds=1, evaluation={"benchmarks": section}))
    assert first_pending(room.open(rounds=1, evaluation={"benchmarks": section})) is None
    looser = room.open(rounds=1, evaluation={"benchmarks": {**section, "max_loss": 0.5}}, redo=True)
    assert first_pending(looser) == "round-000/round.json"  # its record has the settings, too
    (folder / "copies.yaml").write_text("task: copies\n")
    assert first_pending(room.open(rounds=1, evaluation={"benchmarks": section}, redo=True)) == "round-000/benchmarks"


def test_the_settings_name_the_base_of_an_adapter_and_the_end_of_a_thought(room: Room, harness: Path) -> None:
    run = room.open(
        model={"thinking": {"start": "<think>", "end": "</think>"}, "chat_template_kwargs": {"brief": True}},
        evaluation={"benchmarks": {"tasks": ["copies"], "limit": 3}},
    )
    assert run.config.evaluation.benchmarks is not None
    adapter = room.root / "adapter, of round 1"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    made = settings(run, PolicyCheckpoint(adapter, "81f0", 1), run.config.evaluation.benchmarks, room.root)
    assert made["model_args"] == {
        "pretrained": "base",
        "peft": str(adapter),
        "dtype": "bfloat16",
        "chat_template_args": {"brief": True},
        "think_end_token": "</think>",
    }
    (step,) = benchmark_steps(run, 0, run.initial)
    assert step.inputs["thinking"] == {"start": "<think>", "end": "</think>"}
    assert step.inputs["chat_template_kwargs"] == {"brief": True}
    assert (made["limit"], "num_fewshot" in made) == (3, False)


def test_a_missing_harness_and_a_missing_folder_are_said_at_once(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    with pytest.raises(ConfigError, match=r"'lm_eval' is not installed; run: pip install 'iterdpo\[benchmarks\]'"):
        room.open(evaluation={"benchmarks": {"tasks": ["copies"]}})
    with pytest.raises(ConfigError, match=r"include_path = .*: no such directory"):
        room.open(evaluation={"benchmarks": {"tasks": ["copies"], "include_path": str(room.root / "nowhere")}})


@pytest.mark.slow
def test_the_real_lm_eval_runs_a_local_task(room: Room) -> None:
    pytest.importorskip("lm_eval")
    folder = room.root / "tasks"
    folder.mkdir()
    rows = [{"question": f"Say {i}", "label": i % 2} for i in range(6)]
    data = folder / "copies.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "copies",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "copies.yaml").write_text(json.dumps(task))
    run = room.open(evaluation={"benchmarks": {"tasks": ["copies"], "include_path": str(folder)}})
    with run.dir.lock():
        benchmark(run, 0, run.initial)
    found = read_json(run.dir.round_dir(0) / "benchmarks" / "results.json")
    value, error = found["copies"]["metrics"]["acc,none"]
    assert 0 <= value <= 1
    assert error is not None
    assert (found["copies"]["samples"], found["copies"]["higher_is_better"]) == (6, {"acc": True})

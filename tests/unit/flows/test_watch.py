"""A run that is watched: what is done, how fast, how long it will take; for a terminal and for Prometheus."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from flows.watch import RunCollector, StepState, render, snapshot, sparkline, watch
from iterdpo.errors import UserError
from iterdpo.run.artifacts import write_completion_shard
from iterdpo.run.devices import free_port
from iterdpo.run.rundir import RunDir
from iterdpo.testing import make_group
from iterdpo.types import RoundRecord

METRICS = {"round": 0, "score/train_judge": 0.25, "score/heldout_judge": 0.5, "win_rate/vs_initial": None}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Round 0 has ended; round 1 has sampled two of eight prompts."""
    run = RunDir(tmp_path / "films")
    run.root.mkdir()
    settings = {"rounds": 3, "prompts": {"per_round": 8, "heldout": 4}, "sampling": {"n": 2, "shard_size": 2}}
    run.write_config({**settings, "dpo": {"pairs_per_step": 2, "epochs": 1}})
    run.round_dir(0).mkdir()
    run.write_record(RoundRecord(0, "promote", "", "m", 0, "d", {}, METRICS))
    partial = run.step(1, "completions", {}).begin()
    write_completion_shard(partial / "shard-000000.parquet", [make_group(f"q{i}", ["a", "b"]) for i in range(2)])
    return run


def begun(run: RunDir, step: str) -> float:
    return (run.round_dir(1) / f"{step}.partial" / "STEP.json").stat().st_mtime


def shown(run: RunDir) -> str:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(snapshot(run.root)))
    return console.export_text()


def test_a_step_under_way_has_its_count_its_rate_and_the_time_that_is_left(run: RunDir) -> None:
    now = snapshot(run.root, now=begun(run, "completions") + 4.0)
    assert (now.round, now.rounds, now.state) == (1, 3, "unfinished")
    [step] = now.steps
    assert step == StepState("completions", 2, 8, 4.0, False, "prompts", 0.5)
    assert step.left == 12.0
    text = shown(run)
    assert "round 1 of 3" in text
    assert "2 of 8 prompts" in text
    assert "0.500" in text


def test_training_shows_its_last_step_and_its_losses(run: RunDir) -> None:
    run.step(1, "pairs", {}).begin()
    run.step(1, "pairs", {}).finish(counts={"kept": 8})
    partial = run.step(1, "policy", {}).begin()
    rows: list[dict[str, Any]] = [{"step": s, "loss": 0.7 - s / 10, "pairs_per_second": 4.0} for s in (1, 2)]
    (partial / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = snapshot(run.root).steps[-1]
    assert (step.name, step.done, step.total, step.rate, step.left) == ("policy", 2, 4, 2.0, 1.0)
    assert "step 2: loss 0.5   █▁" in shown(run)
    (partial / "train_log.jsonl").write_text(json.dumps(rows[0]) + '\n{"st')  # half of a line
    assert snapshot(run.root).steps[-1].done == 0


def test_a_finished_step_has_what_it_took(run: RunDir) -> None:
    run.step(1, "completions", {}).finish(counts={"prompts": 8}, seconds={"total": 30.0})
    [step] = snapshot(run.root).steps
    assert (step.finished, step.done, step.unit, step.seconds, step.left) == (True, 8, "prompts", 30.0, None)


def test_every_step_of_a_round_is_shown_in_the_order_of_the_loop(run: RunDir) -> None:
    for name in ("benchmarks", "against", "ema", "others"):
        run.step(1, name, {}).begin()
    assert [step.name for step in snapshot(run.root).steps] == ["completions", "others", "against", "ema", "benchmarks"]


def test_a_damaged_record_is_shown_and_ends_nothing(run: RunDir) -> None:
    (run.round_dir(0) / "round.json").write_text("{")
    text = shown(run)
    assert "damaged" in text
    assert "round.json" in text


def test_without_a_run_there_is_nothing_to_watch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        watch(tmp_path, once=True)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], ""),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([2.0, 2.0], "▁▁"),
        ([0.0, float("nan"), float("inf"), 1.0], "▁█"),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_prometheus_reads_the_figures_of_the_disk(run: RunDir) -> None:
    registry = CollectorRegistry()
    registry.register(RunCollector(run.root))  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    assert 'iterdpo_round{run="films"} 1.0' in text
    assert 'iterdpo_step_done{run="films",step="completions"} 2.0' in text
    assert 'iterdpo_metric{metric="score/heldout_judge",run="films"} 0.5' in text
    assert "win_rate" not in text  # it has none
    with run.lock():
        assert 'iterdpo_at_work{run="films"} 1.0' in generate_latest(registry).decode()


def test_the_port_answers_as_prometheus_asks(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    watch(run.root, once=True, port=port)
    assert "completions" in capsys.readouterr().out
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
        assert b"iterdpo_rounds" in reply.read()
    with pytest.raises(UserError, match=f"--port {port}: .*; choose another"):
        watch(run.root, once=True, port=port)

"""Kill -9 at any moment: no child stays, nothing done is done again, the result is the same to the last bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from iterdpo.run.rundir import read_json, read_jsonl, read_manifest
from tests.integration.harness import Workspace, wait_for

pytestmark = pytest.mark.slow


def sampling(run: Path) -> bool:
    return (run / "round-001" / "completions.partial" / "shard-000001.parquet").exists()


def training(run: Path) -> bool:
    partial = run / "round-001" / "policy.partial"
    log = partial / "train_log.jsonl"
    return any(partial.glob("checkpoint-??????")) and log.exists() and len(log.read_text().splitlines()) >= 3


def evaluating(run: Path) -> bool:
    return (run / "round-001" / "evaluation.partial" / "completions" / "shard-000000.parquet").exists()


def kill_when(workspace: Workspace, moment: Callable[[Path], bool], *options: str) -> None:
    process = workspace.start("run", str(workspace.root / "config.yaml"), *options)
    try:
        wait_for(lambda: moment(workspace.run_dir) or process.poll() is not None, seconds=300, what=moment.__name__)
        assert process.poll() is None, (workspace.root / "output.log").read_text()[-3000:]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not workspace.survivors(), seconds=1.0, what=f"the end of {workspace.survivors()}")


def test_a_run_killed_in_sampling_training_and_evaluation_ends_bit_identical(
    tmp_path: Path, tiny_model: Path, finished: Workspace
) -> None:
    workspace = Workspace(tmp_path / "killed", tiny_model)
    workspace.write(rounds=2)
    run = workspace.run_dir

    kill_when(workspace, sampling)  # with its Prefect server, which must go too
    shards = sorted((run / "round-001" / "completions.partial").glob("shard-*.parquet"))
    before = {shard.name: shard.stat().st_mtime_ns for shard in shards}

    kill_when(workspace, training, "--no-prefect")
    after = {p.name: p.stat().st_mtime_ns for p in (run / "round-001" / "completions").glob("shard-*.parquet")}
    assert before.items() <= after.items()  # no shard that was whole was sampled again
    steps = len(read_jsonl(run / "round-001" / "policy.partial" / "train_log.jsonl"))
    checkpoint = max((run / "round-001" / "policy.partial").glob("checkpoint-??????")).name

    kill_when(workspace, evaluating, "--no-prefect")
    log = read_jsonl(run / "round-001" / "policy" / "train_log.jsonl")
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    # A step's row is on disk before the checkpoint of that step: a resumed log has no gap.
    assert int(checkpoint.removeprefix("checkpoint-")) <= steps

    result = workspace.iterdpo("run", str(workspace.root / "config.yaml"), "--no-prefect")
    assert result.returncode == 0, result.stderr

    for step in (
        "round-001/completions",
        "round-001/pairs",
        "round-001/policy",
        "round-002/completions",
        "round-002/policy",
    ):
        mine, theirs = read_manifest(run / step), read_manifest(finished.run_dir / step)
        assert mine is not None
        assert theirs is not None
        assert mine.digest == theirs.digest, step
    ours, uninterrupted = (w.run_dir / "round-002" / "evaluation" / "metrics.json" for w in (workspace, finished))
    assert read_json(ours) == read_json(uninterrupted)


def test_a_finished_run_does_no_work_and_says_so(finished: Workspace) -> None:
    config = str(finished.root / "config.yaml")
    before = {p: p.stat().st_mtime_ns for p in finished.run_dir.glob("round-*/*/MANIFEST.json")}
    again = finished.iterdpo("run", config)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in finished.run_dir.glob("round-*/*/MANIFEST.json")} == before


def test_a_changed_setting_is_refused_naming_the_key(finished: Workspace) -> None:
    config = str(finished.root / "config.yaml")
    for override, key in (
        ("sampling.temperature=0.5", "sampling.temperature"),
        ("dpo.beta=0.3", "dpo.beta"),
        ("pairing.min_margin=0.1", "pairing.min_margin"),
        ("prompts.per_round=8", "prompts.per_round"),
        ("seed=1", "seed"),
    ):
        result = finished.iterdpo("run", config, override)
        assert result.returncode == 2, override
        assert f"{key} =" in result.stderr, result.stderr
        assert "--redo" in result.stderr

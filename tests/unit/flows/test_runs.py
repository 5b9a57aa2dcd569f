"""Lineages below a folder, read from real run directories."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.runs import as_table, lineages, noted_schedule
from iterdpo.errors import UserError
from iterdpo.run.rundir import RunDir
from iterdpo.types import RoundRecord


def run_of(root: Path, decisions: list[str], *, rounds: int = 3) -> RunDir:
    """A run whose round t ended with `decisions[t]`, and has a held-out score of t / 10."""
    run = RunDir(root)
    root.mkdir(parents=True)
    run.write_config({"rounds": rounds})
    standing = 0
    for number, decision in enumerate(decisions):
        standing = number if decision == "promote" else standing
        metrics: dict[str, Any] = {"round": number, "score/train_judge": 0.9, "score/heldout_judge": number / 10}
        metrics["win_rate/vs_initial"] = 0.5 + number / 10 if number else None
        run.round_dir(number).mkdir()
        path = f"round-{standing:03d}/policy"
        run.write_record(RoundRecord(number, decision, "", path, standing, "d", {}, metrics))  # type: ignore[arg-type]
    return run


def test_each_lineage_has_its_rounds_its_promoted_policy_with_its_score_and_its_state(tmp_path: Path) -> None:
    run_of(tmp_path / "a" / "done", ["promote", "promote", "keep", "keep"])
    run_of(tmp_path / "b", ["promote", "promote", "stop"])
    run_of(tmp_path / "c", ["promote"])
    run_of(tmp_path / "d", ["promote", "promote"]).note_failure("CUDA\nout of memory")
    run_of(tmp_path / "e", [])
    found = {Path(lineage.run).name: lineage for lineage in lineages(tmp_path)}
    assert list(found) == ["done", "b", "c", "d", "e"]
    done = found["done"]
    assert (done.rounds, done.wanted, done.policy_round, done.score, done.wins) == (3, 3, 1, 0.1, 0.6)
    assert [lineage.state for lineage in found.values()] == [
        "done",
        "stopped",
        "unfinished",
        "failed: CUDA\nout of memory",
        "unfinished",
    ]
    assert (found["e"].policy_round, found["e"].score) == (None, None)
    lines = as_table(list(found.values())).splitlines()
    assert len(lines) == 6
    assert lines[1].split() == [
        str(tmp_path / "a" / "done"),
        "3",
        "of",
        "3",
        "round",
        "1",
        "0.100",
        "0.60",
        "done",
        "–",
    ]
    assert "failed: CUDA out of memory" in lines[4]


def test_a_run_that_another_handle_has_locked_is_at_work(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ["promote"])
    with run.lock():
        assert [lineage.state for lineage in lineages(tmp_path)] == ["at work"]
    assert [lineage.state for lineage in lineages(tmp_path)] == ["unfinished"]


def test_the_next_trigger_is_the_schedules_while_it_is_served(tmp_path: Path) -> None:
    run_of(tmp_path / "run", ["promote"])

    def trigger() -> str | None:
        [found] = lineages(tmp_path)
        return found.next_trigger

    assert trigger() is None
    with noted_schedule(tmp_path / "run", "nightly", cron="0 2 * * *", timezone="Asia/Tokyo"):
        said = trigger()
        assert said is not None
        at = datetime.fromisoformat(said)
        assert at > datetime.now(UTC)
        assert (at.hour, at.utcoffset().total_seconds()) == (2, 9 * 3600)  # type: ignore[union-attr]
        left = (tmp_path / "run" / "schedule.json").read_text()
    assert trigger() is None
    with noted_schedule(tmp_path / "run", "nightly", cron=None, timezone="UTC"):
        assert trigger() == "when triggered"
    (tmp_path / "run" / "schedule.json").write_text(left)  # as a process that was killed leaves it
    assert trigger() is None


def test_a_directory_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ["promote"])
    (run.root / "run.json").write_text("{")
    run_of(tmp_path / "sound", ["promote"])
    damaged, sound = lineages(tmp_path)
    assert damaged.state.startswith("unreadable: ")
    assert "run.json" in damaged.state
    assert sound.state == "unfinished"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        lineages(tmp_path / "nowhere")


def test_json_has_the_fields_that_the_table_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "run", ["promote", "promote"])
    with pytest.raises(SystemExit) as ended:
        main(["runs", str(tmp_path), "--json"])
    assert ended.value.code == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["policy_round"] == 1
    assert row["state"] == "unfinished"

"""Trackers: a lineage of several starts is one run in each, read back from real files."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from iterdpo.run import trackers
from iterdpo.run.artifacts import write_completion_shard, write_judgment_shard
from iterdpo.run.rundir import RunDir, write_jsonl
from iterdpo.run.trackers import Trackers, flat, markdown, markdown_table, numbers, shown_completions
from iterdpo.testing import make_group
from iterdpo.types import Judgment, RoundRecord
from tests.unit.run.tracked import tensorboard

STEPS = 2


def record(round: int, **metrics: Any) -> RoundRecord:
    found = {"round": round, "win_rate/vs_initial": 0.5 + round / 8, "kl/to_initial": None, "gate/reason": "won"}
    return RoundRecord(round, "keep" if round == 2 else "promote", "won", "p", round, "d", {}, found | metrics)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Rounds 0 to 2 on disk: their evaluations and training logs."""
    run = RunDir(tmp_path / "imdb")
    run.root.mkdir()
    run.write_config({"rounds": 2})
    for round in range(3):
        groups = [make_group(f"Tale {i}?", [f"Once | <b>upon</b>\na time {round}", "no"]) for i in range(10)]
        evaluation = run.round_dir(round) / "evaluation"
        (evaluation / "completions").mkdir(parents=True)
        write_completion_shard(evaluation / "completions" / "shard-000000.parquet", groups)
        judged = evaluation / "judgments" / "train_judge"
        judged.mkdir(parents=True)
        scores = [Judgment(g.prompt.id, [round / 2, None], [None, "no"]) for g in groups]
        write_judgment_shard(judged / "shard-000000.jsonl", scores)
        if round:
            (run.round_dir(round) / "policy").mkdir()
            write_jsonl(
                run.round_dir(round) / "policy" / "train_log.jsonl", [row(round, s) for s in range(1, STEPS + 1)]
            )
    return run


def row(round: int, step: int) -> dict[str, Any]:
    return {"step": step, "loss": round + step / 10, "alarms": ["margin: large"]}


def opened(run: RunDir, *names: str, said: list[str] | None = None) -> Trackers:
    said = [] if said is None else said
    return Trackers(names, project="tales", run=run, config={"dpo.beta": 0.1}, say=said.append)


def lineage(run: RunDir, *names: str, said: list[str] | None = None) -> None:
    """Rounds 0 and 1 in one start, and 2 in a second, which finds 0 and 1 done."""
    first = opened(run, *names, said=said)
    first.round(record(0))
    for step in range(1, STEPS + 1):
        first.steps(1, row(1, step))
    first.round(record(1))
    first.close()
    second = opened(run, *names, said=said)
    second.round(record(0))
    second.round(record(1))
    for step in range(1, STEPS + 1):
        second.steps(2, row(2, step))
    second.round(record(2))
    second.close()


LOSSES = [(1, 1.1), (2, 1.2), (3, 2.1), (4, 2.2)]
WINS = [(0, 0.5), (1, 0.625), (2, 0.75)]
PROMOTED = [(0, 1.0), (1, 1.0), (2, 0.0)]


def test_tensorboard_shows_a_lineage_of_two_starts_as_one_run(run: RunDir) -> None:
    said: list[str] = []
    lineage(run, "tensorboard", said=said)
    scalars, texts = tensorboard(run.root / "trackers")
    assert scalars["train/loss"] == [(step, pytest.approx(loss)) for step, loss in LOSSES]
    assert scalars["round/win_rate/vs_initial"] == WINS
    assert scalars["round/gate/promoted"] == PROMOTED
    assert texts["round/gate"][2] == (2, "keep: won")
    assert [step for step, _ in texts["completions"]] == [0, 1, 2]
    table = texts["completions"][1][1].splitlines()
    assert table[0] == "| prompt | completion | train_judge | heldout_judge |"
    assert table[2] == r"| Tale 0? | Once \| &lt;b&gt;upon&lt;/b&gt; ↵ a time 1 | 0\.5 | – |"
    assert len(table) == 10
    assert "train/step" not in scalars
    assert "round/round" not in scalars
    assert said == [f"  tracker   tensorboard: tensorboard --logdir {run.root}/trackers/tensorboard"] * 2


def test_mlflow_shows_a_lineage_of_two_starts_as_one_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.root}/mlflow.db")
    monkeypatch.chdir(run.root)  # where its artifacts go
    mlflow.set_tracking_uri(f"sqlite:///{run.root}/mlflow.db")
    said: list[str] = []
    lineage(run, "mlflow", said=said)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tales")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]

    assert history("train/loss") == LOSSES
    assert history("round/win_rate/vs_initial") == WINS
    assert found.data.tags["gate.round-002"] == "keep: won"
    artifacts = [artifact.path for artifact in client.list_artifacts(found.info.run_id, "completions")]
    assert artifacts == [f"completions/round-00{round}.json" for round in range(3)]


def test_trackio_shows_a_lineage_of_two_starts_as_one_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run.root / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    lineage(run, "trackio")
    (name,) = SQLiteStorage.get_runs("tales")
    assert name.startswith("imdb-")
    logs = SQLiteStorage.get_logs("tales", name)
    assert [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log] == LOSSES
    assert [(log["step"], log["round/win_rate/vs_initial"]) for log in logs if "round/completions" in log] == WINS


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    opens: list[str] = []

    def broken(*_: Any) -> Any:
        opens.append("broken")
        raise OSError("the network\nis down")

    monkeypatch.setitem(trackers.OPENERS, "wandb", broken)
    said: list[str] = []
    lineage(run, "wandb", "tensorboard", said=said)
    assert opens == ["broken"] * 2  # once a start
    lost = "  tracker   wandb: OSError: the network is down; nothing more is sent there until the next start"
    assert [line for line in said if "wandb" in line] == [lost] * 2
    scalars, _ = tensorboard(run.root / "trackers")
    assert scalars["round/win_rate/vs_initial"] == WINS


def test_rounds_that_a_tracker_missed_are_sent_at_the_next_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.delitem(trackers.OPENERS, "tensorboard")
        lineage(run, "tensorboard")
    assert not (run.root / "trackers" / "tensorboard").exists()
    lineage(run, "tensorboard")
    scalars, _ = tensorboard(run.root / "trackers")
    assert scalars["round/win_rate/vs_initial"] == WINS


def test_a_round_that_was_done_again_is_sent_again(run: RunDir) -> None:
    lineage(run, "tensorboard")
    again = opened(run, "tensorboard")
    again.round(record(1, **{"win_rate/vs_initial": 0.75}))
    again.close()
    scalars, _ = tensorboard(run.root / "trackers")
    assert sorted(scalars["round/win_rate/vs_initial"]) == [(0, 0.5), (1, 0.625), (1, 0.75), (2, 0.75)]


def test_a_tracker_that_hangs_costs_no_more_than_the_patience(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = threading.Event()

    class Hanging:
        place = "nowhere"

        def __init__(self, *_: Any) -> None:
            hold.wait()

    monkeypatch.setitem(trackers.OPENERS, "wandb", Hanging)
    monkeypatch.setattr(trackers, "PATIENCE", 0.01)
    said: list[str] = []
    hanging = opened(run, "wandb", said=said)
    hanging.round(record(0))
    hanging.close()
    assert said == ["  tracker   wandb: not everything was sent within 0.01 s; the run goes on without"]
    hold.set()


def test_wandb_without_a_login_does_not_ask_on_the_terminal(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = ModuleType("wandb")
    wandb.api = type("Api", (), {"api_key": None})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    lineage(run, "wandb", said=said)
    assert "wandb: ValueError: not logged in: run `wandb login`, or set WANDB_MODE=offline" in said[0]


def test_without_trackers_nothing_is_written(run: RunDir) -> None:
    lineage(run)
    assert not (run.root / "trackers").exists()
    assert "trackers" not in {thread.name for thread in threading.enumerate()}


def test_only_finite_numbers_are_metrics() -> None:
    mixed = {"a": 1, "b": 0.5, "c": None, "d": "text", "e": float("nan"), "f": float("inf"), "g": True, "h": [1]}
    assert numbers(mixed) == {"a": 1.0, "b": 0.5, "g": 1.0}


def test_an_offline_round_has_no_completions_to_show(run: RunDir) -> None:
    assert shown_completions(run, 7) == []
    shown: Sequence[dict[str, Any]] = shown_completions(run, 2)
    assert [line["prompt"] for line in shown] == [f"Tale {i}?" for i in range(8)]
    assert shown[0]["train_judge"] == 1.0


def test_untrusted_text_is_neither_markdown_nor_html() -> None:
    assert markdown("# a | <script> [x](y)\n`z`") == r"\# a \| &lt;script&gt; \[x\]\(y\) ↵ \`z\`"
    assert markdown_table([{"a": None, "b": "x|y"}]).splitlines() == ["| a | b |", "| --- | --- |", r"| – | x\|y |"]


def test_settings_are_flat_and_plain() -> None:
    assert flat({"a": {"b": 1, "c": None}, "d": ["x"]}) == {"a.b": 1, "a.c": "None", "d": "['x']"}

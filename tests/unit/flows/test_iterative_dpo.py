"""What the alarms of a served run hear of its rounds; tests/integration has the flows on a real server."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import iterative_dpo
from flows.alarms import ENDED, NOT_PROMOTED, STARTED
from flows.iterative_dpo import iterate
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir
from iterdpo.types import RoundRecord


def decide(run: RunDir, round: int, decision: Any) -> None:
    run.round_dir(round).mkdir(parents=True)
    run.write_record(RoundRecord(round, decision, "why", "model", 0, "", {}, {"round": round}))


@pytest.mark.parametrize(
    ("done", "told"),
    [
        (["promote", "keep"], [(STARTED, 2), (ENDED, 2), (NOT_PROMOTED, 2)]),
        (["promote", "keep", "keep"], []),
        (["promote", "stop"], []),
    ],
)
def test_alarms_hear_of_rounds_under_way_and_not_again_of_those_that_were_decided_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: list[str], told: list[tuple[str, int]]
) -> None:
    directory = RunDir(tmp_path)
    directory.write_config({})
    for round, decision in enumerate(done):
        decide(directory, round, decision)
    monkeypatch.setattr(iterative_dpo, "flow", lambda **_: lambda function: function)
    monkeypatch.setattr(iterative_dpo, "run_round", lambda _run, round, _do: decide(directory, round, "keep"))
    monkeypatch.setattr(iterative_dpo, "first_pending_of", lambda *_: None)
    for name in ("describe", "report"):
        monkeypatch.setattr(iterative_dpo, name, lambda _: "")
    heard: list[tuple[str, int]] = []
    alarms: Any = SimpleNamespace(tell=lambda event, round, **_: heard.append((event, round)))
    config = SimpleNamespace(rounds=2, keep="all")
    run: Any = SimpleNamespace(dir=directory, config=config, progress=Progress(io.StringIO()), waiting=None)
    assert len(iterate(run, alarms)) == (2 if done[-1] == "stop" else 3)
    assert heard == told

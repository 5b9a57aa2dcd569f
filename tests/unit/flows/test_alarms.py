"""What an alarm says, and what `--notify` takes. tests/integration/test_nights.py has alarms that arrive."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.server.utilities.user_templates import render_user_template_sync
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.alarms import CRASHED, Alarms, Told, _action, targets
from iterdpo.errors import ConfigError
from iterdpo.run.devices import free_port
from iterdpo.run.rundir import RunDir

HOSTILE = 'he said "no"\n\\ {{ event }} <script> ‮'


def rendered(template: str, **payload: Any) -> str:
    return render_user_template_sync(template, {"event": SimpleNamespace(payload=payload)})


def test_a_webhook_gets_json_whatever_is_in_the_reason() -> None:
    alarm = {"alarm": "failed round", "run": "a {{ b }}", "round": 3, "reason": HOSTILE}
    action: Any = _action(uuid4(), True, Told())
    assert json.loads(rendered(action.payload, **alarm)) == alarm


def test_a_message_has_run_and_round_in_its_subject_and_the_reason_in_its_body() -> None:
    action: Any = _action(uuid4(), False, Told(alarm="{{ 'hung round'"))
    alarm = {"run": "films", "round": 3, "reason": HOSTILE}
    assert rendered(action.subject, **alarm) == "iterdpo: films, round 3: hung round"
    assert rendered(action.body, **alarm) == HOSTILE


def test_a_crash_that_a_worker_reports_is_a_failed_round_of_an_unknown_number() -> None:
    action: Any = _action(uuid4(), True, CRASHED)
    crashed = SimpleNamespace(name="films", state=SimpleNamespace(message=HOSTILE))
    said = json.loads(render_user_template_sync(action.payload, {"flow_run": crashed}))
    assert said == {"alarm": "failed round", "run": "films", "round": None, "reason": HOSTILE}


@pytest.mark.parametrize("target", ["https://a.example/x?y=1", "http://127.0.0.1:80/", "slack-webhook/ops"])
def test_urls_and_blocks_are_targets(target: str) -> None:
    assert targets([target]) == [target]


@pytest.mark.parametrize("target", ["", "ops", "https://", "ftp://a.example", "mailto:ops@a.example", "a/b/c", "a b"])
def test_anything_else_is_refused_by_its_place_and_not_shown(target: str) -> None:
    with pytest.raises(ConfigError, match="--notify, number 2: not a target; give the URL of a webhook") as refused:
        targets(["https://a.example", target])
    assert not target or f"{target!r}" not in str(refused.value)


def test_targets_of_the_environment_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERDPO_NOTIFY", " https://a.example/1  slack-webhook/ops ")
    assert targets() == ["https://a.example/1", "slack-webhook/ops"]
    assert "ITERDPO_NOTIFY" not in os.environ
    assert targets() == []


def test_a_server_that_takes_no_event_ends_no_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nobody = temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"})
    failed = Alarms(uuid4(), "films").of_failures(RunDir(tmp_path))
    with nobody, pytest.raises(KeyError, match="gold"), failed:
        raise KeyError("gold")
    assert "did not take iterdpo.round.failed" in caplog.text

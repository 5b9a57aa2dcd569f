"""What `iterdpo deploy` refuses before it asks a server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deploy import TEMPLATE, _ensure_pool, deploy, remove
from iterdpo.errors import ConfigError, UserError
from iterdpo.run.devices import free_port
from iterdpo.run.progress import Progress


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(9)))
    (tmp_path / "judge.py").write_text("def score(completion):\n    return len(completion)\n")
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_round": 2, "heldout": 2},
        "judge": {"use": f"{tmp_path / 'judge.py'}:score"},
    }
    path = tmp_path / "configs" / "films.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "a/b"}, "--name 'a/b'"),
        ({"rounds": 0}, "--add 0"),
        ({"hung_after": 0.0}, "--hung-after 0"),
        ({"cron": "nightly"}, "--cron 'nightly': not a cron string"),
        ({"cron": "0 2 * * *", "timezone": "Berlin"}, "--timezone 'Berlin'"),
        ({"notify": ["ops"]}, "--notify, number 1"),
        ({"folder": "elsewhere"}, "not below the folder"),
        ({"check": "/labelled.jsonl"}, "not below the folder"),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(config: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        deploy(config, pool="gpus", progress=Progress(), **options)


def test_without_a_server_that_stays_there_is_no_work_pool(config: Path) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with pytest.raises(UserError, match="PREFECT_API_URL is not set: a work pool belongs to a Prefect server"):
            deploy(config, pool="gpus", progress=Progress())
        with pytest.raises(UserError, match="PREFECT_API_URL is not set"):
            remove(config, progress=Progress())
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}),
        pytest.raises(UserError, match="does not answer as a Prefect server does"),
    ):
        deploy(config, pool="gpus", progress=Progress())
    assert not (config.parent.parent / "run").exists()


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        (TEMPLATE, ""),
        ({}, ""),
        ({"variables": {"properties": {"name": {}, "env": {}, "command": {}}}}, "can set its command, env, and so run"),
    ],
)
def test_a_pool_whose_triggers_may_run_any_command_is_warned_of(template: dict[str, Any], warned: str) -> None:
    there = SimpleNamespace(type="process", base_job_template=template)
    said = io.StringIO()
    client: Any = SimpleNamespace(read_work_pool=lambda name: there)
    assert not _ensure_pool(client, "gpus", Progress(said))
    assert (warned in said.getvalue()) if warned else not said.getvalue()


def test_a_file_that_a_trigger_could_not_name_is_refused(config: Path) -> None:
    hidden = config.rename(config.with_name(".films.yaml"))
    with pytest.raises(ConfigError, match="a trigger cannot name this file"):
        deploy(hidden, pool="gpus", progress=Progress())

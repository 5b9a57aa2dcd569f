"""What a trigger of a served deployment may set."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.server import FAILED, PrefectAPI
from flows.serving import OVERRIDABLE, _trouble, overridden, serve
from iterdpo.config import Config, parse_config
from iterdpo.errors import ConfigError
from iterdpo.run.devices import free_port
from iterdpo.run.progress import Progress


@pytest.fixture
def config(tmp_path: Path) -> Config:
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "model"},
        "prompts": {"path": "prompts.jsonl", "per_round": 8},
        "judge": {"use": "length"},
        "dpo": {"beta": 0.2},
    }
    return parse_config(Config, values)


def test_a_trigger_sets_rounds_and_numbers_and_leaves_the_rest_as_it_was_served(config: Config) -> None:
    changed = overridden(config, 7, {"sampling.engine.max_num_seqs": 64, "judge.max_abstained": 0.5})
    assert (changed.rounds, changed.sampling.engine.max_num_seqs, changed.judge.max_abstained) == (7, 64, 0.5)
    served = {"rounds": config.rounds, "sampling": config.sampling, "judge": config.judge}
    assert changed.model_copy(update=served) == config


@pytest.mark.parametrize("key", ["model.path", "model.trust_remote_code", "judge.use", "judge.args", "run_dir", "dpo"])
def test_a_trigger_cannot_set_a_key_that_is_not_on_the_list(config: Config, key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' cannot be set by a trigger; sampling.engine.max_num_seqs, "):
        overridden(config, 1, {key: 1})


@pytest.mark.parametrize("key", OVERRIDABLE)
@pytest.mark.parametrize("value", ["16", "1\nmodel: {path: x}", True, None, ["a"], {"path": "x"}])
def test_a_trigger_sets_nothing_but_numbers(config: Config, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"overrides: {key} = .* is not a number"):
        overridden(config, 1, {key: value})


def test_a_number_out_of_range_is_refused_with_its_key(config: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"sampling\.engine\.max_num_seqs = 0: input should be greater than or equal to 1"
    ):
        overridden(config, 1, {"sampling.engine.max_num_seqs": 0})
    with pytest.raises(ConfigError, match="rounds = 0: input should be greater than or equal to 1"):
        overridden(config, 0, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timezone": "Berlin"}, "--timezone 'Berlin': not a time zone; give its name as in 'Europe/Berlin'"),
        ({"timezone": "europe/berlin"}, "as in 'Europe/Berlin'"),
        ({"timezone": "UTC+2"}, "--timezone 'UTC\\+2': not a time zone; give its name as in '"),
        ({"timezone": ""}, "--timezone '': not a time zone"),
        ({"timezone": "../etc/passwd", "cron": "0 2 * * *"}, "not a time zone"),
        ({"cron": "every night"}, "--cron 'every night': not a cron string"),
        ({"name": "a/b"}, "--name 'a/b': a deployment's name has no / and no %"),
        ({"name": ".."}, "--name '..': a deployment's name has no"),
        ({"rounds": 0}, "--add 0: a trigger adds at least one round"),
        ({"hung_after": 0.0}, "--hung-after 0: not a number of hours"),
        ({"hung_after": float("nan")}, "--hung-after nan: not a number of hours"),
        ({"notify": ["ops@example.org"]}, "--notify, number 1: not a target"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line_before_anything_is_served(
    config: Config, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        serve(config, progress=Progress(), **options)
    assert "\n" not in str(refused.value)


def test_a_scheduler_that_fails_later_is_told_with_its_reason_and_its_log(tmp_path: Path) -> None:
    log = tmp_path / "prefect.log"
    log.write_text(f"INFO all is well\n{FAILED}schedule_deployments(): OperationalError: disk full\n")
    trouble = _trouble(PrefectAPI("http://127.0.0.1:1/api", tmp_path / "password", log), uuid4())
    assert trouble is not None
    assert "schedule_deployments(): OperationalError: disk full" in trouble
    assert str(log) in trouble


def test_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    api = PrefectAPI(f"http://127.0.0.1:{free_port()}/api")
    with temporary_settings({PREFECT_API_URL: api.url}):
        assert "does not answer" in str(_trouble(api, uuid4()))

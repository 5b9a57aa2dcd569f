"""What the flows of a work pool take. tests/integration/test_pool.py runs them on a worker."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.schema_tools.validation import is_valid
from pydantic import ValidationError

from flows import pool
from flows.pool import Overrides, below_folder, configurations
from flows.serving import OVERRIDABLE
from iterdpo.errors import ConfigError

ROOT = Path(__file__).parents[3]
SHIPPED = yaml.safe_load((ROOT / "prefect.yaml").read_text())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment's folder, with one configuration in it and one beside it."""
    for name in ("ITERDPO_CONFIGURATIONS", "ITERDPO_HOME", "ITERDPO_IF_BUSY"):
        monkeypatch.setenv(name, "")
    (tmp_path / "configs" / "more").mkdir(parents=True)
    (tmp_path / "configs" / "more" / "films.yaml").write_text("rounds: 1\n")
    (tmp_path / "outside.yaml").write_text("rounds: 1\n")
    configurations(folder=str(tmp_path / "configs"), home=str(tmp_path))
    return tmp_path / "configs"


def test_overrides_are_the_keys_that_a_trigger_may_set_by_their_last_names_with_the_limits_of_the_configuration() -> (
    None
):
    assert list(Overrides.model_fields) == [key.rpartition(".")[2] for key in OVERRIDABLE]
    assert Overrides(max_abstained=0.5, checkpoint_every=3).model_dump(exclude_none=True) == {  # type: ignore[call-arg]
        "max_abstained": 0.5,
        "checkpoint_every": 3,
    }
    for wrong in ({"max_abstained": 1.5}, {"checkpoint_every": 0}, {"kv_cache_gib": "x"}, {"use": "a.py:f"}):
        with pytest.raises(ValidationError):
            Overrides(**wrong)


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ({"configuration": "films.yaml"}, True),
        ({"configuration": "more/films-2.yaml", "rounds": 3, "overrides": {"max_num_seqs": 8}}, True),
        ({"configuration": "films.yaml", "overrides": {"max_num_seqs": None}}, True),
        ({"configuration": "/films.yaml"}, False),
        ({"configuration": "../films.yaml"}, False),
        ({"configuration": "more/../films.yaml"}, False),
        ({"configuration": ".hidden/films.yaml"}, False),
        ({"configuration": "more//films.yaml"}, False),
        ({"configuration": ""}, False),
        ({"configuration": "films.yaml", "rounds": 0}, False),
        ({"configuration": "films.yaml", "overrides": {"max_num_seqs": 0}}, False),
        ({"configuration": "films.yaml", "overrides": {"judge.use": "a.py:f"}}, False),
        ({}, False),
    ],
)
def test_the_schema_from_which_the_page_draws_its_form_refuses_bad_values(given: dict[str, Any], valid: bool) -> None:
    assert is_valid(given, pool.add_rounds.parameters.model_dump(exclude_unset=True)) is valid


def test_a_configuration_is_found_below_the_folder_alone(folder: Path) -> None:
    assert below_folder("more/films.yaml") == (folder / "more" / "films.yaml").resolve()
    (folder / "link.yaml").symlink_to(folder.parent / "outside.yaml")
    for outside in ("../outside.yaml", "link.yaml", str(folder.parent / "outside.yaml")):
        with pytest.raises(ConfigError, match="outside of the deployment's folder"):
            below_folder(outside)
    (folder / "link.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no such file in .*; there are more/films\.yaml"):
        below_folder("films.yaml")


@pytest.mark.parametrize("deployment", SHIPPED["deployments"], ids=lambda deployment: deployment["name"])
def test_each_shipped_deployment_names_a_flow_with_parameters_that_it_takes(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert is_valid(deployment["parameters"], flow.parameters.model_dump(exclude_unset=True))
    work_pool = deployment["work_pool"]
    kind = work_pool["name"].removesuffix("-gpus")
    if "job_variables" in work_pool:
        variables = json.loads((ROOT / "configs" / "pools" / f"{kind}.json").read_text())["variables"]
        assert is_valid(work_pool["job_variables"], variables)


def test_the_shipped_step_is_the_one_that_the_flows_need() -> None:
    [step] = SHIPPED["pull"]
    assert list(step) == ["flows.pool.configurations"]
    assert set(step["flows.pool.configurations"]) == {"folder", "home", "if_busy"}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_job_template_has_the_variables_that_it_declares_and_takes_no_others(kind: str) -> None:
    template = json.loads((ROOT / "configs" / "pools" / f"{kind}.json").read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    assert is_valid({}, template["variables"])
    code = {"command": "true", "env": {"PYTHONPATH": "/tmp"}, "image": "x", "volumes": ["/:/srv/iterdpo"], "claim": "x"}
    for name, value in code.items():  # each of which would let a trigger choose code or files
        assert not is_valid({name: value}, template["variables"])

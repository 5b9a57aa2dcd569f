"""The flows that workers of a Prefect work pool run: rounds of a lineage, an offline round, a check of a judge.

`iterdpo deploy` and `prefect.yaml` make deployments of them. A parameter names a configuration below the folder that the
deployment was made with, which `configurations`, a step before the flow, tells this process: no trigger can change it.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from flows.iterative_dpo import add_rounds_to  # before Prefect: it turns the analytics off

from prefect import flow, get_run_logger  # isort: skip
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from flows.alarms import ENDED, STARTED, Alarms
from flows.api import describe, train_offline
from flows.deployment import FLOW
from flows.judge_cli import OutputOptions, ReadingOptions, check
from flows.serving import OVERRIDABLE
from iterdpo.config import Config, load_any_config, load_config, load_offline_config
from iterdpo.errors import ConfigError, RunFailed, RunLockedError, UserError
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir
from iterdpo.run.supervise import end_soon, end_with

P = ParamSpec("P")
R = TypeVar("R")

NAME = r"[\w-][\w .-]*"
BELOW = rf"^{NAME}(/{NAME})*$"
"""A path below a folder: no part of it begins with a dot."""
FOLDER, HOME, IF_BUSY = "ITERDPO_CONFIGURATIONS", "ITERDPO_HOME", "ITERDPO_IF_BUSY"

Configuration = Annotated[
    str, Field(pattern=BELOW, description="A configuration: its file below the deployment's folder, such as films.yaml")
]
Rounds = Annotated[int, Field(ge=1, description="Rounds to add to the lineage, from its last policy")]
Data = Annotated[str, Field(pattern=BELOW, description="Labelled pairs: a file below the deployment's folder")]


def _field(key: str) -> FieldInfo:
    section: type[BaseModel] = Config
    *sections, name = key.split(".")
    for part in sections:
        section = cast("type[BaseModel]", section.model_fields[part].annotation)
    field = copy(section.model_fields[name])
    field.default = None
    return field


def _overrides() -> type[BaseModel]:
    """The keys of `OVERRIDABLE` by their last names, as optional fields with the limits and the texts of the configuration."""
    fields: dict[str, Any] = {}
    for key in OVERRIDABLE:
        field = _field(key)
        fields[key.rpartition(".")[2]] = (field.annotation | None, field)  # type: ignore[operator]
    return create_model("Overrides", __config__=ConfigDict(extra="forbid"), **fields)


if TYPE_CHECKING:
    Overrides = BaseModel
else:
    Overrides = _overrides()


def configurations(*, folder: str, home: str, if_busy: str = "wait") -> dict[str, str]:
    """A step of a deployment: the folder of its configurations, the directory that paths in them are relative to, and
    whether a trigger that finds a run at work is to `wait` or to `drop`.
    """
    os.environ.update({FOLDER: folder, HOME: home, IF_BUSY: if_busy})
    return {"folder": folder}


def below_folder(name: str) -> Path:
    """The file `name` in the deployment's folder.

    Raises:
        ConfigError: there is none, or it lies outside.
    """
    folder = Path(os.environ[FOLDER]).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ConfigError(f"{name!r}: outside of the deployment's folder {folder}; copy the file there")
    if not path.is_file():
        there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))[:20]
        raise ConfigError(f"{name!r}: no such file in {folder}; there are {', '.join(there) or 'no configurations'}")
    return path


def run_name() -> str:
    """The run directory's name, for a flow run; the name of the configuration if that cannot be read."""
    name = str(flow_run.parameters.get("configuration"))
    try:
        return Path(load_any_config(below_folder(name)).run_dir).name
    except (UserError, KeyError):
        return name


def _in_worker(work: Callable[P, R]) -> Callable[P, R]:
    """Run in the deployment's directory, and end with the worker, by SIGKILL too."""

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        end_with(os.getppid())
        end_soon()
        os.chdir(os.environ[HOME])
        return work(*args, **kwargs)

    return run


@flow(name=FLOW, flow_run_name=run_name, persist_result=False)
@_in_worker
def add_rounds(
    configuration: Configuration, rounds: Rounds = 1, overrides: Overrides | None = None
) -> str | State[Any]:
    """Add rounds to the lineage of a configuration, from its last policy, on prompts not used before."""
    config = load_config(below_folder(configuration))
    given = {} if overrides is None else overrides.model_dump(exclude_none=True)
    numbers = {key: given[name] for key in OVERRIDABLE if (name := key.rpartition(".")[2]) in given}
    try:
        return add_rounds_to(config, rounds, numbers, wait=os.environ[IF_BUSY] == "wait")
    except RunLockedError as error:
        return Cancelled(message=f"dropped: {error}")


@flow(name="offline_round", flow_run_name=run_name, persist_result=False)
@_in_worker
def offline_round(configuration: Configuration) -> str:
    """Train one offline round on the pairs that a configuration names."""
    config = load_offline_config(below_folder(configuration))
    directory = RunDir(config.run_dir)
    alarms = Alarms(deployment.id, directory.root.name)
    with alarms.of_failures(directory), open(directory.log_path("rounds"), "a", encoding="utf-8") as log:
        alarms.tell(STARTED, 1)
        run = train_offline(config, progress=Progress(log))
        alarms.tell(ENDED, 1)
    return describe(run.dir.records()[-1].metrics)


@flow(name="judge_check", flow_run_name="{configuration} on {data}", persist_result=False)
@_in_worker
def judge_check(configuration: Configuration, data: Data, limit: Annotated[int, Field(ge=1)] | None = None) -> str:
    """Measure the judge of a configuration on labelled pairs; the figures are an artifact of the flow run."""
    path, labelled = below_folder(configuration), below_folder(data)
    with redirect_stdout(io.StringIO()) as printed:
        status = check(
            str(path), data=str(labelled), reading=ReadingOptions(limit=limit), output=OutputOptions(json=None)
        )
    said = printed.getvalue()
    get_run_logger().info(said)
    key = "judge-check-" + "".join(c if c.isalnum() else "-" for c in Path(configuration).stem.lower()).strip("-")
    create_markdown_artifact(key=key, markdown=f"```\n{said}\n```", description=f"{configuration} on {data}")
    if status:
        raise RunFailed(f"the check of {configuration} ended with status {status}")
    return said.partition("\n")[0]

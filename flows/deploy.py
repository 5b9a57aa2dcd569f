"""`iterdpo deploy`: a deployment of one of the flows in `flows.pool` on the user's Prefect server, for a work pool."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows import alarms
from flows.deployment import FLOW
from flows.runs import SCHEDULE
from flows.server import check_api
from flows.serving import check_options, schedule_of
from iterdpo.config import Config, JudgesConfig, OfflineConfig, load_any_config, load_judges_config
from iterdpo.errors import ConfigError, UserError
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import write_json

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

IfBusy = Literal["wait", "drop"]
TEMPLATE = {
    "job_configuration": {"env": {"PYTHONSAFEPATH": "1"}, "stream_output": True},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
"""Of the process pools that we make: a trigger sets no command and no variable of the environment."""


def deploy(
    path: str | Path,
    *,
    pool: str,
    folder: str | Path | None = None,
    check: str | None = None,
    name: str | None = None,
    cron: str | None = None,
    timezone: str = "UTC",
    rounds: int = 1,
    if_busy: IfBusy = "wait",
    notify: Sequence[str] = (),
    hung_after: float = 24.0,
    progress: Progress,
) -> None:
    """Create or replace a deployment of the configuration in `path`, and the pool if there is none of this name.

    A configuration with a section `data` becomes an offline round; with `check`, a file of labelled pairs, its judge is
    checked. Triggers may name other configurations below `folder`, by default the one that holds `path`. Paths in them are
    relative to the current directory.

    Raises:
        ConfigError: an argument is invalid.
        UserError: no Prefect server is configured, or the configuration has a problem that `iterdpo run` would find.
    """
    from flows import pool as flows

    path, home = Path(path).resolve(), Path.cwd()
    folder = path.parent if folder is None else Path(folder).resolve()
    name = name or path.stem
    check_options(name, rounds=rounds, hung_after=hung_after)
    schedule_of(cron, timezone)
    notify = alarms.targets(notify)
    parameters: dict[str, Any] = {"configuration": _below(path, folder)}
    config: Config | OfflineConfig | JudgesConfig
    flow: Any
    if check is not None:
        config, flow = load_judges_config(path), flows.judge_check
        parameters["data"] = _below(Path(check).resolve(), folder)
    else:
        config = load_any_config(path)
        flow = flows.offline_round if isinstance(config, OfflineConfig) else flows.add_rounds
        if isinstance(config, Config):
            parameters["rounds"] = rounds
    _check_server()
    _check(config)

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
    from prefect.client.schemas.schedules import CronSchedule

    clocks = [] if cron is None else [CronSchedule(cron=cron, timezone=timezone)]
    strategy = ConcurrencyLimitStrategy.ENQUEUE if if_busy == "wait" else ConcurrencyLimitStrategy.CANCEL_NEW
    step = {"folder": str(folder), "home": str(home), "if_busy": if_busy}
    with get_client(sync_client=True) as client:
        _check_not_served(client, f"{flow.name}/{name}")
        made = _ensure_pool(client, pool, progress)
        deployment = client.create_deployment(
            client.create_flow_from_name(flow.name),
            name,
            entrypoint=f"{flows.__name__}.{flow.fn.__name__}",
            pull_steps=[{f"{flows.__name__}.{flows.configurations.__name__}": step}],
            work_pool_name=pool,
            parameters=parameters,
            parameter_openapi_schema=flow.parameters.model_dump(exclude_unset=True) | {"additionalProperties": False},
            enforce_parameter_schema=True,
            description=flow.description,
            schedules=[DeploymentScheduleCreate(schedule=clock) for clock in clocks],
            concurrency_limit=1,
            concurrency_options=ConcurrencyOptions(collision_strategy=strategy),
            paused=False,
        )
    alarms.remove(f"{flow.name}/{name}")
    if notify:
        alarms.create(deployment, f"{flow.name}/{name}", notify, hung_after=hung_after, in_pool=True)
    if isinstance(config, Config):
        note = Path(config.run_dir) / SCHEDULE
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"name": name, "pool": pool, "cron": cron, "timezone": timezone})
    progress.say(f"deployed {flow.name}/{name} to the {'new ' if made else ''}work pool {pool}")
    progress.say(f"  when:    {f'at {cron} ({timezone})' if cron else 'when triggered'}")
    progress.say(f"  folder:  {folder} (configurations that a trigger may name)")
    progress.say(f"  worker:  prefect worker start --pool {pool}")
    progress.say(f"  trigger: prefect deployment run {flow.name}/{name}")


def remove(path: str | Path, *, name: str | None = None, check: bool = False, progress: Progress) -> None:
    """Delete the deployment of a configuration, its automations and its note in the run directory.

    Raises:
        UserError: no Prefect server is configured, or it has no such deployment.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    name = name or Path(path).stem
    config = load_judges_config(path) if check else load_any_config(path)
    flow = {Config: FLOW, OfflineConfig: "offline_round", JudgesConfig: "judge_check"}[type(config)]
    _check_server()
    with get_client(sync_client=True) as client:
        try:
            client.delete_deployment(client.read_deployment_by_name(f"{flow}/{name}").id)
        except ObjectNotFound:
            raise UserError(f"--name {name!r}: the Prefect server has no deployment {flow}/{name}") from None
    alarms.remove(f"{flow}/{name}")
    if isinstance(config, Config):
        (Path(config.run_dir) / SCHEDULE).unlink(missing_ok=True)
    progress.say(f"removed {flow}/{name}")


def _below(path: Path, folder: Path) -> str:
    """`path` as a trigger names it."""
    from flows.pool import BELOW

    if not path.is_relative_to(folder):
        raise ConfigError(f"{path}: not below the folder {folder}; move it there, or give another --folder")
    name = path.relative_to(folder).as_posix()
    if not re.match(BELOW, name):
        raise ConfigError(f"{name}: a trigger cannot name this file; use letters, digits, - and _, and no leading dot")
    return name


def _check_server() -> None:
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise UserError(
            "PREFECT_API_URL is not set: a work pool belongs to a Prefect server that stays; start one with `prefect server "
            "start`, and set PREFECT_API_URL to its API, such as http://127.0.0.1:4200/api"
        )
    check_api()


def _check(config: Config | OfflineConfig | JudgesConfig) -> None:
    """What is wrong is said now, and not by the first trigger."""
    from flows.api import check_surroundings, open_run
    from flows.plan import describe_offline_plan
    from judges.load import check_judge

    match config:
        case Config():
            check_surroundings(open_run(config), prefect=False)
        case OfflineConfig():
            describe_offline_plan(config)
        case JudgesConfig():
            check_judge(config.judge.use, config.judge.args)


def _check_not_served(client: SyncPrefectClient, name: str) -> None:
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return
    if there.work_pool_name is None and not there.paused:
        raise UserError(f"--name: {name} is served by `iterdpo serve`; stop that process, or choose another name")


def _ensure_pool(client: SyncPrefectClient, name: str, progress: Progress) -> bool:
    """Create a process pool unless there is one. Returns whether it was created.

    Warns if there is one whose triggers may run any command.
    """
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=TEMPLATE))
        return True
    if there.type != "process":
        raise ConfigError(
            f"--pool {name}: a pool of type {there.type}, whose jobs need an image; deploy to it with prefect.yaml, see "
            "docs/scheduling.md"
        )
    variables = there.base_job_template.get("variables", {}).get("properties", {})
    if code := [key for key in ("command", "env", "working_dir") if key in variables]:
        progress.say(
            f"WARNING: whoever may trigger a deployment in the pool {name} can set its {', '.join(code)}, and so run any "
            "command; `iterdpo deploy` creates a pool without them under another name"
        )
    return False

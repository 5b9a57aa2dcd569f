"""`iterdpo serve`: the flow `add_rounds` as a Prefect deployment, on this machine.

The configuration stays in this process. A trigger gives a number of rounds, and numbers for the keys in `OVERRIDABLE`:
whoever reaches the Prefect server, ours or the user's, can start rounds and no code.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.server import PrefectAPI, prefect_api
from iterdpo.config import Config, assign, parse_config
from iterdpo.errors import ChildFailed, ConfigError
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir

if TYPE_CHECKING:
    from uuid import UUID

OVERRIDABLE = (
    "sampling.engine.max_num_seqs",
    "sampling.engine.kv_cache_gib",
    "sampling.engine.gpu_memory_utilization",
    "judge.max_abstained",
    "judge.max_abstained_count",
    "dpo.tokens_per_micro_batch",
    "dpo.checkpoint_every",
)
"""What a trigger may set for its rounds. All are numbers, and no finished round depends on them."""

FIRST_CHECK_SECONDS = 60.0
"""How long the server's scheduler, which works every few seconds, has to plan the first round."""
CHECK_SECONDS = 10.0


def serve(
    config: Config,
    *,
    name: str | None = None,
    cron: str | None = None,
    timezone: str = "UTC",
    rounds: int = 1,
    progress: Progress,
) -> None:
    """Serve until interrupted. Each trigger, by the clock, the page or the API, adds `rounds` to the lineage.

    The Prefect server is the one in PREFECT_API_URL, or one that we start and that ends with this process.

    Raises:
        ConfigError: the cron string is invalid.
        UserError: a problem that `open_run` finds in the configuration, before anything is served.
        ChildFailed: the server does not schedule the rounds of the cron string.
    """
    from flows.api import check_surroundings, open_run
    from flows.iterative_dpo import add_rounds_flow

    schedule = None
    if cron is not None:
        from prefect.schedules import Cron

        try:
            schedule = Cron(cron, timezone=timezone)
        except ValueError:
            hint = '"0 2 * * *" is two every night'
            raise ConfigError(f"--cron {cron!r} in {timezone}: not a cron string; {hint}") from None
    check_surroundings(open_run(config), prefect=True)  # what can be wrong is said now, not at two in the night
    name = name or Path(config.run_dir).name
    log = RunDir(config.run_dir).log_path("prefect")
    with prefect_api(log) as api:
        from prefect.runner import Runner

        runner = Runner(name=name, pause_on_shutdown=False)
        flow, parameters = add_rounds_flow(config), {"rounds": rounds, "overrides": {}}
        deployment = cast("UUID", runner.add_flow(flow, name=name, parameters=parameters, schedule=schedule))
        planned = f"{_first_planned(api, deployment):%Y-%m-%d %H:%M %Z}" if cron else "when triggered"
        sign_in = f'PREFECT_API_AUTH_STRING="$(cat {api.password})" ' if api.password else ""
        when = f"at {cron} ({timezone})" if cron else "when triggered"
        progress.say(f"serving add_rounds/{name}: {rounds} more {'round' if rounds == 1 else 'rounds'} {when}")
        progress.say(f"  next:    {planned}")
        progress.say(f"  trigger: PREFECT_API_URL={api.url} {sign_in}prefect deployment run add_rounds/{name}")
        progress.say(f"  page:    {api.page}")
        os.environ["PYTHONSAFEPATH"] = "1"  # a trigger's process imports no modules of the working directory either
        try:
            asyncio.run(_serve(runner, progress, api, deployment if cron else None))
        except KeyboardInterrupt:
            return


def overridden(config: Config, rounds: int, overrides: Mapping[str, float]) -> Config:
    """`config` with a trigger's numbers: `overridden(config, 7, {"judge.max_abstained": 0.5})` has seven rounds in all.

    Raises:
        ConfigError: a key that a trigger may not set, or a value that is not a number or out of its range.
    """
    values: dict[str, Any] = {**config.model_dump(), "rounds": rounds}
    for key, value in overrides.items():
        if key not in OVERRIDABLE:
            raise ConfigError(f"overrides: {key!r} cannot be set by a trigger; {', '.join(OVERRIDABLE)} can")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"overrides: {key} = {value!r} is not a number")
        values = assign(values, f"{key}={value}")
    return parse_config(Config, values, source="the trigger's overrides")


async def _serve(runner: Any, progress: Progress, api: PrefectAPI, deployment: UUID | None) -> None:
    """Work off the triggers. Warns if the server of a scheduled `deployment` plans no more rounds."""
    watch = asyncio.create_task(_watch(progress, api, deployment))
    try:
        await runner.start()
    finally:
        watch.cancel()


async def _watch(progress: Progress, api: PrefectAPI, deployment: UUID | None) -> None:
    said: str | None = None
    while deployment is not None:
        await asyncio.sleep(CHECK_SECONDS)
        trouble = await asyncio.to_thread(_trouble, api, deployment)
        if trouble is not None and trouble != said:
            progress.say(f"WARNING: {trouble}")
        said = trouble


def _first_planned(api: PrefectAPI, deployment: UUID) -> datetime:
    """When the clock starts the first round, once the server's scheduler has planned it; a ChildFailed if it does not."""
    deadline = time.monotonic() + FIRST_CHECK_SECONDS
    while (planned := _planned(deployment)) is None:
        if api.failures() or time.monotonic() > deadline:
            raise ChildFailed(str(_trouble(api, deployment)))
        time.sleep(0.5)
    return planned


def _trouble(api: PrefectAPI, deployment: UUID) -> str | None:
    """Why rounds may not start at their time, or None."""
    import httpx

    if failures := api.failures():
        late = "the scheduler of Prefect's server fails, so rounds may not start on time"
        return f"{late}: {failures[-1]} (see {api.log})"
    try:
        planned = _planned(deployment)
    except httpx.HTTPError as error:
        return f"the Prefect server at {api.url} does not answer: {error}"
    why = "its scheduler is down, or the schedule is paused"
    return None if planned else f"the Prefect server at {api.url} has scheduled no rounds: {why}"


def _planned(deployment: UUID) -> datetime | None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.sorting import FlowRunSort

    ahead = filters.FlowRunFilterNextScheduledStartTime(after_=datetime.now(UTC))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            deployment_filter=filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment])),
            flow_run_filter=filters.FlowRunFilter(next_scheduled_start_time=ahead),
            sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
            limit=1,
        )
    return runs[0].next_scheduled_start_time if runs else None

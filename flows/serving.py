"""`iterdpo serve`: the flow `add_rounds` as a Prefect deployment, on this machine.

The configuration stays in this process. A trigger gives a number of rounds, and numbers for the keys in `OVERRIDABLE`:
whoever reaches the Prefect server, ours or the user's, can start rounds and no code.
"""

from __future__ import annotations

import asyncio
import difflib
import math
import multiprocessing
import os
import signal
import time
import zoneinfo
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows import alarms
from flows.deployment import FLOW, MOST_MISSED, close, missed_triggers, trigger
from flows.runs import noted_schedule
from flows.server import PrefectAPI, only_once, prefect_api
from iterdpo.config import Config, assign, parse_config
from iterdpo.errors import ChildFailed, ConfigError, RunFailed
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.runner import Runner
    from prefect.schedules import Schedule

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
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(
    config: Config,
    *,
    name: str | None = None,
    cron: str | None = None,
    timezone: str = "UTC",
    rounds: int = 1,
    notify: Sequence[str] = (),
    hung_after: float = 24.0,
    progress: Progress,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Each trigger, by the clock, the page or the API, adds `rounds` to the lineage.

    The targets `notify` are told of failed rounds, failed gates, and rounds of more than `hung_after` hours; see
    `flows.alarms`. The Prefect server is the one in PREFECT_API_URL, or one that we start and that ends with this
    process. A stop ends the rounds under way and pauses the schedule; the next start adds one round for all triggers
    that were missed.

    Raises:
        ConfigError: the name, the cron string, the time zone, a target or a number is invalid.
        UserError: a problem that `open_run` finds in the configuration, before anything is served; or the name is
            being served already.
        RunFailed: the server does not schedule the rounds of the cron string, or no longer answers.
    """
    from flows.api import check_surroundings, open_run
    from flows.iterative_dpo import add_rounds_flow

    name = name or Path(config.run_dir).name
    check_options(name, rounds=rounds, hung_after=hung_after)
    schedule = schedule_of(cron, timezone)
    notify = alarms.targets(notify)
    check_surroundings(open_run(config), prefect=True)  # what can be wrong is said now, not at two in the night
    log = RunDir(config.run_dir).log_path("prefect")
    progress.say(f"preparing {FLOW}/{name}: the first start of a Prefect server takes up to a minute")
    clock = noted_schedule(config.run_dir, name, cron=cron, timezone=timezone)
    with only_once(name) as port, prefect_api(log, port=port) as api, clock:
        from prefect.runner import Runner

        alarms.remove(f"{FLOW}/{name}")
        missed = missed_triggers(name, scheduled=cron is not None)
        runner = Runner(name=name, pause_on_shutdown=False)  # `close` pauses it
        flow, parameters = add_rounds_flow(config), {"rounds": rounds, "overrides": {}}
        added = runner.add_flow(flow, name=name, parameters=parameters, schedule=schedule, paused=False)
        deployment = cast("UUID", added)
        if notify:
            alarms.create(deployment, f"{FLOW}/{name}", notify, hung_after=hung_after)
        planned = f"{_first_planned(api, deployment):%Y-%m-%d %H:%M %Z}" if cron else "when triggered"
        sign_in = f'PREFECT_API_AUTH_STRING="$(cat {api.password})" ' if api.password else ""
        when = f"at {cron} ({timezone})" if cron else "when triggered"
        progress.say(f"serving {FLOW}/{name}: {rounds} more {'round' if rounds == 1 else 'rounds'} {when}")
        if missed:
            trigger(deployment, name=Path(config.run_dir).name)
            progress.say(
                f"  missed:  {_count(missed)} while it was not served: one is made up for, the others are dropped"
            )
        progress.say(f"  next:    {planned}")
        progress.say(f"  trigger: PREFECT_API_URL={api.url} {sign_in}prefect deployment run {FLOW}/{name}")
        progress.say(f"  page:    {api.page}")
        os.environ["PYTHONSAFEPATH"] = "1"  # a trigger's process imports no modules of the working directory either
        stopped = asyncio.run(_serve(runner, progress, api, deployment if cron else None))
        _close(api, deployment, name)
        if not stopped:
            raise RunFailed(f"the Prefect server at {api.url} no longer answers; start it, and serve again")
        progress.say("stopped: the schedule is paused, and the same command goes on")


def _count(missed: int) -> str:
    return f"{missed:,}{' or more' * (missed >= MOST_MISSED)} trigger{'s' * (missed != 1)}"


def check_options(name: str, *, rounds: int, hung_after: float) -> None:
    """Raises a ConfigError if a deployment cannot have this name, add so many rounds, or wait so many hours."""
    if "/" in name or "%" in name or name in ("", ".", ".."):
        raise ConfigError(f"--name {name!r}: a deployment's name has no / and no %, and is not .. or empty")
    if rounds < 1:
        raise ConfigError(f"--add {rounds}: a trigger adds at least one round")
    if not 0 < hung_after < math.inf:
        raise ConfigError(f"--hung-after {hung_after:g}: not a number of hours")


def schedule_of(cron: str | None, timezone: str) -> Schedule | None:
    """The schedule of a cron string, or None. Raises a ConfigError if it is none, or the time zone is unknown."""
    from prefect.schedules import Cron

    if timezone not in (zones := zoneinfo.available_timezones()):
        ends = [zone for zone in sorted(zones) if zone.rpartition("/")[2].lower() == timezone.lower()]
        near = ends or difflib.get_close_matches(timezone, zones, n=1)
        meant = near[0] if near else "Europe/Berlin"
        raise ConfigError(f"--timezone {timezone!r}: not a time zone; give its name as in {meant!r}")
    if cron is None:
        return None
    try:
        return Cron(cron, timezone=timezone)
    except ValueError:
        hint = '"0 2 * * *" is two every night'
        raise ConfigError(f"--cron {cron!r}: not a cron string; {hint}") from None


def _close(api: PrefectAPI, deployment: UUID, name: str) -> None:
    """`close`, unless the server is gone: the next start closes what is left then."""
    import httpx

    try:
        alarms.remove(f"{FLOW}/{name}")
        close(deployment)
    except httpx.HTTPError as error:
        raise RunFailed(
            f"the Prefect server at {api.url} does not answer ({type(error).__name__}), so the schedule was not paused; "
            "the next start counts what was missed"
        ) from None


def overridden(config: Config, rounds: int, overrides: Mapping[str, float]) -> Config:
    """`config` with a trigger's numbers: `overridden(config, 7, {"judge.max_abstained": 0.5})` has seven rounds in all.

    Raises:
        ConfigError: a key that a trigger may not set, or a value that is not a number or out of its range.
    """
    values: dict[str, Any] = {**config.model_dump(), "rounds": rounds}
    if config.steps_per_round is not None:
        values["total_steps"] = rounds * config.steps_per_round
    for key, value in overrides.items():
        if key not in OVERRIDABLE:
            raise ConfigError(f"overrides: {key!r} cannot be set by a trigger; {', '.join(OVERRIDABLE)} can")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"overrides: {key} = {value!r} is not a number")
        values = assign(values, f"{key}={value}")
    return parse_config(Config, values, source="the trigger's overrides")


async def _serve(runner: Runner, progress: Progress, api: PrefectAPI, deployment: UUID | None) -> bool:
    """Work off the triggers until a signal, and return True, or until the server no longer answers, and return False.

    Warns if the server of a scheduled `deployment` plans no more rounds. Rounds that are under way at the end are killed.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    polling = asyncio.create_task(runner.start())
    await asyncio.sleep(0)  # it sets its handler of SIGTERM, which waits half a minute for a round; ours replaces it
    for number in STOPS:
        loop.add_signal_handler(number, stop.set)
    watching, stopped = asyncio.create_task(_watch(progress, api, deployment)), asyncio.create_task(stop.wait())
    await asyncio.wait({polling, stopped}, return_when=asyncio.FIRST_COMPLETED)
    for number in STOPS:
        loop.remove_signal_handler(number)  # a second one ends this process at once
    stopped.cancel()
    watching.cancel()
    polling.cancel()  # first, for it would report a round that is killed as crashed
    while not polling.done():
        for child in multiprocessing.active_children():
            child.kill()
        await asyncio.wait({polling}, timeout=0.1)
    return stop.is_set()


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

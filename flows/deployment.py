"""A served deployment on its Prefect server: the triggers that were missed since it was last served, and its end.

The server's database is the only memory. A run that a stop ends has the state `STOPPED` until the next start counts it.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

FLOW = "add_rounds"
STOPPED = "Stopped"
MOST_MISSED = 1000  # what Prefect's schedules give at once; with a trigger every minute, 17 hours


def missed_triggers(name: str, *, scheduled: bool) -> int:
    """How many triggers of the deployment had no effect since it was last served; at most `MOST_MISSED` by the clock.

    They are those that a stop ended, and, if it is `scheduled` again, those of its clock while it was not served. What a
    killed `serve` left is closed first. Each is counted once: the next call gives 0.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{FLOW}/{name}")
        except ObjectNotFound:
            return 0
        _end(client, deployment.id, "what served it was killed")
        stopped = _runs(client, deployment.id, state={"name": {"any_": [STOPPED]}})
        for run in stopped:
            client.set_flow_run_state(run.id, Cancelled(message="counted as a missed trigger"), force=True)
        missed = _by_the_clock(client, deployment) if scheduled else 0
        for schedule in deployment.schedules:
            client.delete_deployment_schedule(deployment.id, schedule.id)  # the next one begins now
        return len(stopped) + missed


def trigger(deployment: UUID, *, name: str) -> None:
    """Start a run of the deployment now; `name` is its name until it begins."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.create_flow_run_from_deployment(deployment, name=name)


def close(deployment: UUID) -> None:
    """Pause the schedule, and end the runs that are under way. Their processes have ended before."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.pause_deployment(deployment)  # deletes the runs that are planned
        _end(client, deployment, "iterdpo serve was stopped; at its next start the round goes on")


def _end(client: SyncPrefectClient, deployment: UUID, why: str) -> None:
    """Set every run of the deployment that is under way, its rounds and its stages to an end."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import State, StateType

    under_way = [StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.CANCELLING]
    runs = _runs(client, deployment, state={"type": {"any_": under_way}})
    if not runs:
        return
    below = {"parent_flow_run_id": {"any_": [run.id for run in runs]}, "state": {"type": {"any_": under_way}}}
    rounds = client.read_flow_runs(flow_run_filter=filters.FlowRunFilter.model_validate(below))
    tasks = client.read_task_runs(
        flow_run_filter=filters.FlowRunFilter.model_validate({"id": {"any_": [run.id for run in (*runs, *rounds)]}}),
        task_run_filter=filters.TaskRunFilter.model_validate({"state": {"type": {"any_": under_way}, "name": None}}),
    )
    for run in (*runs, *rounds):
        cancelled = run.state_type == StateType.CANCELLING  # by its user, so it is not made up for
        state: State[Any] = State(type=StateType.CANCELLED, name="Cancelled" if cancelled else STOPPED, message=why)
        client.set_flow_run_state(run.id, state, force=True)
    for task in tasks:
        client.set_task_run_state(task.id, State(type=StateType.CANCELLED, name=STOPPED, message=why), force=True)


def _runs(client: SyncPrefectClient, deployment: UUID, **filter: Any) -> list[FlowRun]:
    from prefect.client.schemas import filters

    by_deployment = {"deployment_id": {"any_": [deployment]}, **filter}
    return client.read_flow_runs(flow_run_filter=filters.FlowRunFilter.model_validate(by_deployment))


def _by_the_clock(client: SyncPrefectClient, deployment: DeploymentResponse) -> int:
    """Times of the deployment's own schedule since it was last at work: since a run began, or it was last served."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.server.schemas.schedules import CronSchedule as Calendar

    clocks = [s for s in deployment.schedules if s.active and isinstance(s.schedule, CronSchedule)]
    begun = {"deployment_id": {"any_": [deployment.id]}, "start_time": {"is_null_": False}}
    latest = client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter.model_validate(begun), sort=FlowRunSort.START_TIME_DESC, limit=1
    )
    at_work = [time for run in latest for time in (run.start_time, run.expected_start_time) if time is not None]
    missed = 0
    for clock in clocks:
        assert clock.created is not None
        since = max([clock.created, *at_work]) + timedelta(seconds=1)
        calendar = Calendar.model_validate(clock.schedule.model_dump())
        missed += len(asyncio.run(calendar.get_dates(n=MOST_MISSED, start=since, end=datetime.now(UTC))))
    return missed

"""The triggers that a deployment missed, and its end, on a real Prefect server."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.deployment import MOST_MISSED, close, missed_triggers
from flows.server import start_server

pytestmark = pytest.mark.slow  # a server starts

Serve = Callable[..., UUID]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The database of a server that every client here uses."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_HOME: home}):
        patch.setenv("PREFECT_HOME", str(home))
        with start_server(home / "server.log") as api:
            assert api.password is not None
            password = api.password.read_text()
            with temporary_settings({PREFECT_API_URL: api.url, PREFECT_API_AUTH_STRING: password}):
                yield home / "prefect.db"


@pytest.fixture
def client(database: Path) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def served(database: Path, client: SyncPrefectClient) -> Serve:
    """Makes a deployment that was served last `ago`, by the clock of `cron`."""

    def make(name: str, cron: str | None, ago: timedelta, *, paused: bool = True) -> UUID:
        schedules = [DeploymentScheduleCreate(schedule=CronSchedule(cron=cron), active=True)] if cron else []
        flow = client.create_flow_from_name("add_rounds")
        made = client.create_deployment(flow_id=flow, name=name, schedules=schedules, paused=paused)
        back = f"-{ago.total_seconds():.0f} seconds"
        with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
            connection.execute(
                "UPDATE deployment_schedule SET created = datetime(created, ?) WHERE deployment_id = ?",
                (back, str(made)),
            )
        return made

    return make


def began(client: SyncPrefectClient, deployment: UUID, state: StateType) -> UUID:
    """A run of the deployment that is in this state."""
    run = client.create_flow_run_from_deployment(deployment).id
    client.set_flow_run_state(run, State(type=StateType.RUNNING), force=True)
    if state != StateType.RUNNING:
        client.set_flow_run_state(run, State(type=state), force=True)
    return run


@pytest.mark.parametrize(
    ("cron", "ago", "missed"),
    [
        ("0 2 * * *", timedelta(days=11), 11),
        ("0 2 * * *", timedelta(seconds=0), 0),
        ("* * * * *", timedelta(minutes=11), 11),
        ("* * * * *", timedelta(days=2), MOST_MISSED),
        (None, timedelta(days=11), 0),
    ],
)
def test_the_times_of_the_clock_since_it_was_served_are_missed_once(
    served: Serve, client: SyncPrefectClient, cron: str | None, ago: timedelta, missed: int
) -> None:
    name = uuid4().hex
    served(name, cron, ago)
    assert missed_triggers(name, scheduled=True) in (missed, missed + 1)  # a minute may have begun since
    assert missed_triggers(name, scheduled=True) == 0


def test_a_deployment_without_a_clock_from_now_on_has_missed_nothing_by_it(served: Serve) -> None:
    name = uuid4().hex
    served(name, "0 2 * * *", timedelta(days=11))
    assert missed_triggers(name, scheduled=False) == 0


def test_a_deployment_that_is_new_has_missed_nothing(database: Path) -> None:
    assert missed_triggers(uuid4().hex, scheduled=True) == 0


def test_times_before_a_run_began_are_not_missed(served: Serve, client: SyncPrefectClient) -> None:
    name = uuid4().hex
    began(client, served(name, "0 2 * * *", timedelta(days=11)), StateType.COMPLETED)
    assert missed_triggers(name, scheduled=True) == 0


def test_runs_that_a_stop_or_a_kill_ended_are_missed_and_those_of_their_user_are_not(
    served: Serve, client: SyncPrefectClient
) -> None:
    name = uuid4().hex
    deployment = served(name, None, timedelta(), paused=False)
    stopped = began(client, deployment, StateType.RUNNING)
    close(deployment)
    assert client.read_deployment(deployment).paused
    assert client.read_flow_run(stopped).state_name == "Stopped"
    killed = began(client, deployment, StateType.RUNNING)
    cancelled = [began(client, deployment, state) for state in (StateType.CANCELLING, StateType.CANCELLED)]
    failed = began(client, deployment, StateType.FAILED)
    assert missed_triggers(name, scheduled=False) == 2
    ended = {client.read_flow_run(run).state_type for run in (stopped, killed, *cancelled)}
    assert ended == {StateType.CANCELLED}
    assert client.read_flow_run(failed).state_type == StateType.FAILED
    assert missed_triggers(name, scheduled=False) == 0


def test_a_stop_closes_the_rounds_of_a_run_and_leaves_what_a_user_planned(
    served: Serve, client: SyncPrefectClient
) -> None:
    deployment = served(uuid4().hex, "0 2 * * *", timedelta(), paused=False)
    run = began(client, deployment, StateType.RUNNING)
    flow = client.create_flow_from_name("round")
    task = client.request(
        "POST", "/task_runs/", json={"flow_run_id": str(run), "task_key": "round", "dynamic_key": "0", "name": "round"}
    ).json()["id"]
    body: dict[str, Any] = {"flow_id": str(flow), "parent_task_run_id": task, "state": {"type": "RUNNING"}}
    below = client.request("POST", "/flow_runs/", json=body).json()["id"]
    planned = client.create_flow_run_from_deployment(deployment, state=State(type=StateType.SCHEDULED)).id
    close(deployment)
    assert client.read_flow_run(UUID(below)).state_name == "Stopped"
    assert client.read_flow_run(planned).state_type == StateType.SCHEDULED  # a user's own stays

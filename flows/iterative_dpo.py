"""The Prefect flow: the loop of `flows/loop.py` with a subflow for each round and a task for each stage.

Prefect schedules the work and shows it; the run directory decides which steps are done. Tasks cache nothing and return
small records. They are called, not submitted: one stage at a time has the accelerator.
"""

from __future__ import annotations

import base64
import functools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.server import prefect_api  # before Prefect: it turns the analytics off

from prefect import Flow, flow, get_run_logger, task  # isort: skip
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import deployment

from flows.alarms import ENDED, FAILED, NOT_PROMOTED, STARTED, Alarms
from flows.api import check_surroundings, describe, open_run
from flows.calibrate import note_estimate
from flows.deployment import FLOW
from flows.loop import PLAIN, Stages, run_loop, run_round
from flows.lost import is_lost, watch
from flows.review import waiting
from flows.serving import overridden
from iterdpo.config import Config
from iterdpo.errors import ConfigError
from iterdpo.report.page import refresh_report, rules, write_report
from iterdpo.report.plots import as_png, figures
from iterdpo.run.progress import Progress
from iterdpo.run.read import read_run
from iterdpo.run.rundir import RunDir
from iterdpo.run.supervise import end_soon, end_with
from iterdpo.stages.plan import first_pending, first_pending_of
from iterdpo.stages.runs import IterativeRun
from iterdpo.types import RoundRecord

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

TABLE_COLUMNS = (
    "round",
    "score/train_judge",
    "score/heldout_judge",
    "win_rate/vs_initial",
    "win_rate/vs_previous",
    "kl/to_initial",
    "pairs/kept",
    "time/round_s",
    "gate/decision",
    "gate/reason",
)


def run_under_prefect(run: IterativeRun) -> None:
    """Continue a run that this process has opened, as a flow run of `iterative_dpo`."""

    @flow(
        name="iterative_dpo", flow_run_name=lambda: run.dir.root.name, validate_parameters=False, persist_result=False
    )
    def iterative_dpo(config: dict[str, Any]) -> None:
        iterate(run)

    watch()
    with prefect_api(run.dir.log_path("prefect")) as api:
        run.progress.say(f"  Prefect: {api.page}")
        try:
            iterative_dpo(run.config.model_dump())
        except Exception as error:
            if not is_lost(error):
                raise
            if first_pending(run) is not None:  # it was lost before the loop began
                _go_on(run)


def add_rounds_flow(config: Config) -> Flow[..., str]:
    """The flow that this process serves. `config` travels in the flow itself, never through the API.

    Prefect runs it in a child of this process, which ends with it, by SIGKILL too.
    """
    server = os.getpid()
    directory = RunDir(config.run_dir)

    def crashed(flow: Flow[..., str], flow_run: FlowRun, state: State[str]) -> None:  # called in the server
        why = state.message or "its process ended"
        directory.note_failure(why)
        alarms = Alarms(cast("UUID", flow_run.deployment_id), directory.root.name)
        alarms.tell(FAILED, directory.next_round(), alarm="failed round", reason=why)

    @flow(
        name=FLOW,
        flow_run_name=lambda: directory.root.name,
        validate_parameters=False,
        persist_result=False,
        on_crashed=[crashed],
    )
    def add_rounds(rounds: int, overrides: dict[str, float]) -> str:
        """Add `rounds` to the lineage in the run directory, from its last policy, on prompts not used before.

        A trigger that finds another one at work waits for it. The first round of a new directory also evaluates the
        initial policy. `overrides` sets numbers for these rounds: {"judge.max_abstained": 0.5}.
        """
        if os.getpid() != server:
            end_with(server)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both, and the server ends this process
            end_soon()
        get_run_logger().info("waiting for %s, which another run may be using", directory.root)
        return add_rounds_to(config, rounds, overrides, wait=True)

    return add_rounds


def add_rounds_to(config: Config, rounds: int, overrides: Mapping[str, float], *, wait: bool) -> str:
    """Inside a flow run of a deployment: add `rounds` to the lineage of `config`. Returns the last round in one line.

    Raises:
        RunLockedError: another process is using the run directory, and `wait` is false.
    """
    watch()
    if rounds < 1:
        raise ConfigError(f"rounds = {rounds}: a trigger adds at least one")
    directory = RunDir(config.run_dir)
    alarms = Alarms(deployment.id, directory.root.name)
    with directory.lock(wait=wait), directory.noting_failures(), alarms.of_failures(directory):
        first = directory.next_round()
        alarms.tell(STARTED, first)
        directory.refresh()
        refresh_report(directory.root)
        done = max((record.round for record in directory.records()), default=0)
        settings = overridden(config, done + rounds, overrides)
        with (
            open(directory.log_path("rounds"), "a", encoding="utf-8") as log,
            open_run(settings, progress=Progress(log)) as run,
        ):
            get_run_logger().info("round %d to %d, first %s", done + 1, done + rounds, first_pending(run))
            directory.write_config(settings.model_dump())
            note_estimate(run)
            run.warm_up()
            check_surroundings(run, prefect=False)
            records = iterate(run, alarms)
        if directory.record(first) is None:  # the gate has stopped the run before
            alarms.tell(ENDED, first)
    return describe(records[-1].metrics)


def iterate(run: IterativeRun, alarms: Alarms | None = None) -> list[RoundRecord]:
    """The loop, inside a flow run. `alarms` hear of each round that begins and ends, and of each failed gate."""
    do = prefect_stages()
    run.waiting, alone = functools.partial(waiting, say=run.progress.say), run.waiting
    lost = False

    @flow(name="round", flow_run_name=f"{run.dir.root.name} round {{round}}", validate_parameters=False)
    def one_round(round: int) -> None:
        run_round(run, round, do)

    def subflow(round: int) -> RoundRecord:
        record = run.dir.record(round)
        if record is None or first_pending_of(run, round) is not None:
            tell(STARTED, round)
            with_prefect(lambda: one_round(round), lambda: run_round(run, round))
            record = run.dir.record(round)
            assert record is not None
            tell(ENDED, round)
            if round and record.decision != "promote":
                tell(NOT_PROMOTED, round, alarm="failed gate", reason=f"{record.decision}: {record.reason}")
        return record

    def tell(event: str, round: int, **more: Any) -> None:
        if alarms is not None and not lost:
            alarms.tell(event, round, **more)

    def with_prefect(act: Callable[[], object], instead: Callable[[], object]) -> None:
        nonlocal lost
        try:
            if not lost:
                act()
                return
        except Exception as error:
            if not is_lost(error):
                raise
            lost, run.waiting = True, alone
            _go_on(run)
        instead()

    records = []
    for record in run_loop(run, subflow):
        run.progress.say(describe(record.metrics))
        with_prefect(lambda: report(run.dir.root), lambda: write_report(run.dir.root))
        records.append(record)
    return records


def _go_on(run: IterativeRun) -> None:
    run.progress.say(f"  {'Prefect':<9} its server no longer answers; the run goes on without it")
    for record in run_loop(run, lambda round: run_round(run, round)):
        run.progress.say(describe(record.metrics))
        write_report(run.dir.root)


def prefect_stages() -> Stages:
    """The stages as tasks, named after themselves and the round."""
    as_task = functools.partial(task, cache_policy=NO_CACHE, persist_result=False)
    stages = PLAIN._asdict().items()
    return Stages(**{name: as_task(stage, name=name, task_run_name=f"{name} {{round}}") for name, stage in stages})


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def report(run_dir: Path) -> str:
    """The run's page, and its table and plots as artifacts of the flow run."""
    page = write_report(run_dir)
    run = read_run(run_dir)
    key = "".join(c if c.isalnum() else "-" for c in run_dir.name.lower()).strip("-")
    rows = run.metrics.reset_index().to_dict("records")
    table = [{name: _cell(row.get(name)) for name in TABLE_COLUMNS} for row in rows]
    create_table_artifact(key=f"{key}-rounds", table=table, description=f"Rounds of {run_dir.name}")
    if found := rules(run):
        create_table_artifact(key=f"{key}-rules", table=found, description=f"Rules of the gate of {run_dir.name}")
    for name, figure in figures(run).items():
        picture = f"![{name}](data:image/png;base64,{base64.b64encode(as_png(figure)).decode()})"
        about = f"{name} of {run_dir.name}"
        create_markdown_artifact(key=f"{key}-{name.replace('_', '-')}", markdown=picture, description=about)
    return str(page)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else round(value, 3)
    return value

r"""Experiment trackers: a lineage is one run in each, with its optimizer steps on one axis and its rounds on another.

    train/<metric>     by step, counted on from round to round     each line of the training log, as it is written
    round/<metric>     by round                                    what metrics.jsonl says of the round, and whether it was promoted
    completions        by round                                    a few held-out completions with their scores

The main process sends all of it, from a thread of its own: a tracker that fails or hangs costs neither a round nor its
time. `trackers/run.json` in the run directory keeps the lineage's name, and which rounds each tracker has, so that later
starts go on with the same run and send what an earlier one could not.
"""

from __future__ import annotations

import html
import itertools
import logging
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from iterdpo.escape import printable, revealed
from iterdpo.run.rundir import RunDir, digest, read_object, write_json
from iterdpo.types import RoundRecord

PATIENCE = 60.0
"""Seconds that the end of a run waits for what is still to be sent."""
SHOWN = 8
"""Completions of the table, each of another prompt."""
LONGEST_TEXT = 2000

Row = dict[str, Any]
Metrics = dict[str, float]


class Tracker(Protocol):
    """One open run of one tracker. Whatever goes wrong is raised."""

    place: str

    def steps(self, step: int, metrics: Metrics) -> None: ...

    def round(self, number: int, metrics: Metrics, decision: str, completions: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run, opened when there is something to send. Nothing here raises.

    Args:
        names: of `dpo.trackers`.
        project: its name in the trackers.
        run: the run directory.
        config: the run's settings, shown beside its metrics.
        say: where a tracker's place, or its failure, is told.
    """

    def __init__(
        self, names: Sequence[str], *, project: str, run: RunDir, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.names, self.project, self.run, self.config, self.say = list(names), project, run, config, say
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._open: dict[str, Tracker] = {}
        self._firsts: dict[int, int] = {}

    def steps(self, round: int, row: Row) -> None:
        """Send a line of the training log."""
        self._soon(lambda: self._send_step(round, row))

    def round(self, record: RoundRecord) -> None:
        """Send a finished round, unless it was sent."""
        self._soon(lambda: self._send_round(record))

    def close(self) -> None:
        """Send what is left, for a minute at the most."""
        if self._thread is None:
            return
        self._work.put(self._close)
        self._work.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._tell(
                f"{', '.join(self.names)}: not everything was sent within {PATIENCE:g} s; the run goes on without"
            )
        self._thread = None

    def _soon(self, work: Callable[[], None]) -> None:
        if not self.names:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="trackers", daemon=True)
            self._thread.start()
        self._work.put(work)

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            with self._guarded(self.names):
                work()

    @contextmanager
    def _guarded(self, names: Iterable[str]) -> Iterator[None]:
        """Around work for these trackers. If it fails, they get nothing more."""
        try:
            yield
        except (Exception, SystemExit) as error:
            lost = list(names)
            self.names = [name for name in self.names if name not in lost]
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:400]
            self._tell(f"{', '.join(lost)}: {reason}; nothing more is sent there until the next start")

    def _each(self, act: Callable[[str, Tracker], None]) -> None:
        for name in list(self.names):
            with self._guarded([name]):
                act(name, self._tracker(name))

    def _send_step(self, round: int, row: Row) -> None:
        step = self._first_step(round) + int(row["step"])
        metrics = {f"train/{key}": value for key, value in numbers(row).items() if key != "step"}
        self._each(lambda name, tracker: tracker.steps(step, metrics))

    def _send_round(self, record: RoundRecord) -> None:
        metrics = {f"round/{key}": value for key, value in numbers(record.metrics).items() if key != "round"}
        metrics["round/gate/promoted"] = float(record.decision == "promote")
        decision, mark = f"{record.decision}: {record.reason}", digest(record.metrics)
        completions: list[Row] | None = None

        def send(name: str, tracker: Tracker) -> None:
            nonlocal completions
            if self._state().get("sent", {}).get(name, {}).get(str(record.round)) == mark:
                return
            if completions is None:
                completions = shown_completions(self.run, record.round)
            tracker.round(record.round, metrics, decision, completions)
            state = self._state()
            state.setdefault("sent", {}).setdefault(name, {})[str(record.round)] = mark
            self._keep(state)

        self._each(send)

    def _first_step(self, round: int) -> int:
        """The steps of the rounds before it."""
        if round not in self._firsts:
            logs = [self.run.round_dir(r) / "policy" / "train_log.jsonl" for r in range(1, round)]
            self._firsts[round] = sum(log.read_bytes().count(b"\n") for log in logs if log.exists())
        return self._firsts[round]

    def _tracker(self, name: str) -> Tracker:
        if name not in self._open:
            state = self._state()
            if "name" not in state:
                state["id"] = secrets.token_hex(6)
                state["name"] = f"{self.run.root.name}-{state['id']}"
                self._keep(state)
            directory = self._note.parent
            self._open[name] = OPENERS[name](self.project, state, directory, self.config)
            self._keep(state)
            self._tell(f"{name}: {self._open[name].place}")
        return self._open[name]

    @property
    def _note(self) -> Path:
        return self.run.root / "trackers" / "run.json"

    def _state(self) -> dict[str, Any]:
        return read_object(self._note) if self._note.exists() else {}

    def _keep(self, state: dict[str, Any]) -> None:
        self._note.parent.mkdir(exist_ok=True)
        write_json(self._note, state)

    def _close(self) -> None:
        for name, tracker in self._open.items():
            with self._guarded([name]):
                tracker.close()
        self._open.clear()

    def _tell(self, message: str) -> None:
        self.say(f"  {'tracker':<9} {message}")


def numbers(row: Mapping[str, Any]) -> Metrics:
    """The entries of a row of metrics that a plot can show."""
    plain = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in plain.items() if math.isfinite(value)}


def shown_completions(run: RunDir, round: int) -> list[Row]:
    """The first completion of the first few held-out prompts, with each judge's score; none of an offline round.

    `[{"prompt": "Tell me a tale", "completion": "Once …", "train_judge": 0.7, "heldout_judge": None}]`
    """
    from iterdpo.run.read import EVALUATION_JUDGES, read_run

    if not (run.round_dir(round) / "evaluation").is_dir():
        return []
    rows = (row for row in read_run(run.root).evaluation_rows(round) if row["k"] == 0)
    return [
        {
            "prompt": revealed(str(row["prompt"]))[:LONGEST_TEXT],
            "completion": revealed(row["text"])[:LONGEST_TEXT],
            **{judge: row[judge] for judge in EVALUATION_JUDGES},
        }
        for row in itertools.islice(rows, SHOWN)
    ]


class TensorBoard:
    """Event files of all starts in one directory, which TensorBoard shows as one run."""

    def __init__(self, project: str, state: dict[str, Any], directory: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = directory / "tensorboard"
        self.place = f"tensorboard --logdir {path}"
        self.writer = SummaryWriter(str(path))
        self.writer.add_text("config", markdown_table([{"key": k, "value": v} for k, v in config.items()]), 0)

    def steps(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def round(self, number: int, metrics: Metrics, decision: str, completions: Sequence[Row]) -> None:
        self.steps(number, metrics)
        self.writer.add_text("round/gate", markdown(decision), number)
        if completions:
            self.writer.add_text("completions", markdown_table(completions), number)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One W&B run, continued by its id. WANDB_MODE=offline writes it to the run directory alone."""

    def __init__(self, project: str, state: dict[str, Any], directory: Path, config: dict[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.api.api_key:  # it would ask on the terminal, in the middle of a round
            raise ValueError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
        self.run = wandb.init(
            project=project,
            id=state["id"],
            name=state["name"],
            dir=str(directory),
            config=config,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE),
        )
        for axis, prefix in (("step", "train/*"), ("round", "round/*")):
            self.run.define_metric(axis, hidden=True)
            self.run.define_metric(prefix, step_metric=axis)
        self.place = f"wandb sync {self.run.settings.sync_dir}" if self.run.offline else self.run.url

    def steps(self, step: int, metrics: Metrics) -> None:
        self.run.log({"step": step, **metrics})

    def round(self, number: int, metrics: Metrics, decision: str, completions: Sequence[Row]) -> None:
        row: Row = {"round": number, "round/gate/decision": decision, **metrics}
        if completions:
            cells = [list(map(cell, line.values())) for line in completions]
            row["round/completions"] = self.wandb.Table(columns=list(completions[0]), data=cells)
        self.run.log(row)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """One MLflow run, continued by the id that its server gave it. The address is MLFLOW_TRACKING_URI's."""

    def __init__(self, project: str, state: dict[str, Any], directory: Path, config: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)  # each table of a new database
        self.client = MlflowClient()
        if "mlflow" not in state:
            experiment = self.client.get_experiment_by_name(project)
            where = experiment.experiment_id if experiment else self.client.create_experiment(project)
            state["mlflow"] = self.client.create_run(where, run_name=state["name"]).info.run_id
        self.id = state["mlflow"]
        self.client.update_run(self.id, status="RUNNING")
        self.client.log_dict(self.id, config, "config.json")
        self.place = f"{self.client.tracking_uri}, run {self.id}"

    def steps(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def round(self, number: int, metrics: Metrics, decision: str, completions: Sequence[Row]) -> None:
        self.steps(number, metrics)
        self.client.set_tag(self.id, f"gate.round-{number:03d}", decision)
        if completions:
            columns = {key: [cell(line[key]) for line in completions] for key in completions[0]}
            self.client.log_table(self.id, columns, f"completions/round-{number:03d}.json")

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    """One Trackio run, continued by its name."""

    def __init__(self, project: str, state: dict[str, Any], directory: Path, config: dict[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=project, name=state["name"], config=config, resume="allow", embed=False, auto_log_cpu=False
        )
        self.place = f"trackio show --project {project}, run {state['name']}"

    def steps(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def round(self, number: int, metrics: Metrics, decision: str, completions: Sequence[Row]) -> None:
        import pandas as pd

        row: Row = {"round": number, "round/gate/decision": decision, **metrics}
        if completions:
            cells = [{key: cell(value) for key, value in line.items()} for line in completions]
            row["round/completions"] = self.trackio.Table(dataframe=pd.DataFrame(cells))
        self.run.log(row, step=number)

    def close(self) -> None:
        self.run.finish()


OPENERS: dict[str, Callable[[str, dict[str, Any], Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def cell(value: Any) -> Any:
    """A value of a table: a column has one type."""
    return float("nan") if value is None else value


def markdown(text: str) -> str:
    """Untrusted text for a page that renders Markdown: on one line, and no sign of it means anything."""
    line = html.escape(" ↵ ".join(text.splitlines()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~>])", r"\\\1", line)


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""

    def line(cells: Iterable[Any]) -> str:
        return f"| {' | '.join(cells)} |"

    texts = [["–" if value is None else markdown(str(value)) for value in row.values()] for row in rows]
    return "\n".join([line(rows[0]), line("---" for _ in rows[0]), *map(line, texts)])


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as trackers take them: dotted keys, plain values."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[prefix + key] = value if isinstance(value, int | float | bool | str) else str(value)
    return rows

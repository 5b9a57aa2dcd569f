"""`iterdpo watch`: how far a run is, from its directory alone; in a terminal, and for Prometheus."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.plan import STEPS, duration
from flows.runs import next_trigger, state_of
from iterdpo.errors import DamagedError
from iterdpo.escape import printable
from iterdpo.run.artifacts import sampled_prompts
from iterdpo.run.rundir import NOTE, RunDir, read_jsonl, read_manifest
from iterdpo.types import RoundRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = ("score/train_judge", "score/heldout_judge", "win_rate/vs_initial", "kl/to_initial", "time/round_s")
BARS = "▁▂▃▄▅▆▇█"
LOSSES = 40
NVIDIA = "index,utilization.gpu,memory.used,memory.total"


@dataclass(frozen=True)
class StepState:
    """A step of the round under way: `StepState("completions", done=128, total=512, seconds=20.1, finished=False)`."""

    name: str
    done: int
    total: int
    """Of the unit that is counted; 0 if it is not known."""
    seconds: float
    """Since it was begun, or that it took."""
    finished: bool
    unit: str = ""
    rate: float | None = None
    """Units a second."""

    @property
    def left(self) -> float | None:
        """Seconds until it is done, if the rate stays."""
        return (self.total - self.done) / self.rate if self.rate and self.total and not self.finished else None


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    run: str
    state: str
    round: int
    rounds: int
    steps: list[StepState]
    training: list[dict[str, Any]]
    """The rows of the round's training so far."""
    records: list[RoundRecord]
    next_trigger: str | None = None
    problems: list[str] = field(default_factory=list)


def snapshot(run_dir: str | Path, *, now: float | None = None) -> Snapshot:
    """What the directory of a run shows now. Damaged files are named in `problems`.

    Raises:
        UserError: no run is there.
    """
    run, now = RunDir(run_dir), time.time() if now is None else now
    config = run.read_config()
    problems: list[str] = []
    records: list[RoundRecord] = []
    for number in run.rounds():
        try:
            if (record := run.record(number)) is not None:
                records.append(record)
        except DamagedError as error:
            problems.append(str(error))
    rounds = config.get("rounds", 1)
    round = max((record.round for record in records), default=-1) + 1
    if not run.round_dir(round).exists() and records:
        round = records[-1].round
    directory = run.round_dir(round)
    training = _training(directory)
    found = (_step(directory, name, config, training, now, problems) for name in STEPS)
    steps = [step for step in found if step is not None]
    state = state_of(run, rounds) if not problems else "damaged"
    return Snapshot(str(run.root), state, round, rounds, steps, training, records, next_trigger(run.root), problems)


def _step(
    directory: Path,
    name: str,
    config: dict[str, Any],
    training: list[dict[str, Any]],
    now: float,
    problems: list[str],
) -> StepState | None:
    path, partial = directory / name, directory / f"{name}.partial"
    try:
        if (manifest := read_manifest(path)) is not None:
            count, unit = _counted(manifest.counts)
            return StepState(name, count, count, manifest.seconds["total"], True, unit)
    except DamagedError as error:
        problems.append(str(error))
        return None
    if not (begun := partial / NOTE).exists():
        return None
    seconds = max(0.0, now - begun.stat().st_mtime)
    prompts, sampling = config.get("prompts", {}), config.get("sampling", {})
    match name:
        case "completions":
            done, total, unit = sampled_prompts(partial), prompts.get("per_round", 0), "prompts"
        case "evaluation" | "other_model":
            done, total, unit = sampled_prompts(partial / "completions"), prompts.get("heldout", 0), "prompts"
        case "judgments":
            shards = len(list(partial.glob("shard-*.jsonl")))
            done, unit = shards, "shards"
            total = -(-prompts.get("per_round", 0) // sampling.get("shard_size", 1))
        case "policy":
            dpo = config.get("dpo", {})
            done, unit = (int(training[-1]["step"]) if training else 0), "steps"
            pairs = read_manifest(directory / "pairs")
            kept = pairs.counts.get("kept", 0) if pairs is not None else 0
            size = dpo.get("pairs_per_step", 1)
            total = dpo.get("max_steps") or dpo.get("epochs", 1) * -(-kept // size)
            speeds = [row["pairs_per_second"] / size for row in training[-10:] if row.get("pairs_per_second")]
            return StepState(name, done, total, seconds, False, unit, sum(speeds) / len(speeds) if speeds else None)
        case _:
            done, total, unit = 0, 0, ""
    return StepState(name, done, total, seconds, False, unit, done / seconds if done and seconds else None)


def _counted(counts: dict[str, Any]) -> tuple[int, str]:
    """The unit of a finished step, and how many it has."""
    units = {"prompts": "prompts", "completions": "completions", "kept": "pairs", "pairs": "pairs"}
    return next(((int(counts[name]), unit) for name, unit in units.items() if name in counts), (0, ""))


def _training(directory: Path) -> list[dict[str, Any]]:
    for step in ("policy", "policy.partial"):
        log = directory / step / "train_log.jsonl"
        with suppress(DamagedError, OSError):  # its last line may be half written
            return [row for row in read_jsonl(log) if isinstance(row, dict) and "step" in row]
    return []


def gpus() -> list[tuple[str, float, float, float]]:
    """Of each GPU: its number, its utilisation (0 to 1), its used memory and all of it in bytes; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={NVIDIA}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        rows = [line.split(",") for line in said.splitlines()]
        return [(n.strip(), float(u) / 100, float(used) * 2**20, float(total) * 2**20) for n, u, used, total in rows]
    return []


def render(now: Snapshot) -> RenderableType:
    """The snapshot for a terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = f"{now.run}   round {now.round} of {now.rounds}   {now.state}"
    if now.next_trigger:
        head += f"   next: {now.next_trigger}"
    stages = Table.grid(padding=(0, 2))
    for step in now.steps:
        share = 1.0 if step.finished else step.done / step.total if step.total else 0.0
        left = "" if step.left is None else f"about {duration(step.left)} left"
        rate = "" if step.rate is None else f"{step.rate:,.2f} {step.unit}/s"
        count = (
            f"{step.done:,} {step.unit}"
            if step.finished or not step.total
            else f"{step.done:,} of {step.total:,} {step.unit}"
        )
        bar = ProgressBar(total=1.0, completed=share, width=20)
        stages.add_row(step.name, bar, count, duration(step.seconds), rate, left)
    parts: list[RenderableType] = [Text(printable(head), style="bold"), stages]
    if now.training:
        last = now.training[-1]
        losses = [row["loss"] for row in now.training if isinstance(row.get("loss"), float)]
        said = ", ".join(
            f"{name} {last[name]:.4g}" for name in ("loss", "rewards/margins", "grad_norm") if name in last
        )
        parts.append(Text(f"step {last['step']}: {said}   {sparkline(losses[-LOSSES:])}"))
    if now.records:
        table = Table("round", *SHOWN, "decision", box=None, header_style="dim")
        for record in now.records[-8:]:
            values = [record.metrics.get(name) for name in SHOWN]
            table.add_row(str(record.round), *("–" if v is None else f"{v:.3f}" for v in values), record.decision)
        parts.append(table)
    parts += [Text(line, style="dim") for line in _machine()]
    parts += [Text(printable(problem), style="red") for problem in now.problems]
    return Group(*parts)


def _machine() -> Iterator[str]:
    import psutil

    memory = psutil.virtual_memory()
    yield f"memory {memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB   load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    for number, share, used, total in gpus():
        yield f"GPU {number}: {100 * share:.0f} %, {used / 2**30:.1f} of {total / 2**30:.1f} GiB"


def sparkline(values: list[float]) -> str:
    """`▁▃█` for `[0.0, 0.3, 1.0]`; empty for fewer than two finite values."""
    finite = [value for value in values if abs(value) < float("inf")]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / ((high - low) or 1.0)
    return "".join(BARS[round((value - low) * scale)] for value in finite)


class RunCollector:
    """A run's figures for Prometheus, read from the disk at each scrape. `REGISTRY.register(RunCollector("runs/films"))`"""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        now, run = snapshot(self.run_dir), self.run_dir.name

        def gauge(name: str, about: str, values: Mapping[Any, float | None], *labels: str) -> Any:
            family = GaugeMetricFamily(f"iterdpo_{name}", about, labels=["run", *labels])
            for key, value in values.items():
                if value is not None:
                    family.add_metric([run, *key], value)
            return family

        yield gauge("round", "The round under way, or the last one.", {(): now.round})
        yield gauge("rounds", "Rounds of the configuration.", {(): now.rounds})
        yield gauge("at_work", "1 if a process is working on the run.", {(): float(now.state == "at work")})
        yield gauge("step_done", "Units of a step that are done.", {(s.name,): s.done for s in now.steps}, "step")
        yield gauge("step_total", "Units of a step.", {(s.name,): s.total for s in now.steps}, "step")
        yield gauge("step_seconds", "Seconds of a step so far.", {(s.name,): s.seconds for s in now.steps}, "step")
        last = now.training[-1] if now.training else {}
        numbers = {(name,): float(value) for name, value in last.items() if isinstance(value, int | float)}
        yield gauge("train", "The last step of training.", numbers, "metric")
        metrics = now.records[-1].metrics if now.records else {}
        ended = {(n,): float(v) for n, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        yield gauge("metric", "Metrics of the last finished round.", ended, "metric")


def watch(run_dir: str | Path, *, every: float = 2.0, once: bool = False, port: int | None = None) -> None:
    """Show a run until Ctrl-C, and answer Prometheus at http://127.0.0.1:`port`/metrics.

    Raises:
        UserError: no run is there, or the port is taken.
    """
    from rich.console import Console
    from rich.live import Live

    now = snapshot(run_dir)
    console = Console()
    if port is not None:
        _answer(run_dir, port)
    if once:
        console.print(render(now))
        return
    with suppress(KeyboardInterrupt), Live(render(now), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(render(snapshot(run_dir)), refresh=True)


def _answer(run_dir: str | Path, port: int) -> None:
    from prometheus_client import CollectorRegistry, start_http_server

    from iterdpo.errors import UserError

    registry = CollectorRegistry()
    registry.register(RunCollector(run_dir))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another") from None

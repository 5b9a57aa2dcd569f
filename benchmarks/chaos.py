"""Every way to stop a run, times its stages: what stays behind, how soon it is gone, what is done again, what comes out.

    nice -n 19 python -m benchmarks.chaos --stops 200 [--root runs/chaos] [--engine vllm] [--prefect yes|serve]

Runs of a tiny model are stopped again and again, inside sampling and training: the whole run by a signal, or one of its
processes, which the run must notice and replace. A full disk is a small file system of its own, which needs root. Each
run is held against one that was never stopped. Every stop is a line of ROOT/stops.jsonl; the same command goes on, and
prints the table of all stops so far.

`--engine pretended` has a sampler without vLLM (chaos_engine.py) under the same guard, because vLLM takes longer to start
than all the rest; everything else is real. `--prefect yes` runs under a Prefect server, which is killed too. With
`--prefect serve`, triggers of `iterdpo serve` add the rounds: a round is cancelled on the page, and its worker, which is
`iterdpo serve`, is stopped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml

from benchmarks.chaos_served import Service, command
from benchmarks.harness import command_line
from iterdpo.run import supervise
from iterdpo.run.rundir import read_manifest
from iterdpo.testing import build_tiny_checkpoint

ROOT = Path(__file__).parents[1]
JUDGE = "def vowels(prompt, completion):\n    return sum(letter in 'aeiou' for letter in completion)\n"
SILENCE = 10.0
ROUNDS = 2
MAIN = "from flows.cli import main; main()"
PRETENDED = f"from iterdpo.sampling.client import VLLMSampler as S; S.MODULE = 'benchmarks.chaos_engine'; {MAIN}"

Stage = Literal["sample", "train", "evaluate"]


@dataclass(frozen=True)
class Way:
    """`Way("engine", "SIGKILL")`. Those of the flow end the run; the others are for the run to notice."""

    target: str
    how: str

    def __str__(self) -> str:
        return f"{self.how} of the {self.target}"


FLOW = [Way("flow", how) for how in ("SIGINT", "SIGTERM", "SIGKILL", "SIGSTOP, then SIGKILL")]
CHILD = {
    stage: [Way(who, how) for how in ("SIGTERM", "SIGKILL", "SIGSTOP") for who in (child, f"{child}'s guard")][:5]
    for stage, child in (("sample", "engine"), ("train", "trainer"))
}  # a guard that is stopped stops nothing
SERVER = [Way("Prefect's server", how) for how in ("SIGTERM", "SIGKILL")]
CANCEL = Way("round on the page", "cancel")
WORKER = [Way("worker", how) for how in ("SIGINT", "SIGTERM", "SIGKILL")]
FULL = Way("disk", "fullness")
ENDING = {*FLOW, FULL, CANCEL, *WORKER}
"""Those after which the run must be started again."""
NOTICED = {"SIGSTOP": SILENCE + 3, "cancel": 30.0}
"""Seconds until a stop is noticed, from when on five more are given."""
WEIGHTS = {"sample": 1.0, "train": 1.0, "evaluate": 0.15}
"""How often a stage is stopped when the run comes to it; the others pass by."""


def main(
    *,
    stops: int = 200,
    root: Path = Path("runs/chaos"),
    engine: Literal["pretended", "vllm"] = "pretended",
    prefect: Literal["yes", "serve", "no"] = "no",
    seed: int = 0,
) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so would the run
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(root, engine, prefect, random.Random(f"{seed} {time.time_ns()}"))
    try:
        while len(chaos.rows) < stops:
            chaos.lineage(stops)
    finally:
        chaos.end()
        if chaos.service is not None:
            chaos.service.end()
        print(table(chaos.rows, read(root / "lineages.jsonl")))


class Chaos:
    def __init__(self, root: Path, engine: str, prefect: str, draw: random.Random) -> None:
        self.root, self.draw = root, draw
        self.engine = "vllm" if prefect == "serve" else engine  # a round that is served imports its own
        self.prefect = prefect == "yes"
        self.service = Service(root) if prefect == "serve" else None
        self.rows = read(root / "stops.jsonl")
        self.model = root / "model"
        if not self.model.exists():
            build_tiny_checkpoint(self.model)
            (root / "judge.py").write_text(JUDGE)
            prompts = [{"prompt": f"Tale {i}, of the sea"} for i in range(600)]
            (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        self.flow: subprocess.Popen[bytes] | Service | None = None
        self.struck_flow = False
        self.shards: dict[str, int] = {}  # at the last stop
        self.disk = root / "disk"
        self.disk.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.disk)]
        self.small = os.path.ismount(self.disk) or subprocess.run(mount, capture_output=True).returncode == 0
        (self.disk / "filler").unlink(missing_ok=True)

    def write(self, run: Path) -> Path:
        config = {
            "run_dir": str(run),
            "rounds": ROUNDS,
            "model": {"path": str(self.model)},
            "prompts": {"path": str(self.root / "prompts.jsonl"), "per_round": 240, "heldout": 8},
            "sampling": {"n": 4, "max_tokens": 12, "shard_size": 4},
            "judge": {"use": f"{self.root / 'judge.py'}:vowels"},
            "evaluation": {"max_logp_gap": 1000 if self.engine == "pretended" else 0.1},
            "dpo": {"learning_rate": 1e-3, "pairs_per_step": 2, "checkpoint_every": 8, "precision": "fp32"},
            "gate": {"metric": "score/train_judge", "minimum": 0.0},
            "supervision": {"silence": SILENCE, "start": 300, "restarts": 1000},
        }
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        return path

    def start(self, run: Path) -> None:
        """The run, in a process of its own; its output is in a file beside its directory."""
        environment = {**os.environ, "CHAOS": str(self.root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"PREFECT_HOME": str(self.root / "prefect"), "PREFECT_LOGGING_LEVEL": "ERROR"}
        code = PRETENDED if self.engine == "pretended" else MAIN
        if self.service is not None:
            serve = [sys.executable, "-c", code, "serve", str(self.write(run))]
            self.service.start(serve, run.with_suffix(".log"), environment)
            self.flow = self.service
            return
        with open(run.with_suffix(".log"), "ab") as log:
            started = [sys.executable, "-c", code, "run", str(self.write(run))]
            started += [] if self.prefect else ["--no-prefect"]
            self.flow = subprocess.Popen(started, env=environment, stdout=log, stderr=log, start_new_session=True)

    def end(self) -> None:
        if self.flow is not None and self.flow.poll() is None:
            self.flow.kill()
            self.flow.wait()

    def reference(self) -> str:
        """The digest of the last policy of a run that is not stopped."""
        run = self.root / f"reference-{self.engine}"
        while (digest := last_policy(run)) is None:
            self.start(run)
            assert self.flow is not None
            self.flow.wait()
            assert self.service is not None or last_policy(run) is not None, f"see {run.with_suffix('.log')}"
        if self.service is not None:
            self.service.stop()  # it serves this configuration
        return digest

    def lineage(self, stops: int) -> None:
        """Stop one run until it is done, or `stops` are reached; then it is finished without further stops."""
        reference = self.reference()
        ended = {row["run"] for row in read(self.root / "lineages.jsonl")}
        number = next(n for n in range(10_000) if f"{self.engine}-{n:03d}" not in ended)
        run = self.disk / f"{self.engine}-{number:03d}"
        while last_policy(run) is None:
            self.start(run)
            assert self.flow is not None
            while self.flow.poll() is None:
                if len(self.rows) >= stops or not self.strike(run):
                    self.flow.wait()
            self.flow.wait()
            if last_policy(run) is None and not self.struck_flow and not isinstance(self.flow, Service):
                raise SystemExit(f"{run} ended with status {self.flow.returncode}; see {run.with_suffix('.log')}")
        if self.service is not None:
            self.service.stop()
        identical = last_policy(run) == reference
        append(self.root / "lineages.jsonl", {"run": run.name, "identical": identical})
        if identical:
            shutil.rmtree(run)

    def strike(self, run: Path) -> bool:
        """Wait for a moment inside a stage and stop something. Whether the run was still at work."""
        assert self.flow is not None
        self.struck_flow = False
        stage, place, wanted = None, None, 0
        while True:
            if self.flow.poll() is not None:
                return False
            now = where(run)
            if now is None:
                stage = None
            elif now[:2] != (stage, place):
                stage, place, done = now
                skip = self.draw.random() > WEIGHTS[stage]
                wanted = 10**9 if skip else done + self.draw.choice([1, 1, 1, 2, 3, 5])
            elif now[2] >= wanted:
                break
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, 0.2))
        assert stage is not None
        if now != where(run) and (where(run) or (None,))[0] != stage:
            return True
        found = next(
            ((way, victims) for way in self.choices(stage) if (victims := self.victims(way)) is not None), None
        )
        assert found is not None  # the run itself
        way, victims = found
        before, begun = shards(run), time.monotonic()
        steps, checkpoint = log_lines(run), last_checkpoint(run)
        family = victims[1] or mark(self.root)
        if way == FULL:
            self.fill()
            self.flow.wait(300)  # the run notices when it next writes
            begun = time.monotonic()
        if way == CANCEL:
            assert self.service is not None
            self.service.cancel()
        for number in way.how.split(", then ") if way not in (FULL, CANCEL) else ():
            with suppress(ProcessLookupError):
                os.kill(victims[0], getattr(signal, number))
            time.sleep(0.05)
        noticed = NOTICED.get(way.how, 0.0)
        limit = noticed + 20
        left_after_5 = None
        while running := [pid for pid in family if runs(pid)]:
            passed = time.monotonic() - begun
            if left_after_5 is None and passed > noticed + 5:
                left_after_5 = len(running)
            if passed > limit:
                break
            time.sleep(0.005)
        gone = time.monotonic() - begun
        if way in ENDING:
            self.end()
            self.struck_flow = True
            (self.disk / "filler").unlink(missing_ok=True)
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        row = {
            "run": run.name,
            "stage": stage,
            "way": str(way),
            "gone": round(gone, 2),
            "left": left_after_5 or 0,
            "repeated": max(0, steps - checkpoint) if stage == "train" else 0,
            "resampled": self.resampled(before),
        }
        self.rows.append(row)
        append(self.root / "stops.jsonl", row)
        return way not in ENDING

    def fill(self) -> None:
        with suppress(OSError), open(self.disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)

    def resampled(self, before: dict[str, int]) -> int:
        """Whole shards that were there at the last stop and have been written again since."""
        earlier, self.shards = self.shards, before
        return sum(before.get(name, written) != written for name, written in earlier.items())

    def choices(self, stage: Stage) -> list[Way]:
        """First the way that this stage was stopped least often; those of the flow take a start of it each."""
        done = Counter(row["way"] for row in self.rows if row["stage"] == stage)
        ways = [*FLOW, *([FULL] if self.small else []), *CHILD.get(stage, []), *(SERVER if self.prefect else [])]
        if self.service is not None:  # its rounds leave SIGINT to it
            ways = [CANCEL, *WORKER, *FLOW[1:], *CHILD.get(stage, [])]
        return sorted(ways, key=lambda way: (done[str(way)] * (4.0 if way in ENDING else 1.0), self.draw.random()))

    def victims(self, way: Way) -> tuple[int, list[int]] | None:
        """The process to stop, and those that must be gone: it, its guard and what is below it. None: it is not there."""
        assert self.flow is not None
        if way in WORKER:
            assert self.service is not None
            assert self.service.process is not None
            return self.service.process.pid, []
        if self.service is not None and not self.service.found():
            return None
        if way in ENDING:
            return self.flow.pid, [self.flow.pid, *supervise._descendants(self.flow.pid)] if self.service else []
        engine = "benchmarks.chaos_engine" if self.engine == "pretended" else "iterdpo.sampling.worker"
        modules = {"trainer": "iterdpo.training.train", "engine": engine, "Prefect": "uvicorn"}
        module = modules[way.target.split("'")[0]]
        for guard in supervise._descendants(self.flow.pid):
            below = supervise._descendants(guard)
            if "supervise.py" in command(guard) and below and module in command(guard):
                target = (
                    guard if "guard" in way.target else next((p for p in reversed(below) if module in command(p)), None)
                )
                return None if target is None else (target, [guard, *below])
        return None


def where(run: Path) -> tuple[Stage, str, int] | None:
    """The stage that a run is in, its directory, and how much of it is done; None: none of those that are stopped."""
    with suppress(OSError):  # it changes meanwhile
        for partial in run.glob("round-*/*.partial"):
            match partial.name:
                case "completions.partial":
                    return "sample", str(partial), len(list(partial.glob("shard-*.parquet")))
                case "policy.partial":
                    return "train", str(partial), (partial / "train_log.jsonl").read_text().count("\n")
                case "evaluation.partial":
                    return "evaluate", str(partial), len(list(partial.rglob("shard-*")))
    return None


def shards(run: Path) -> dict[str, int]:
    found = {}
    for path in run.glob("round-*/completions*/shard-*.parquet"):
        with suppress(OSError):
            found[f"{run.name}/{path.parent.parent.name}/{path.name}"] = path.stat().st_mtime_ns
    return found


def log_lines(run: Path) -> int:
    for log in run.glob("round-*/policy.partial/train_log.jsonl"):
        with suppress(OSError):
            return log.read_text().count("\n")
    return 0


def last_checkpoint(run: Path) -> int:
    found = run.glob("round-*/policy.partial/checkpoint-??????")
    return max((int(path.name.removeprefix("checkpoint-")) for path in found), default=0)


def last_policy(run: Path) -> str | None:
    """The digest of the last round's policy, if the run is done."""
    last = run / f"round-{ROUNDS:03d}"
    manifest = read_manifest(last / "policy") if (last / "round.json").exists() else None
    return None if manifest is None else manifest.digest


def mark(root: Path) -> list[int]:
    """All processes of this benchmark's run, by a variable of their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"CHAOS={root}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]], lineages: list[dict[str, Any]]) -> str:
    identical = {row["run"]: row["identical"] for row in lineages}
    cells = defaultdict(list)
    for row in rows:
        cells[row["stage"], row["way"]].append(row)
    lines = [
        f"{'stage':<9} {'way':<32} {'stops':>5} {'left':>5} {'gone s':>12} {'repeated':>9} {'policy identical':>17}"
    ]
    lines += _lines(sorted(cells.items()), identical)
    stopped = {row["run"] for row in rows}
    same = sum(identical.get(run, False) for run in stopped)
    lines.append(
        f"{len(rows)} stops in {len(stopped)} runs, of which {sum(run in identical for run in stopped)} are finished and {same} "
        f"identical; shards sampled again: {sum(row['resampled'] for row in rows)}"
    )
    return "\n".join(lines)


def _lines(cells: list[tuple[tuple[str, str], list[dict[str, Any]]]], identical: dict[str, bool]) -> Iterator[str]:
    for (stage, way), some in cells:
        figure: Callable[[str], list[float]] = lambda name, some=some: [row[name] for row in some]  # noqa: E731
        gone = f"{median(figure('gone')):.1f}, {max(figure('gone')):.1f}"
        known = [identical[row["run"]] for row in some if row["run"] in identical]
        same = f"{sum(known)} of {len(known)}"
        repeated = f"{max(figure('repeated'))}"
        yield f"{stage:<9} {way:<32} {len(some):>5} {sum(figure('left')):>5} {gone:>12} {repeated:>9} {same:>17}"


if __name__ == "__main__":
    command_line(main, __doc__)

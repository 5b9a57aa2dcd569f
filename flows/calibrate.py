"""Rates of this machine: one small round of a configuration, run for real in a temporary directory, with a clock."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.api import open_run
from flows.loop import run_loop, run_round
from iterdpo.config import Config, parse_config
from iterdpo.run.cost import ESTIMATE, Rates, estimate_to_json, read_rates
from iterdpo.run.devices import visible_gpus
from iterdpo.run.folder import default_cache
from iterdpo.run.progress import Progress, Stage
from iterdpo.run.rundir import digest, write_json
from iterdpo.sampling import Sampler
from iterdpo.stages.runs import IterativeRun

HELDOUT = 32
CHILDREN = {"engine": "iterdpo.sampling.worker", "trainer": "iterdpo.training"}
SAMPLING = ("sample", "evaluate")
WATCH_SECONDS = 0.2
SMALL = {"run_dir", "rounds", "seed", "prompts", "gate"}
"""Sections that rates do not depend on."""


class Recorder(Progress):
    """Progress that is not shown: how long each stage took to begin, and for how many units after that."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, list[tuple[float, float, int]]] = defaultdict(list)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        with super().stage(name, total, unit) as stage:
            yield stage
            waited = stage.begun - stage.started
            self.stages[name].append((waited, self.clock() - stage.begun, stage.done - stage.before))

    def rates(self) -> dict[str, tuple[float, float]]:
        """By stage: the start of its last time, when the engine is warm, and the mean of each unit, over all its times.

        An evaluation samples as a round does, so the two have one mean.
        """
        found = {}
        for name, times in self.stages.items():
            alike = [t for other in (SAMPLING if name in SAMPLING else (name,)) for t in self.stages.get(other, [])]
            count = sum(count for _, _, count in alike)
            found[name] = (times[-1][0], sum(worked for _, worked, _ in alike) / max(1, count))
        return found

    def seconds(self) -> float:
        return sum(waited + worked for times in self.stages.values() for waited, worked, _ in times)


def calibrate(config: Config, *, say: Callable[[str], None] = print, sampler: Sampler | None = None) -> Rates:
    """Run rounds 0 and 1 on some of the prompts, and keep the rates for this machine, model and settings.

    The judges are asked about these completions too. Nothing is left but the file of rates.

    Raises:
        UserError: what `open_run` finds.
    """
    sampled = min(config.prompts.per_round, config.sampling.shard_size)
    heldout = min(config.prompts.heldout, HELDOUT)
    recorder, peaks = Recorder(), dict[str, float]()
    say(f"calibrating: a round of {sampled} prompts and {heldout} held out, for real")
    with tempfile.TemporaryDirectory(prefix="iterdpo-calibration-") as scratch:
        values = config.model_dump()
        values |= {"run_dir": scratch, "rounds": 1}
        values["prompts"] |= {"per_round": sampled, "heldout": heldout}
        values["dpo"] |= {"trackers": []}
        started = time.perf_counter()
        small = parse_config(Config, values)
        with _peaks_of_children(peaks), open_run(small, progress=recorder, sampler=sampler) as run:
            run.warm_up()
            for _ in run_loop(run, lambda round: run_round(run, round)):
                pass
        wall = time.perf_counter() - started
    cold = recorder.stages["evaluate"][0][0] - recorder.stages["evaluate"][-1][0]
    between = max(0.0, wall - recorder.seconds()) / 2
    source = f"a calibration on this machine ({time.strftime('%Y-%m-%d')}, {wall:,.0f} s)"
    rates = Rates(recorder.rates(), engine=max(0.0, cold), round=between, source=source, memory=peaks)
    path = cached(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rates.to_json())
    say(f"  kept in {path}")
    return rates


def cached_rates(config: Config) -> Rates | None:
    """The rates of an earlier calibration of this model and these settings on this machine."""
    path = cached(config)
    return read_rates(path) if path.exists() else None


def note_estimate(run: IterativeRun) -> None:
    """Keep in the run directory how long the run should take, for its report, if this machine was calibrated for it."""
    if (rates := cached_rates(run.config)) is not None:
        from flows.plan import load_of

        write_json(run.dir.root / ESTIMATE, estimate_to_json(load_of(run), rates), record=run.dir.root)


def cached(config: Config) -> Path:
    """The file for the rates of a configuration on this machine."""
    settings = config.model_dump(mode="json", exclude=SMALL)
    machine = [platform.machine(), platform.processor(), os.cpu_count(), len(visible_gpus()), platform.node()]
    return default_cache() / "rates" / f"{digest([machine, settings])}.json"


@contextmanager
def _peaks_of_children(peaks: dict[str, float]) -> Iterator[None]:
    """The largest resident set of each child by its kind, in bytes, while the code inside runs. Of a GPU nothing is known."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            for kind, peak in resident(os.getpid()).items():
                peaks[kind] = max(peaks.get(kind, 0.0), peak)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def resident(above: int) -> dict[str, float]:
    """The greatest resident sets so far, in bytes, of the engine and the trainer below a process."""
    import psutil

    found: dict[str, Any] = {}
    with suppress(psutil.Error):
        for process in psutil.Process(above).children(recursive=True):
            with suppress(psutil.Error, OSError):
                command = process.cmdline()
                for kind, module in CHILDREN.items():
                    if any(word.startswith(module) for word in command):
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
                        found[kind] = max(found.get(kind, 0.0), 1024.0 * int(peak.split()[1]))
    return found

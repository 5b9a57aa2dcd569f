"""Two runs that share one GPU against one after the other: the real loop and its locks, with the work of the GPU slept.

    python -m benchmarks.turns                      # stages of 2 s, two rounds
    python -m benchmarks.turns --seconds 10 --rounds 3

Needs no GPU: the runs are told of one, and their sampler and trainer sleep as long as the stage is to take. Printed are
the seconds of one run alone, of two at once, their ratio to two one after the other, and for how long both used the GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness import command_line, fresh
from iterdpo.run.rundir import write_jsonl
from iterdpo.sampling import SamplingParameters
from iterdpo.testing import FakeSampler, build_tiny_checkpoint
from iterdpo.types import Completion


class Gpu:
    """Sleeps in place of a GPU's work, and notes when."""

    def __init__(self, root: Path, seconds: float) -> None:
        self.note, self.seconds = root / f"used-{os.getpid()}.jsonl", seconds

    @contextmanager
    def used(self, share: float) -> Iterator[None]:
        begin = time.time()
        time.sleep(share * self.seconds)
        yield
        with open(self.note, "a", encoding="utf-8") as file:
            file.write(json.dumps([begin, time.time()]) + "\n")


class SleepingSampler(FakeSampler):
    """`prompts` of them take as long as a stage."""

    def __init__(self, gpu: Gpu, prompts: int) -> None:
        super().__init__(lambda ids, k: "the sea is wide"[: 3 + (k * 2 + ids[-1]) % 7])
        self.gpu, self.prompts = gpu, prompts

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        with self.gpu.used(len(prompt_ids) / self.prompts):
            return super().sample(prompt_ids, seeds, parameters)


PROMPTS = 16


def main(*, seconds: float = 2.0, rounds: int = 2, directory: Path | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch)
        fresh(build_tiny_checkpoint, root / "model")
        write_jsonl(root / "prompts.jsonl", ({"prompt": f"Tale {n}"} for n in range((rounds + 1) * PROMPTS)))
        alone, _ = several(root, ["alone"], seconds, rounds)
        both, overlap = several(root, ["one", "other"], seconds, rounds)
    print(f"one run alone    {alone:8.1f} s\ntwo at once      {both:8.1f} s")
    print(f"at once against one after the other: {both / (2 * alone):.2f}\nboth on the GPU  {overlap:8.3f} s")


def several(root: Path, names: Sequence[str], seconds: float, rounds: int) -> tuple[float, float]:
    """Seconds of runs that start together, and those in which more than one used the GPU."""
    with ProcessPoolExecutor(len(names), get_context("spawn"), initializer=os.dup2, initargs=(2, 1)) as pool:
        for _ in pool.map(ready, names):  # the imports are not to count
            pass
        begin = time.time()
        notes = list(pool.map(one_run, [root] * len(names), names, [seconds] * len(names), [rounds] * len(names)))
        took = time.time() - begin
    spans = sorted(tuple(json.loads(line)) for note in set(notes) for line in note.read_text().splitlines())
    overlap, last = 0.0, begin
    for start, end in spans:
        overlap += max(0.0, min(last, end) - start)
        last = max(last, end)
    return took, overlap


def ready(name: str) -> None:
    import flows
    import iterdpo.training.models

    assert flows
    assert iterdpo.training.models
    time.sleep(1)  # so that no process takes two


def one_run(root: Path, name: str, seconds: float, rounds: int) -> Path:
    from flows import run_rounds
    from iterdpo.config import Config, parse_config
    from iterdpo.run import devices
    from iterdpo.stages import runs, train
    from iterdpo.training.launch import TRAIN_LOG, TrainSpec

    gpu = Gpu(root, seconds)

    def launch(spec: TrainSpec, **_: Any) -> None:
        with gpu.used(1.0):
            build_tiny_checkpoint(spec.output, seed=spec.seed % 1000)
            write_jsonl(spec.output / TRAIN_LOG, [{"step": 1, "loss": 0.5}])

    values = {
        "run_dir": str(root / name),
        "rounds": rounds,
        "model": {"path": str(root / "model")},
        "prompts": {"path": str(root / "prompts.jsonl"), "per_round": PROMPTS, "heldout": PROMPTS},
        "sampling": {"n": 2, "max_tokens": 16, "shard_size": 4},
        "judge": {"use": "given:below"},
        "evaluation": {"max_logp_gap": 1e3},  # the fake's log-probabilities are no model's
        "gate": {"minimum": 0.0},
    }
    with (
        mock.patch.object(devices, "_installed", return_value=1),
        mock.patch.object(devices, "own_folder", return_value=root),
        mock.patch.object(train, "launch_training", launch),
        mock.patch.object(runs, "warm_up", return_value=None),
    ):
        config, sampler = parse_config(Config, values), SleepingSampler(gpu, PROMPTS)
        run_rounds(config, judge=longer, sampler=sampler, prefect=False)
    print(name, "has ended", file=sys.stderr)
    return gpu.note


def longer(prompt: str, completion: str) -> int:
    return len(completion)


if __name__ == "__main__":
    command_line(main, __doc__)

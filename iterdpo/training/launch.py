"""Starts the processes of a training (`train.py`), and follows their log. Does not import torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from iterdpo.config import SUPERVISED, DPOConfig, Section, SupervisionConfig
from iterdpo.errors import ChildFailed, ChildLost, ConfigError
from iterdpo.escape import printable
from iterdpo.run import supervise
from iterdpo.run.devices import visible_gpus
from iterdpo.run.rundir import write_json

TRAIN_LOG = "train_log.jsonl"
OPTIMIZER_STATE = "optimizer.pt"
WAITING = "-"  # in place of a specification's path: it comes on standard input
MALLOC = {"hugetlb": 1, "trim_threshold": 16 << 30, "mmap_threshold": 32 << 20, "top_pad": 64 << 20}


class ReferenceInputs(Section):
    """The inputs of the step `reference`: all that its stored log-probabilities depend on."""

    reference: str
    """The reference policy's digest."""
    pairs: str
    """The digest of the step `pairs`."""
    precision: str
    adapter: str | Literal[False]
    """`dpo.adapter.quantize`: the adapter's base may be kept in fewer bits. False without an adapter."""
    sampler_logps_tolerance: float | None
    mismatched: int | None
    """The round's seed, which decides KTO's mismatched completions. None for another loss."""
    ld_alpha: float | None = Field(None, exclude_if=lambda alpha: alpha is None)
    """`dpo.ld_alpha`: weighted tokens have other sums."""
    first: tuple[int, int, int] | None = Field(None, exclude_if=lambda first: first is None)
    """`dpo.max_steps`, `dpo.pairs_per_step` and the round's seed, if fewer pairs than all are trained on: the others have
    no log-probabilities."""


class TrainSpec(Section):
    """One round's training, as its process reads it from a JSON file. Paths are absolute."""

    policy: Path
    """The checkpoint to start from."""
    reference: Path | None
    """The reference's checkpoint. None if it is `policy` itself."""
    pairs: Path
    eval_pairs: Path | None
    output: Path
    """The directory to write the trained policy to."""
    reference_output: Path
    """The step with the reference log-probabilities."""
    attic: Path | None
    """Where reference log-probabilities with other inputs are moved. None refuses instead."""
    reference_inputs: ReferenceInputs
    dpo: DPOConfig
    seed: int
    pairs_cache: Path
    """The directory for a copy of large files of pairs that is quick to read."""
    optimizer: Path | None = None
    """The optimizer state to continue from."""
    trust_remote_code: bool = False


def check_training(dpo: DPOConfig) -> None:
    """Check that this machine has what a training configuration needs, before anything is loaded.

    What is missing is a ConfigError that names the key and the remedy.
    """
    needed = [(str(tracker), "dpo.trackers") for tracker in dpo.trackers]
    if dpo.adapter is not None and dpo.adapter.quantize == "nf4":
        needed.append(("bitsandbytes", "dpo.adapter.quantize"))
        if not visible_gpus():
            raise ConfigError("dpo.adapter.quantize = 'nf4' needs a GPU, but this machine has none; set it to none")
    if dpo.optimizer == "adamw_8bit":
        needed.append(("torchao", "dpo.optimizer"))
    for package, key in needed:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key}: the package {package!r} is not installed; run: pip install {package}")
    if dpo.accelerate_config is not None:
        path = Path(dpo.accelerate_config)
        if not path.is_file():
            raise ConfigError(f"dpo.accelerate_config = {dpo.accelerate_config!r}: no such file")
        processes = yaml.safe_load(path.read_text()).get("num_processes", 1)
        if processes != dpo.processes:
            problem = f"num_processes is {processes}, but dpo.processes is {dpo.processes}"
            raise ConfigError(f"{path}: {problem}; set both to the number of GPUs")


def warm_up(dpo: DPOConfig, *, log: Path, reserved: Sequence[int] = ()) -> supervise.Child | None:
    """A trainer that imports torch and transformers, and then waits for its specification: `launch_training(child=)`.

    None if there is no such: several processes have a launcher, which starts them when it knows the work.
    """
    if dpo.processes > 1 or dpo.accelerate_config is not None:
        return None
    return supervise.start(command(dpo, WAITING), log=log, env=environment(processes=1), pipes=True, reserved=reserved)


def launch_training(
    spec: TrainSpec,
    *,
    spec_path: Path,
    log: Path,
    on_step: Callable[[dict[str, Any]], None],
    reserved: Sequence[int] = (),
    child: supervise.Child | None = None,
    supervision: SupervisionConfig = SUPERVISED,
) -> None:
    """Run the round in a child process, and return when its policy is written. The child dies with this process.

    `reserved` are descriptors of `devices.Turns`. `child` is one of `warm_up`. `on_step` gets each line of the training
    log soon after it is written; those of an earlier start come first. Each micro-batch changes the time of the log, by
    which a child that hangs is told.

    Raises:
        ChildFailed: with the reason. ChildLost if it hung, or a signal ended it: another one goes on from its checkpoint.
    """
    write_json(spec_path, spec.model_dump(mode="json"))
    steps, seen = spec.output / TRAIN_LOG, 0
    steps.touch()
    status: int | None = None
    beat, since, patience = steps.stat().st_mtime_ns, time.monotonic(), supervision.start
    if child is None:
        env = environment(processes=spec.dpo.processes)
        child = supervise.start(command(spec.dpo, str(spec_path)), log=log, env=env, reserved=reserved)
    else:
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        child.process.stdout.close()  # it says nothing there; open, it would stay so until the run ends
        with suppress(BrokenPipeError), child.process.stdin as told:  # else it has ended, and its log says why
            told.write(f"{spec_path}\n".encode())
    with child:
        while status is None:
            time.sleep(0.2)
            status = child.poll()
            if (now := steps.stat().st_mtime_ns) != beat:
                beat, since, patience = now, time.monotonic(), supervision.silence
            elif time.monotonic() - since > patience:
                child.end_silent(patience)
                status = child.poll()
            lines = steps.read_bytes().splitlines(keepends=True)
            for line in lines[seen:]:
                if line.endswith(b"\n"):
                    seen += 1
                    with suppress(ValueError):  # a line that is damaged: training begins with the checkpoint's log
                        on_step(json.loads(line))
        if status != 0:
            kind = ChildLost if child.lost else ChildFailed
            raise kind(f"training failed: {printable(child.reason())} (the whole log: {log})")
    for left in spec.output.glob("checkpoint-*"):
        shutil.rmtree(left)


def command(dpo: DPOConfig, spec: str) -> list[str]:
    """The trainer itself, several of them under torchrun, or `accelerate launch` with the user's file.

    Without such a file, `accelerate launch` takes settings from the one that `accelerate config` wrote for other work.
    """
    processes, module = dpo.processes, ["-m", "iterdpo.training.train", spec]
    if dpo.accelerate_config is not None:
        return [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            dpo.accelerate_config,
            *module,
        ]
    if processes > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
    return [sys.executable, *module]


def environment(*, processes: int) -> dict[str, str]:
    """The child's environment, with settings of the machine whose effect was found by profiling."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads(processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # A step frees and takes hundreds of MB. By default glibc returns them to the kernel and faults them in again,
        # page by page. Blocks below glibc's largest threshold, 32 MiB, are kept; larger ones are mapped, in huge pages,
        # so that the heap does not fragment.
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items()),
        # A thread that waits for the others spins. If anything else runs on its core, that costs many times what it
        # saves: let it sleep soon.
        "GOMP_SPINCOUNT": "10000",
    }


def threads(processes: int) -> int:
    """Threads of each training process: an equal share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // processes)

"""Starts the processes of a training (`train.py`) on this node, and follows their log. Does not import torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import Field

from iterdpo.config import SUPERVISED, DPOConfig, Section, SupervisionConfig
from iterdpo.errors import ChildFailed, ChildLost, ConfigError
from iterdpo.escape import printable
from iterdpo.run import supervise
from iterdpo.run.devices import visible_gpus
from iterdpo.run.rundir import read_json, write_json
from iterdpo.training.nodes import CALL, Caller, Calls, Node, calling

TRAIN_LOG = "train_log.jsonl"
OPTIMIZER_STATE = "optimizer.pt"
LOST_NODE = re.compile(
    r"[Cc]onnection (reset|closed|refused)|[Bb]roken pipe|DistBackendError|NCCL|[Tt]imed out|[Tt]imeout"
)
"""What gloo and NCCL say if a process of another node is gone."""
GRACE = 5.0  # seconds that another node has to end by itself
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
    if dpo.kernels == "liger":
        needed.append(("liger_kernel", "dpo.kernels"))
        if not visible_gpus():
            raise ConfigError("dpo.kernels = 'liger' needs a GPU, but this machine has none; set it to auto")
    for package, key in needed:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key}: the package {package!r} is not installed; run: pip install {package}")
    if dpo.accelerate_config is not None:
        path, settings = dpo.accelerate_config, accelerate_settings(dpo)
        processes = settings.get("num_processes", 1)
        if _zero_stage(settings) == 3:
            raise ConfigError(
                f"{path}: the trainer does not run under DeepSpeed's ZeRO-3; to divide weights among GPUs, use FSDP2, as in "
                "configs/accelerate/fsdp2-8gpu.yaml"
            )
        if processes != dpo.processes:
            problem = f"num_processes is {processes}, but dpo.processes is {dpo.processes}"
            raise ConfigError(f"{path}: {problem}; set both to the number of GPUs, of all nodes together")
        if processes % nodes(dpo):
            raise ConfigError(f"{path}: {processes} processes are not the same number on each of {nodes(dpo)} machines")


def _zero_stage(settings: dict[str, Any]) -> int:
    """DeepSpeed's stage in accelerate's settings, which may have DeepSpeed's own file in it, or name it; 0 without one."""
    section = settings.get("deepspeed_config") or {}
    own = str(section.get("deepspeed_config_file") or "{}")
    try:
        found = json.loads(own if own.lstrip().startswith("{") else Path(own).read_text(encoding="utf-8"))
        return int(section.get("zero_stage") or found.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError):  # DeepSpeed says what is wrong with it
        return 0


def accelerate_settings(dpo: DPOConfig) -> dict[str, Any]:
    """What `dpo.accelerate_config` says; nothing without such a file.

    Raises:
        ConfigError: it is missing, or not such a file.
    """
    if dpo.accelerate_config is None:
        return {}
    where = f"dpo.accelerate_config = {dpo.accelerate_config!r}"
    try:
        settings = yaml.safe_load(Path(dpo.accelerate_config).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: cannot be read ({printable(' '.join(str(error).split()))[:200]})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: it is no file of accelerate's settings")
    return settings


def nodes(dpo: DPOConfig) -> int:
    """The number of machines that train."""
    return int(accelerate_settings(dpo).get("num_machines") or 1)


def processes_here(dpo: DPOConfig) -> int:
    """Of the training processes, those on each machine."""
    return dpo.processes // nodes(dpo)


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
    call: Path | None = None,
    supervision: SupervisionConfig = SUPERVISED,
) -> None:
    """Run the round in a child process, and return when its policy is written. The child dies with this process.

    `reserved` are descriptors of `devices.Turns`. `child` is one of `warm_up`. `call`: the file that calls other nodes.
    `on_step` gets each line of the training log soon after it is written; those of an earlier start come first. Each
    micro-batch changes the time of the log, by which a child that hangs is told.

    Raises:
        ChildFailed: with the reason. ChildLost if it hung, a signal ended it, or another node was lost: another one goes
            on from its checkpoint.
    """
    write_json(spec_path, spec.model_dump(mode="json"))
    steps, seen = spec.output / TRAIN_LOG, 0
    steps.touch()
    status: int | None = None
    beat, since, patience = steps.stat().st_mtime_ns, time.monotonic(), supervision.start
    caller: Caller | None = None
    open_call = ExitStack()
    if child is None:
        words = command(spec.dpo, str(spec_path))
        if nodes(spec.dpo) > 1:
            assert call is not None
            node, caller = open_call.enter_context(calling(call, spec_path, accelerate_settings(spec.dpo)))
            words = on_node(words, node)
        env = environment(processes=processes_here(spec.dpo))
        child = supervise.start(words, log=log, env=env, reserved=reserved)
    else:
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        child.process.stdout.close()  # it says nothing there; open, it would stay so until the run ends
        with suppress(BrokenPipeError), child.process.stdin as told:  # else it has ended, and its log says why
            told.write(f"{spec_path}\n".encode())
    with open_call, child:
        while status is None:
            time.sleep(0.2)
            if caller is not None:
                caller.beat()
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
            reason = child.reason()
            lost = child.lost or (caller is not None and LOST_NODE.search(reason) is not None)
            kind = ChildLost if lost else ChildFailed
            raise kind(f"training failed: {printable(reason)} (the whole log: {log})")
    for left in spec.output.glob("checkpoint-*"):
        shutil.rmtree(left)


def join(run_dir: Path, rank: int, *, say: Callable[[str], None]) -> NoReturn:
    """Take part, as the node `rank`, in each training of a run that `launch_training` calls to; until this process is ended.

    Raises:
        ConfigError: a training has no node of that number.
    """
    calls, done = Calls(run_dir / CALL), ""
    while True:
        call = calls.current()
        if call is None or call.id == done:
            time.sleep(0.5)
            continue
        try:
            dpo = TrainSpec.model_validate(read_json(Path(call.spec))).dpo
        except FileNotFoundError:  # this node does not see it yet
            time.sleep(0.5)
            continue
        done = call.id
        if not 0 < rank < nodes(dpo):
            count = nodes(dpo)
            raise ConfigError(
                f"--rank {rank}: the training has {count} nodes; those beside the first are 1 to {count - 1}"
            )
        log = run_dir / "logs" / f"train-{rank}.log"
        words = on_node(command(dpo, call.spec), Node(rank, call.host, call.port))
        say(f"{call.spec}: training with the node {call.host}")
        with supervise.start(words, log=log, env=environment(processes=processes_here(dpo))) as child:
            while (status := child.poll()) is None and (now := calls.current()) is not None and now.id == done:
                time.sleep(0.5)
            with suppress(subprocess.TimeoutExpired):  # the first node may have ended because all is done
                status = child.wait(GRACE)
        match status:
            case 0:
                say("done")
            case None:
                say("ended: the first node is silent, or has ended the training")
            case _:
                say(f"ended: {printable(child.reason())} (the whole log: {log})")


def on_node(words: Sequence[str], node: Node) -> list[str]:
    """The command of `accelerate launch` for one of several nodes, whatever its file says of them."""
    at = words.index("--config_file")
    place = [f"--machine_rank={node.rank}", f"--main_process_ip={node.host}", f"--main_process_port={node.port}"]
    return [*words[:at], *place, *words[at:]]


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

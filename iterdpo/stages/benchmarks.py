"""Tasks of lm-evaluation-harness on each evaluated policy, by the real `lm_eval` in a process of its own."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iterdpo.config import BenchmarksConfig
from iterdpo.errors import ChildFailed
from iterdpo.escape import printable
from iterdpo.report.benchmarks import RESULTS, Results, results_of
from iterdpo.run import supervise
from iterdpo.run.artifacts import PolicyCheckpoint
from iterdpo.run.devices import visible_gpus
from iterdpo.run.rundir import Step, digest, read_json, write_json
from iterdpo.run.sums import sha256_file
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import template_key, thinking_key


def benchmark(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> None:
    """The policy's results, in the step `benchmarks`; nothing without `evaluation.benchmarks`.

    Raises:
        ChildFailed: `lm_eval` ended with an error, or left no results.
    """
    for step in benchmark_steps(run, round, policy):
        if step.manifest() is None:
            section = run.config.evaluation.benchmarks
            assert section is not None
            directory = step.begin()
            results = _evaluated(run, directory, policy, section)
            write_json(directory / RESULTS, results)
            version = importlib.metadata.version("lm-eval")
            step.finish(counts={"tasks": len(results), "lm_eval": version})


def benchmark_steps(run: IterativeRun, round: int, policy: PolicyCheckpoint) -> Iterator[Step]:
    """The step of `benchmark`, if the round has it."""
    section = run.config.evaluation.benchmarks
    if section is not None:
        inputs = {
            "model": run.initial.digest,
            "policy": policy.digest,
            "benchmarks": section.model_dump(exclude={"max_loss", "include_path", "batch_size"}),
            "dtype": run.config.sampling.engine.dtype,
            **template_key(run),
            **thinking_key(run),
            **({"tasks": _content(Path(section.include_path))} if section.include_path else {}),
        }
        yield run.dir.step(round, "benchmarks", inputs)


def settings(run: IterativeRun, policy: PolicyCheckpoint, section: BenchmarksConfig, output: Path) -> dict[str, Any]:
    """The configuration file of `lm_eval run`: names and paths in it are no arguments of a command line."""
    adapter = policy.path / "adapter_config.json"
    base = read_json(adapter)["base_model_name_or_path"] if adapter.exists() else None
    model: dict[str, Any] = {"pretrained": base or str(policy.path), "dtype": run.config.sampling.engine.dtype}
    if base is not None:
        model["peft"] = str(policy.path)
    if given := run.config.model.chat_template_kwargs:
        model["chat_template_args"] = given
    if run.tags is not None:
        model["think_end_token"] = run.tags.end  # what is scored follows the thought
    return {
        "model": "hf",
        "model_args": model | ({"trust_remote_code": True} if run.config.model.trust_remote_code else {}),
        "tasks": section.tasks,
        "output_path": str(output),
        "batch_size": section.batch_size,
        "device": "cuda" if visible_gpus() else "cpu",
        "apply_chat_template": section.apply_chat_template,
        **{
            k: v
            for k, v in section.model_dump(include={"include_path", "limit", "num_fewshot"}).items()
            if v is not None
        },
    }


def _evaluated(run: IterativeRun, directory: Path, policy: PolicyCheckpoint, section: BenchmarksConfig) -> Results:
    output, config = directory / ".lm_eval", directory / "lm_eval.json"  # JSON is YAML
    write_json(config, settings(run, policy, section, output))
    run.check(policy)
    log = run.dir.log_path("benchmarks")
    command = [sys.executable, "-m", "lm_eval", "run", "--config", str(config)]
    with run.devices.turn(), run.progress.stage("benchmarks", len(section.tasks), "tasks") as stage:
        stage.begin()
        with supervise.start(command, log=log, reserved=run.devices.descriptors) as child:
            status = child.wait()
        if status != 0:
            raise ChildFailed(f"lm_eval failed: {printable(child.reason())} (the whole log: {log})")
        reports = sorted(output.rglob("results*.json"))
        if not reports:
            raise ChildFailed(f"lm_eval left no results in {output} (the whole log: {log})")
        results = results_of(read_json(reports[-1]))
        stage.to(len(section.tasks))
    for path in sorted(output.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    output.rmdir()
    config.unlink()
    return results


def _content(folder: Path) -> str:
    """What identifies the files of a folder of tasks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest([[str(path.relative_to(folder)), sha256_file(path)] for path in files])

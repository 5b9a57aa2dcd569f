"""One DPO round by iterdpo and by TRL's DPOTrainer, on the same pairs, in alternating runs.

    python -m benchmarks.dpo_step --model DIRECTORY                       # a checkpoint, such as the quickstart's
    python -m benchmarks.dpo_step --model DIRECTORY --ablate              # iterdpo with one part off at a time
    python -m benchmarks.dpo_step --random-model 1b --device-name H200    # on a GPU, about a billion random weights

Every run is a process of its own. A line of JSON a case:

- pairs_per_second: over all optimizer steps but the first, the reference pass left out where there is one;
  whole_pairs_per_second: the reference pass and all steps.
- tokens_per_second: tokens of prompt + chosen and prompt + rejected, whichever way they were computed.
- peak_gib: the process's peak resident memory, or the GPU's peak allocation.
- mfu: the FLOPs that the rows need without padding (`iterdpo.training.flops`), against the best matrix product of the same run.

Ratios are of medians. TRL's `default` is DPOConfig as it comes, its `best` precomputes the reference and keeps its
activations. Both get the pairs as token ids, bf16 autocast over float32 weights, AdamW, and the same pairs a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {  # prompt tokens, completion tokens, pairs a prompt
    "short": ((16, 64), (16, 64), 1),
    "full": ((64, 64), (64, 64), 1),
    "long_prompt": ((256, 256), (32, 32), 1),
    "four_pairs": ((64, 64), (32, 32), 4),
    "vocabulary_128k": ((16, 64), (16, 64), 1),
    "gpu_long_prompt": ((1024, 1024), (128, 128), 1),
    "gpu_chat": ((128, 512), (128, 512), 1),
}
ON_CPU = ("short", "long_prompt", "four_pairs", "vocabulary_128k")
ON_GPU = ("gpu_long_prompt", "gpu_chat")
ABLATIONS = ("shared_prompts", "chunked_head", "allocator")
SIDES = ("ours", "trl_best", "trl_default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory")
    parser.add_argument(
        "--random-model", choices=["1b", "small"], help="random weights of this size in place of --model"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--ablate", action="store_true", help="iterdpo alone, with one part off at a time")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--tokens-per-micro-batch", type=int, help="of iterdpo; default: its configuration's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_work(json.loads(args.worker))), flush=True)
        return
    import torch

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        for case in args.cases or (ON_GPU if cuda else ON_CPU):
            model = args.model
            if case == "vocabulary_128k" or model is None:
                model = _random_model(
                    Path(scratch), "128k" if case == "vocabulary_128k" else args.random_model or "small"
                )
            job = {
                "case": case,
                "model": model,
                "pairs": args.pairs,
                "pairs_per_step": args.pairs_per_step,
                "tokens_per_micro_batch": args.tokens_per_micro_batch,
            }
            sides = ["ours", *(f"without {part}" for part in ABLATIONS)] if args.ablate else args.sides
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side in sides:
                    runs[side].append(_run({**job, "side": side}))
            print(json.dumps(_summary(case, runs)), flush=True)


def _summary(case: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    keys = (
        "pairs_per_second",
        "whole_pairs_per_second",
        "tokens_per_second",
        "peak_gib",
        "mfu",
        "first_loss",
        "last_loss",
    )
    medians = {side: {key: statistics.median(run[key] for run in done) for key in keys} for side, done in runs.items()}
    ours = medians.get("ours")
    ratios = {}
    for side, values in medians.items():
        if ours is not None and side != "ours":
            ratios[side] = {key: round(ours[key] / values[key], 3) for key in keys[:5]}
    first = next(iter(runs.values()))[0]
    rounded = {side: {key: round(value, 4) for key, value in values.items()} for side, values in medians.items()}
    repeats = len(next(iter(runs.values())))
    return {
        "case": case,
        "repeats": repeats,
        **rounded,
        "ours_to": ratios,
        "matmul_peak_gflops": first["matmul_peak_gflops"],
        "versions": first["versions"],
    }


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from iterdpo.training.launch import environment

    env = dict(os.environ)
    if not job["side"].startswith("trl") and job["side"] != "without allocator":
        env = environment(processes=1)
    command = [sys.executable, "-m", "benchmarks.dpo_step", "--worker", json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job['side']} on {job['case']} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def make_pairs(
    case: str, count: int, *, vocabulary: int, seed: int = 0
) -> list[tuple[list[int], list[int], list[int]]]:
    """Random token ids: prompt, chosen, rejected."""
    prompts, completions, per_prompt = CASES[case]
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(draw.randint(low, high))]

    pairs = []
    while len(pairs) < count:
        prompt = ids(*prompts)
        pairs += [(prompt, ids(*completions), ids(*completions)) for _ in range(per_prompt)]
    return pairs[:count]


def _random_model(scratch: Path, size: str) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from iterdpo.testing import build_tiny_checkpoint

    path = scratch / size
    if path.exists():
        return str(path)
    shapes: dict[str, dict[str, Any]] = {
        "small": {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "vocab_size": 32_000,
        },
        "128k": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_key_value_heads": 3,
            "vocab_size": 128_256,
        },
        "1b": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        },
    }
    shape = shapes[size]
    build_tiny_checkpoint(path)  # a tokenizer, for TRL's sake
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, num_attention_heads=shape["hidden_size"] // 64, max_position_embeddings=4096, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import torch
    from transformers import AutoConfig

    from iterdpo.training.collate import Tree, collate
    from iterdpo.training.flops import forward_flops, matmul_peak

    job["vocabulary"] = AutoConfig.from_pretrained(job["model"]).vocab_size
    pairs = make_pairs(job["case"], job["pairs"], vocabulary=job["vocabulary"])
    seconds, reference_seconds, losses, mfu = (_trl if job["side"].startswith("trl") else _ours)(job, pairs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak_gib = _peak_gib(device)
    peak = matmul_peak(device, torch.bfloat16)
    later = seconds[1:]  # the first step compiles and faults its memory in
    counted = (len(pairs) - job["pairs_per_step"]) / sum(later)
    tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    if mfu is None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"]))
        rows = collate([Tree(p, [c, r]) for p, c, r in pairs], shared=False)
        mfu = 3 * forward_flops(model, rows) / len(pairs) * counted / peak
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "trl")}
    return {
        "pairs_per_second": counted,
        "whole_pairs_per_second": len(pairs) / (sum(seconds) + reference_seconds),
        "tokens_per_second": counted * tokens / len(pairs),
        "peak_gib": peak_gib,
        "mfu": mfu,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "matmul_peak_gflops": round(peak / 1e9),
        "versions": versions,
    }


def _peak_gib(device: Any) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def _ours(job: dict[str, Any], pairs: list[Any]) -> tuple[list[float], float, list[float], float]:
    import iterdpo.training.reference as reference
    import iterdpo.training.train as trainer
    from iterdpo.config import DPOConfig
    from iterdpo.data.pairs import write_pairs
    from iterdpo.run.rundir import read_jsonl
    from iterdpo.training.launch import ReferenceInputs, TrainSpec
    from iterdpo.types import Completion, PreferencePair, Prompt

    if job["side"] == "without chunked_head":
        trainer.select_logp_path = lambda *args, **kwargs: "plain"  # type: ignore[assignment]
    settings: dict[str, Any] = {
        "pairs_per_step": job["pairs_per_step"],
        "learning_rate": 1e-5,
        "checkpoint_every": 10**6,
    }
    settings["shared_prompts"] = job["side"] != "without shared_prompts"
    if job["tokens_per_micro_batch"]:
        settings["tokens_per_micro_batch"] = job["tokens_per_micro_batch"]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "pairs").mkdir()
        (root / "policy").mkdir()
        rows = [
            PreferencePair(
                Prompt(str(hash(tuple(p))), ""), p, Completion("", c, [], "stop"), Completion("", r, [], "stop")
            )
            for p, c, r in pairs
        ]
        write_pairs(root / "pairs", rows, summary="random pairs")
        spec = TrainSpec(
            name="benchmark",
            policy=Path(job["model"]),
            reference=None,
            pairs=root / "pairs" / "train.parquet",
            eval_pairs=None,
            output=root / "policy",
            reference_output=root / "reference",
            attic=None,
            reference_inputs=ReferenceInputs(
                reference="", pairs="", precision="", adapter=False, sampler_logps_tolerance=None, mismatched=None
            ),
            dpo=DPOConfig(**settings),
            seed=0,
            pairs_cache=root / "cache",
            tracker_dir=root / "trackers",
        )
        reference_seconds = 0.0
        compute = reference.computed_logps

        def timed(*args: Any) -> Any:
            nonlocal reference_seconds
            started = time.perf_counter()
            logps = compute(*args)
            reference_seconds += time.perf_counter() - started
            return logps

        reference.computed_logps = timed
        trainer.train(spec)
        log = read_jsonl(root / "policy" / "train_log.jsonl")
    seconds = [job["pairs_per_step"] / row["pairs_per_second"] for row in log]
    return seconds, reference_seconds, [row["loss"] for row in log], statistics.median(row["mfu"] for row in log[1:])


def _trl(job: dict[str, Any], pairs: list[Any]) -> tuple[list[float], float, list[float], None]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if job["side"] == "trl_best" else {}
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    class TokenTrainer(DPOTrainer):
        """Takes token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            logps = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - started
            return logps

    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=job["pairs_per_step"],
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            learning_rate=1e-5,
            max_length=None,
            **best,
        )
        rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
        trainer = TokenTrainer(
            model=job["model"],
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return seconds, getattr(trainer, "reference_seconds", 0.0), losses, None


if __name__ == "__main__":
    main()

"""One DPO round by iterdpo and by TRL's DPOTrainer, on the same pairs, in alternating runs.

    python -m benchmarks.dpo_step --model DIRECTORY                       # a checkpoint, such as the quickstart's
    python -m benchmarks.dpo_step --model DIRECTORY --ablate              # iterdpo with one part off at a time
    python -m benchmarks.dpo_step --random-model 1b                       # on a GPU, about a billion random weights

Every run is a process of its own. A line of JSON a case:

- pairs_per_second: over all optimizer steps but the first, the reference pass left out where there is one;
  with_reference_per_second: the same, and of the reference pass all but the first step's pairs;
  whole_pairs_per_second: the reference pass and all steps.
- tokens_per_second: tokens of prompt + chosen and prompt + rejected, whichever way they were computed.
- peak_gib: the process's peak resident memory, or the GPU's peak allocation.
- mfu: the FLOPs that the rows need without padding (`iterdpo.training.flops`), against the best matrix product of the same run.

- others: the share of the processors that other programs took meanwhile. Above a twentieth, `ours_to` is no conclusion,
  and the exit status is 1.

Ratios are of medians. On a CPU, all runs are bound to the same `--cores`. TRL's `default` is DPOConfig as it comes, its
`best` precomputes the reference and keeps its activations, its `liger` also has Liger's kernels (on a GPU). All get the
pairs as token ids, bf16 autocast over float32 weights, AdamW, and the same pairs a step.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.harness import command_line, fresh, others, peak_mib, process_age
from iterdpo.testing import build_tiny_checkpoint, train_spec
from iterdpo.training.launch import environment

CASES = {  # prompt tokens, completion tokens, pairs a prompt
    "short": ((16, 64), (16, 64), 1),
    "full": ((64, 64), (64, 64), 1),
    "long_prompt": ((256, 256), (32, 32), 1),
    "four_pairs": ((64, 64), (32, 32), 4),
    "vocabulary_128k": ((16, 64), (16, 64), 1),
    "gpu_long_prompt": ((1024, 1024), (128, 128), 1),
    "gpu_four_pairs": ((1024, 1024), (128, 128), 4),
    "gpu_chat": ((128, 512), (128, 512), 1),
    "gpu_long": ((1024, 8192), (2048, 8192), 1),
}
ON_CPU = ("short", "long_prompt", "four_pairs", "vocabulary_128k")
ON_GPU = ("gpu_long_prompt", "gpu_four_pairs", "gpu_chat")
ABLATIONS = ("shared_prompts", "chunked_head", "allocator")
SIZES = {  # hidden size, intermediate size, layers, key-value heads, vocabulary
    "small": (256, 704, 4, 1, 32_000),
    "128k": (576, 1536, 8, 3, 128_256),
    "135m": (576, 1536, 30, 3, 49_152),  # SmolLM2's
    "1b": (2048, 8192, 16, 8, 128_256),  # Llama 3.2's
    "8b": (4096, 14336, 32, 8, 128_256),  # Llama 3.1's
}
HEADS = {"8b": 128}  # a head's size, if not 64
QUIET = 0.05
COMPARED = (
    "pairs_per_second",
    "with_reference_per_second",
    "whole_pairs_per_second",
    "tokens_per_second",
    "peak_gib",
    "mfu",
)
Case = Literal[*CASES]
Side = Literal["ours", "trl_best", "trl_default", "trl_liger"]
Pairs = list[tuple[list[int], list[int], list[int]]]  # prompt, chosen, rejected


class Job(NamedTuple):
    case: str
    model: str
    pairs: int
    pairs_per_step: int
    tokens_per_micro_batch: int | None
    side: str
    dpo: tuple[tuple[str, Any], ...] = ()  # further settings of ours


def main(
    *,
    model: str | None = None,
    random_model: Literal["1b", "small"] = "small",
    cases: tuple[Case, ...] = (),
    sides: tuple[Side, ...] = ("ours", "trl_best", "trl_default"),
    ablate: bool = False,
    pairs: int = 96,
    pairs_per_step: int = 8,
    tokens_per_micro_batch: int | None = None,
    repeats: int = 3,
    cores: int = 2,
) -> None:
    import torch

    busy = []
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases or (ON_GPU if torch.cuda.is_available() else ON_CPU):
            checkpoint = model
            if case == "vocabulary_128k" or model is None:
                checkpoint = random_checkpoint(Path(scratch), "128k" if case == "vocabulary_128k" else random_model)
            runs: dict[str, list[dict[str, Any]]] = {
                side: [] for side in (["ours", *(f"without {part}" for part in ABLATIONS)] if ablate else sides)
            }
            with others() as share:
                for side, done in list(runs.items()) * repeats:
                    tuned = not side.startswith("trl") and side != "without allocator"
                    job = Job(case, checkpoint, pairs, pairs_per_step, tokens_per_micro_batch, side)
                    done.append(fresh(measure, job, environment=environment(processes=1) if tuned else None))
                busy.append(share())
            print(json.dumps({**_summary(case, runs), "others": round(busy[-1], 3)}), flush=True)
    if max(busy) > QUIET:
        sys.exit(f"other programs took {max(busy):.0%} of the processors: run it again on a quiet machine")


def _summary(case: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    medians = {
        side: {key: statistics.median(run[key] for run in done) for key in (*COMPARED, "first_loss", "last_loss")}
        for side, done in runs.items()
    }
    ours = medians.get("ours")
    first, *more = next(iter(runs.values()))
    return {
        "case": case,
        "repeats": 1 + len(more),
        **{side: {key: round(value, 4) for key, value in values.items()} for side, values in medians.items()},
        "ours_to": {
            side: {key: round(ours[key] / values[key], 3) for key in COMPARED}
            for side, values in medians.items()
            if ours is not None and side != "ours"
        },
        "matmul_peak_gflops": first["matmul_peak_gflops"],
        "versions": first["versions"],
    }


def make_pairs(case: str, count: int, *, vocabulary: int, seed: int = 0) -> Pairs:
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


def random_checkpoint(scratch: Path, size: str) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = scratch / size
    if path.exists():
        return str(path)
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    build_tiny_checkpoint(path)  # for the tokenizer, which gets a word for each further id
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    words: dict[str, int] = tokenizer["model"]["vocab"]
    words |= {f"\u0120w{number}": number for number in range(len(words), vocabulary)}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEADS.get(size, 64),
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=16_384,
        tie_word_embeddings=size != "8b",
        dtype=torch.bfloat16 if size == "8b" else torch.float32,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(config.dtype).save_pretrained(path)
    return str(path)


def measure(job: Job) -> dict[str, Any]:
    """One run of one side."""
    if job.side == "ours":
        from iterdpo.training.train import prepare

        prepare()  # as the trainer's process does
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from iterdpo.training.collate import Tree, collate
    from iterdpo.training.flops import forward_flops, matmul_peak

    config = AutoConfig.from_pretrained(job.model)
    pairs = make_pairs(job.case, job.pairs, vocabulary=config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        run = _trl if job.side.startswith("trl") else _ours
        seconds, reference, losses, mfu, more = run(job, pairs, Path(scratch))
    cuda = torch.cuda.is_available()
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_mib() / 2**10
    peak = matmul_peak(torch.device("cuda" if cuda else "cpu"), torch.bfloat16)
    # The first step, and the first of the reference, compile and fault their memory in.
    counted = (len(pairs) - job.pairs_per_step) / sum(seconds[1:])
    apart = statistics.mean(reference[1:] or reference or [0.0]) / job.pairs_per_step
    tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    if mfu is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        rows = collate([Tree(p, [c, r]) for p, c, r in pairs], shared=False)
        mfu = 3 * forward_flops(model)(rows) / len(pairs) * counted / peak
    return {
        "pairs_per_second": counted,
        "with_reference_per_second": 1 / (1 / counted + apart),
        "whole_pairs_per_second": len(pairs) / (sum(seconds) + sum(reference)),
        "tokens_per_second": counted * tokens / len(pairs),
        "peak_gib": peak_gib,
        "mfu": mfu,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "matmul_peak_gflops": round(peak / 1e9),
        "step_s": [round(each, 4) for each in seconds],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        **more,
    }


Run = tuple[list[float], list[float], list[float], float | None, dict[str, Any]]
"""Seconds of each step, and of the reference pass over the pairs of each; losses; MFU; what else there is to say."""


def _ours(job: Job, pairs: Pairs, root: Path) -> Run:
    import iterdpo.training.train as trainer
    from iterdpo.config import DPOConfig
    from iterdpo.data.pairs import TRAIN, write_pairs
    from iterdpo.run.rundir import read_jsonl
    from iterdpo.training.step import Compute
    from iterdpo.types import Completion, PreferencePair, Prompt

    if job.side == "without chunked_head":
        trainer.select_logp_path = lambda *args, **kwargs: "plain"  # type: ignore[assignment]
    dpo = DPOConfig(
        pairs_per_step=job.pairs_per_step,
        learning_rate=1e-5,
        checkpoint_every=10**6,
        shared_prompts=job.side != "without shared_prompts",
        **({"tokens_per_micro_batch": job.tokens_per_micro_batch} if job.tokens_per_micro_batch else {}),
        **dict(job.dpo),
    )
    (root / "pairs").mkdir()
    rows = [
        PreferencePair(Prompt(str(hash(tuple(p))), ""), p, *(Completion("", ids, [], "stop") for ids in (c, r)))
        for p, c, r in pairs
    ]
    write_pairs(root / "pairs", rows, summary="random pairs")
    spec = train_spec(root, Path(job.model), root / "pairs" / TRAIN, dpo)
    spec.output.mkdir()
    spent: dict[str, list[float]] = {"load": []}
    reference = Laps()
    ages: list[float] = []
    step = trainer.Trainer.step

    def noted(self: Any, number: int) -> Any:
        done = step(self, number)
        ages.append(process_age())
        return done

    Compute.pair_logps = reference.each(Compute.pair_logps)  # type: ignore[method-assign]
    trainer.load_policy = _timed(spent["load"], trainer.load_policy)
    trainer.save_policy = lambda *args: None
    trainer.Trainer.step = noted  # type: ignore[method-assign]
    trainer.train(spec)
    log = read_jsonl(spec.output / "train_log.jsonl")
    seconds = [job.pairs_per_step / row["pairs_per_second"] for row in log]
    rewards = [log[0].get(f"rewards/{side}", 0.0) for side in ("chosen", "rejected")]
    more = {
        "first_step_s": ages[0] - sum(spent["load"]) - sum(reference.seconds),
        "load_s": sum(spent["load"]),
        "reference_s": sum(reference.seconds),
        "first_reward": max(map(abs, rewards)),
    }
    mfu = statistics.median(row["mfu"] for row in log[1:])
    return seconds, reference.seconds, [row["loss"] for row in log], mfu, more


class Laps:
    """Seconds from each call's end to the next one's, of the first from its beginning. A GPU is not waited for."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def each(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose calls are the laps."""

        def call(*args: Any, **settings: Any) -> Any:
            if not self._marks:
                self._mark()
            made = work(*args, **settings)
            self._mark()
            return made

        return call

    def _mark(self) -> None:
        import torch

        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    @property
    def seconds(self) -> list[float]:
        """Of each lap so far, once the GPU has ended the last."""
        pairs = itertools.pairwise(self._marks)
        if self._marks and not isinstance(self._marks[0], float):
            self._marks[-1].synchronize()
            return [one.elapsed_time(other) / 1e3 for one, other in pairs]
        return [other - one for one, other in pairs]


def _timed(spent: list[float], work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, which adds its seconds to `spent`, a GPU's work included."""
    import torch

    def call(*args: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        made = work(*args, **settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        return made

    return call


def _trl(job: Job, pairs: Pairs, root: Path, *, parts: int = 1) -> Run:
    """`parts`: micro-batches of a step, as few as the memory allows."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if job.side != "trl_default" else {}
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

    reference = Laps()
    TokenTrainer.compute_ref_log_probs = reference.each(DPOTrainer.compute_ref_log_probs)
    config = DPOConfig(
        output_dir=str(root),
        per_device_train_batch_size=job.pairs_per_step // parts,
        precompute_ref_batch_size=job.pairs_per_step,
        gradient_accumulation_steps=parts,
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=1e-5,
        max_length=None,
        use_liger_kernel=job.side == "trl_liger",
        **best,
    )
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    trainer = TokenTrainer(
        model=job.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Clock()],
    )
    fits = True
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        fits = False  # what it holds is free once the exception is gone
    if not fits and parts < job.pairs_per_step:
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        return _trl(job, pairs, root, parts=2 * parts)
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return seconds, reference.seconds if best else [], losses, None, {}


if __name__ == "__main__":
    command_line(main, __doc__)

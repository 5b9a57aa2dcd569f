"""What a run costs before it begins: seconds by stage, memory by device. Arithmetic on counts, rates and a model's shape.

A stage takes `start + each * count` seconds. The rates come from a calibration on this machine, from a user's file, or from
a card's data sheet with the shares of its peaks that were measured (docs/gpu.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from iterdpo.config import Config, DPOConfig
from iterdpo.errors import ConfigError
from iterdpo.run.checkpoints import training_bytes, weight_files, weight_shapes
from iterdpo.run.rundir import read_json

GIB = 2**30
ESTIMATE = "estimate.json"


class Card(NamedTuple):
    """An accelerator by its maker's data sheet: dense bfloat16 FLOP/s, bytes of memory, bytes/s from memory."""

    flops: float
    memory: float
    bandwidth: float


CARDS = {
    "A100-40GB": Card(312e12, 40e9, 1.555e12),
    "A100-80GB": Card(312e12, 80e9, 2.039e12),
    "H100": Card(989e12, 80e9, 3.35e12),
    "H200": Card(989e12, 141e9, 4.8e12),
    "B200": Card(2250e12, 180e9, 8.0e12),
    "L40S": Card(362e12, 48e9, 0.864e12),
    "L4": Card(121e12, 24e9, 0.3e12),
    "RTX-4090": Card(165e12, 24e9, 1.008e12),
}
"""NVIDIA's data sheets: SXM where there are several forms; without sparsity."""


def card_of(name: str) -> Card:
    """The card of this name. A ConfigError that lists the known ones if there is none."""
    if (found := {known.lower(): card for known, card in CARDS.items()}.get(name.lower())) is None:
        raise ConfigError(f"--card {name!r}: not a known card; {', '.join(CARDS)} are")
    return found


TRAIN_SHARE = 0.39  # of peak FLOP/s in a training step: 1.2B on an H100, docs/gpu.md
SCORE_SHARE = 0.3  # in a forward pass alone
READ_SHARE = 0.6  # of peak bandwidth in a decoding step
DECODE_SECONDS = 0.028  # of a decoding step besides: 135M on an H100 and an H200, docs/gpu.md
ENGINE_START, TRAINER_START = 60.0, 15.0
DISK = 1e9  # bytes/s of loading and saving
WORKSPACE = 2 * GIB  # of the engine and of the trainer: kernels, a decoding step's or a chunk's activations


class Shape(NamedTuple):
    """What of a model decides its cost. `Shape.of(run.model_path, run.model_config)`"""

    weights: int
    layers: int
    hidden: int
    inner: int
    kv_width: int
    """Key-value heads times the size of a head."""

    @staticmethod
    def of(directory: Path, config: Mapping[str, Any]) -> Shape:
        """From the headers of a checkpoint and its config.json; what that does not say is taken from other models' habits."""
        text = config.get("text_config") or config
        weights = sum(map(math.prod, weight_shapes(weight_files(directory)).values()))
        hidden = text.get("hidden_size") or text.get("n_embd") or 1
        heads = text.get("num_attention_heads") or text.get("n_head") or 1
        size = text.get("head_dim") or hidden // heads
        layers = text.get("num_hidden_layers") or text.get("n_layer") or 1
        inner = text.get("intermediate_size") or text.get("n_inner") or 4 * hidden
        return Shape(weights, layers, hidden, inner, (text.get("num_key_value_heads") or heads) * size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key-value cache for a token, in 16 bits."""
        return 4 * self.layers * self.kv_width


class Load(NamedTuple):
    """The counts of a run, in the units in which its stages show their progress."""

    rounds: int
    completions: int
    """Sampled in a round."""
    evaluated: int
    """Sampled in an evaluation."""
    judges: int
    pairs: int
    """That the trainer sees in a round, each counted once a pass."""
    prompt_tokens: float
    completion_tokens: float
    others: int = 0
    """Sampled in a round from another policy."""
    compared: int = 0
    """Sampled once from another model, on held-out prompts."""
    unevaluated: Collection[int] = ()
    """Rounds without an evaluation."""


@dataclass(frozen=True)
class Rates:
    """Seconds of each stage: `Rates({"sample": (0.2, 0.06), "train": (25.0, 0.3)}, engine=23.0, round=4.0, source="…")`."""

    stages: dict[str, tuple[float, float]]
    """Seconds until a stage does its first unit, and for each unit after that."""
    engine: float = 0.0
    """Seconds until the engine is ready, once a run."""
    round: float = 0.0
    """Seconds of a round outside of its stages."""
    source: str = ""
    memory: dict[str, float] = field(default_factory=dict)
    """Peaks that were measured, in bytes: `engine`, `trainer`."""

    def seconds(self, stage: str, count: float) -> float:
        start, each = self.stages.get(stage, (0.0, 0.0))
        return start + each * count if count else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_rates(path: Path) -> Rates:
    """The rates in a file, as `Rates.to_json` writes them. A ConfigError if it has others."""
    try:
        values = read_json(path)
        stages = {str(name): (float(start), float(each)) for name, (start, each) in values["stages"].items()}
        numbers = {key: float(values.get(key, 0.0)) for key in ("engine", "round")}
        memory = {str(key): float(value) for key, value in values.get("memory", {}).items()}
        if not all(math.isfinite(x) and x >= 0 for pair in stages.values() for x in pair):
            raise ValueError("a rate is negative or not finite")
        return Rates(stages, **numbers, source=str(values.get("source", path)), memory=memory)
    except FileNotFoundError:
        raise ConfigError(
            f"--rates {path}: no such file; `iterdpo plan --calibrate` prints where it writes one"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        form = json.dumps({"stages": {"sample": [0.2, 0.06]}, "engine": 23.0, "round": 4.0})
        raise ConfigError(f"--rates {path}: not a file of rates ({error}); it has the form {form}") from None


def rates_of_card(card: Card, name: str, shape: Shape, config: Config, load: Load) -> Rates:
    """The rates by a data sheet, for one engine and one trainer on as many cards as the configuration gives them."""
    engines, trainers = config.sampling.engine.tensor_parallel_size, config.dpo.processes
    prompt, completion = load.prompt_tokens, load.completion_tokens
    at_once = min(config.sampling.engine.max_num_seqs, load.completions)
    read = 2 * shape.weights + at_once * shape.kv_bytes * (prompt + completion / 2)
    step = DECODE_SECONDS + max(
        read / (READ_SHARE * card.bandwidth * engines),
        2 * shape.weights * at_once / (SCORE_SHARE * card.flops * engines),
    )
    prefill = 2 * shape.weights * prompt / (SCORE_SHARE * card.flops * engines) / config.sampling.n
    sample = completion * step / at_once + prefill
    pair = shape.weights * (prompt + 2 * completion) / trainers / card.flops
    reference = 2 / SCORE_SHARE if config.dpo.uses_reference else 0.0
    # An adapter saves the weights' own gradients, which costs as much as computing activations again.
    recomputes = config.dpo.gradient_checkpointing and config.dpo.adapter is None
    score = 2 * shape.weights * (prompt + completion) / (SCORE_SHARE * card.flops)
    loading = 2 * shape.weights / DISK
    saved = 4 * shape.weights / DISK
    return Rates(
        {
            "sample": (1.0, sample),
            "evaluate": (1.0, sample),
            "train": (TRAINER_START + loading + saved, pair * ((8 if recomputes else 6) / TRAIN_SHARE + reference)),
            "kl": (2 * loading, score),
        },
        engine=ENGINE_START + loading,
        round=5.0,
        source=f"the data sheet of {name}, judges left out",
    )


def seconds_of_rounds(load: Load, rates: Rates) -> list[dict[str, float]]:
    """Seconds by stage of each round, round 0 first."""

    def evaluation(completions: int) -> dict[str, float]:
        return {
            "evaluate": rates.seconds("evaluate", completions),
            "score": load.judges * rates.seconds("score", completions),
        }

    compare = {"compare": rates.seconds("compare", 2 * load.evaluated)}
    evaluated = {**evaluation(load.evaluated), **compare, "kl": rates.seconds("kl", 2 * load.evaluated)}
    first = {"start": rates.engine + rates.round, **evaluation(load.evaluated + load.compared)}
    each = {
        "start": rates.round,
        "sample": rates.seconds("sample", load.completions + load.others),
        "judge": rates.seconds("judge", load.completions),
        "train": rates.seconds("train", load.pairs),
    }
    rounds = range(1, load.rounds + 1)
    return [first, *(each if number in load.unevaluated else {**each, **evaluated} for number in rounds)]


def estimate_to_json(load: Load, rates: Rates) -> dict[str, Any]:
    """What a run keeps as `ESTIMATE`: seconds of the steps of each round, by the names that they have in the metrics."""
    rounds = []
    for number, spent in enumerate(seconds_of_rounds(load, rates)):
        seconds = {"evaluate_s": sum(spent.get(name, 0.0) for name in ("evaluate", "score", "compare", "kl"))}
        if number == 0:
            seconds["evaluate_s"] += rates.engine
        else:
            seconds |= {f"{name}_s": spent[name] for name in ("sample", "judge", "train")}
        rounds.append(seconds | {"round_s": sum(seconds.values())})
    return {"source": rates.source, "rounds": rounds}


def trainer_bytes(
    shape: Shape, directory: Path | None, dpo: DPOConfig, *, sharded: bool, step_tokens: float = math.inf
) -> float:
    """Bytes of a training process on its GPU at its peak: weights, gradients and moments, activations, a chunk of logits.

    `sharded`: FSDP divides the first three among the processes. `directory`: the checkpoint, from whose headers an adapter
    is counted. `step_tokens`: of an optimizer step on this process, which micro-batches of equal size divide. If there is
    but one, its activations are gone when the gradients are there.
    """
    if dpo.adapter is not None:
        frozen = {"none": 2.0 if dpo.precision == "bf16" else 4.0, "nf4": 0.55}[dpo.adapter.quantize]
        trained = training_bytes(directory, dpo)[0] / 4 if directory is not None else 0.01 * shape.weights
        kept, gradients = frozen * shape.weights + 12 * trained, 4 * trained
    elif dpo.optimizer == "adamw_8bit":
        kept, gradients = 4.0 * shape.weights, 2.0 * shape.weights
    else:
        kept, gradients = (14.0 if dpo.precision == "bf16" else 12.0) * shape.weights, 4.0 * shape.weights
    number = 2 if dpo.precision == "bf16" else 4
    layer = number * (8 * shape.hidden + 2 * shape.kv_width + 4 * shape.inner)
    token = number * shape.hidden * shape.layers + layer if dpo.gradient_checkpointing else layer * shape.layers
    if dpo.activation_offload:
        token = 2 * layer
    divided = dpo.processes if sharded else 1
    kept, gradients = kept / divided, gradients / divided
    if step_tokens <= dpo.tokens_per_micro_batch:
        return kept + max(gradients, token * step_tokens) + WORKSPACE
    parts = step_tokens / dpo.tokens_per_micro_batch
    tokens = dpo.tokens_per_micro_batch * (parts / math.ceil(parts) if math.isfinite(parts) else 1.0)
    return kept + gradients + token * tokens + WORKSPACE


def engine_bytes(shape: Shape, config: Config, max_model_len: int) -> float:
    """The least bytes of an engine on one GPU: its weights, the cache of one sequence, and what a step needs."""
    number = 4 if config.sampling.engine.dtype == "float32" else 2
    parallel = config.sampling.engine.tensor_parallel_size
    return (number * shape.weights + shape.kv_bytes * max_model_len) / parallel + WORKSPACE


def scorer_bytes(shape: Shape) -> float:
    """Bytes of the model whose log-probabilities an evaluation computes, in float32 on one GPU."""
    return 4.0 * shape.weights + WORKSPACE


def what_would_fit(shape: Shape, directory: Path | None, dpo: DPOConfig, memory: float, *, sharded: bool) -> list[str]:
    """Changes of the section `dpo`, by themselves and together, after which the trainer fits in `memory` bytes."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if not dpo.gradient_checkpointing:
        steps.append(("dpo.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    smaller = 2 ** int(math.log2(max(2, dpo.tokens_per_micro_batch - 1)))
    while smaller >= 1024:
        steps.append((f"dpo.tokens_per_micro_batch={smaller}", {"tokens_per_micro_batch": smaller}))
        smaller //= 2
    wide = {"gradient_checkpointing": True}
    if dpo.adapter is None and dpo.optimizer == "adamw" and dpo.precision == "bf16":
        steps.append(("dpo.optimizer=adamw_8bit dpo.gradient_checkpointing=true", {"optimizer": "adamw_8bit", **wide}))
    if dpo.adapter is None:
        adapted = DPOConfig.model_validate({"adapter": {}}).adapter
        quantized = DPOConfig.model_validate({"adapter": {"quantize": "nf4"}}).adapter
        more = {"optimizer": "adamw", **wide}
        steps.append(("dpo.adapter={} dpo.gradient_checkpointing=true", {"adapter": adapted, **more}))
        steps.append(("dpo.adapter={quantize: nf4} dpo.gradient_checkpointing=true", {"adapter": quantized, **more}))
    fitting = [
        keys
        for keys, update in steps
        if trainer_bytes(shape, None, dpo.model_copy(update=update), sharded=sharded) <= memory
    ]
    for processes in (2, 4, 8, 16, 32, 64):
        wider = dpo.model_copy(update={"processes": processes, **wide})
        if trainer_bytes(shape, directory, wider, sharded=True) <= memory:
            fitting.append(f"FSDP over {processes} GPUs (docs/training.md) with dpo.gradient_checkpointing=true")
            break
    return fitting

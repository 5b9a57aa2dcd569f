"""One DPO round: the process that `launch.py` starts, with a specification file as its only argument. With `-` it
imports what it needs, and reads the file's path from its standard input.

    reference log-probabilities, once, before the first step      -> <round>/reference/            reference.py
    AdamW on the loss, step by step                               -> train_log.jsonl               step.py
    a checkpoint every few steps, the policy at the end           -> <round>/policy.partial/       checkpoint.py

One model is in memory at a time. Under FSDP2 no process has a whole one on its device. If the reference is the policy
that the round starts from, its log-probabilities come from the policy itself, over the very batches that training will
use: at step 0 the implicit rewards are exactly 0. If it is the base of the policy's adapter, they come from the policy
with its adapter off.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, set_seed
from torch import Tensor

from iterdpo.config import AdapterConfig, DPOConfig
from iterdpo.data.pairs import TokenPairs
from iterdpo.run.rundir import read_json, write_json
from iterdpo.run.supervise import REASON, end_with
from iterdpo.run.worker import import_heavy
from iterdpo.training.checkpoint import carry_moments, drop_frozen, resume, save_checkpoint, save_policy
from iterdpo.training.collate import RoundPairs
from iterdpo.training.launch import TRAIN_LOG, WAITING, TrainSpec
from iterdpo.training.logps import LogpPath, Scorer, select_logp_path
from iterdpo.training.models import (
    ADAPTER_CONFIG,
    adapter_base,
    load_policy,
    use_kernels,
    whole_modules,
    with_new_adapter,
)
from iterdpo.training.reference import reference_logps
from iterdpo.training.step import Compute, Trainer

log = logging.getLogger(__name__)


def main() -> None:
    end_with(os.getppid())  # a launcher between the guard and this process may be killed
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        waits = sys.argv[1] == WAITING
        if waits:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the log: nobody reads the pipe
        prepare()
        # A parent that waited writes the path once it knows the work; nothing if there is none.
        if path := sys.stdin.readline().strip() if waits else sys.argv[1]:
            train(TrainSpec.model_validate(read_json(Path(path))))
    except Exception as error:
        traceback.print_exc()
        print(f"{REASON}{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(1)


def prepare() -> None:
    """Import transformers, which takes longer than torch, without what no text needs.

    Half a million objects stay from then on: the collector, which takes a tenth of a second to look through them, no
    longer does. A step on a GPU can take that long.
    """
    import_heavy("transformers.models.auto.modeling_auto", without=("sklearn", "scipy", "torchvision"))
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries would report leaks


def train(spec: TrainSpec) -> None:
    """Run the round, or the rest of it. The module's docstring lists the files that it writes.

    Raises:
        RuntimeError: fewer processes came up than were asked for, a loss or gradient is not finite, or a sentinel
            stops the round.
    """
    accelerator = _accelerator(spec)
    set_seed(spec.seed)
    pairs = RoundPairs(
        TokenPairs(spec.pairs, spec.pairs_cache),
        TokenPairs(spec.eval_pairs, spec.pairs_cache) if spec.eval_pairs else None,
        spec.dpo,
        seed=spec.seed,
    )
    trainer = _trainer(spec, accelerator, pairs)
    first = resume(accelerator, spec.output, adapter=spec.dpo.adapter is not None)
    with open(spec.output / TRAIN_LOG, "a", encoding="utf-8") as train_log:
        for number in range(first, len(pairs.steps)):
            row, alarms = trainer.step(number)
            if accelerator.is_main_process:
                named = {"alarms": [f"{alarm.name}: {alarm.message}" for alarm in alarms]} if alarms else {}
                train_log.write(json.dumps(row | named) + "\n")
                train_log.flush()
            for alarm in alarms:
                log.warning("step %d: %s: %s", number + 1, alarm.name, alarm.message)
            if stopping := [alarm.message for alarm in alarms if alarm.action == "stop"]:
                raise RuntimeError(
                    f"step {number + 1}: {stopping[0]}: the round is stopped. Look at {train_log.name}, "
                    "and lower dpo.learning_rate or raise dpo.beta"
                )
            if (number + 1) % spec.dpo.checkpoint_every == 0 and number + 1 < len(pairs.steps):
                os.fsync(train_log.fileno())
                save_checkpoint(accelerator, spec.output, steps=number + 1)
    if pairs.held_out is not None:
        metrics = trainer.evaluate()
        if accelerator.is_main_process:
            write_json(spec.output / "eval_metrics.json", metrics)
    save_policy(accelerator, trainer.policy, trainer.optimizer, spec)
    accelerator.end_training()  # takes the process group down while Python still runs


def _accelerator(spec: TrainSpec) -> Accelerator:
    dpo = spec.dpo
    on_cpu = not torch.cuda.is_available()  # otherwise accelerate runs each of several CPU processes alone
    # The autocast is ours: accelerate's would turn all logits into float32.
    accelerator = Accelerator(cpu=on_cpu)
    if accelerator.num_processes != dpo.processes:
        raise RuntimeError(
            f"{dpo.processes} training processes are configured, but this one sees {accelerator.num_processes}; "
            "the work would not be distributed. Check dpo.processes against dpo.accelerate_config"
        )
    return accelerator


def _trainer(spec: TrainSpec, accelerator: Accelerator, pairs: RoundPairs) -> Trainer:
    """The policy and its optimizer, ready for the first step, with the reference log-probabilities."""
    dpo = spec.dpo
    compute: Compute | None = None
    reference: Tensor | None = None
    if not dpo.uses_reference:
        reference = torch.zeros(len(pairs), 3, device=accelerator.device)
    elif spec.reference is not None and str(spec.reference) != adapter_base(spec.policy):
        compute, reference = _foreign_reference(spec, spec.reference, accelerator, pairs)
        accelerator.free_memory()
    model = _policy_to_train(spec, accelerator)
    scorer = Scorer(model).train()
    optimizer = _optimizer(dpo, parameter_groups(scorer, dpo.weight_decay))
    policy, optimizer = accelerator.prepare(scorer, optimizer)
    if spec.optimizer is not None:
        carry_moments(accelerator, policy, optimizer, spec.optimizer)
    compute = compute or _compute(spec, accelerator, scorer, pairs)
    _beating(scorer, spec).set_path(compute.path)
    accelerator.register_save_state_pre_hook(drop_frozen)
    if reference is None:
        with model.disable_adapter() if spec.reference is not None else nullcontext():
            reference = reference_logps(spec, compute, policy, pairs)
    return Trainer(compute, pairs, policy, optimizer, reference)


def _foreign_reference(
    spec: TrainSpec, path: Path, accelerator: Accelerator, pairs: RoundPairs
) -> tuple[Compute, Tensor]:
    """Log-probabilities under a reference that is another checkpoint, which is in memory only while this runs."""
    model = load_policy(path, trust_remote_code=spec.trust_remote_code, **_placed(accelerator))
    if accelerator.device.type == "cuda":
        use_kernels(model, spec.dpo.kernels)
    scorer = Scorer(model).eval()
    scorer = fsdp2_prepare_model(accelerator, scorer) if accelerator.is_fsdp2 else scorer.to(accelerator.device)
    compute = _compute(spec, accelerator, scorer, pairs)
    _beating(scorer, spec).set_path(compute.path)
    return compute, reference_logps(spec, compute, scorer, pairs)


def _beating(scorer: Scorer, spec: TrainSpec) -> Scorer:
    """With a sign of work for `launch_training` at each micro-batch, once a second."""
    last = 0.0

    def beat(*_: Any) -> None:
        nonlocal last
        if time.monotonic() > last + 1:
            last = time.monotonic()
            (spec.output / TRAIN_LOG).touch()

    scorer.register_forward_pre_hook(beat)
    return scorer


def _placed(accelerator: Accelerator, *, quantize: str = "none") -> dict[str, Any]:
    """Where this process loads weights: onto its device, or, if FSDP2 sends them, nowhere but in the first process."""
    if not accelerator.is_fsdp2:
        return {"device": accelerator.device}
    sent = accelerator.state.fsdp_plugin.cpu_ram_efficient_loading and quantize == "none"
    return {"empty": sent and not accelerator.is_main_process}


def _policy_to_train(spec: TrainSpec, accelerator: Accelerator) -> Any:
    dpo, adapter = spec.dpo, spec.dpo.adapter
    quantize = adapter.quantize if adapter is not None else "none"
    model = load_policy(
        spec.policy,
        trust_remote_code=spec.trust_remote_code,
        dtype=torch.bfloat16 if adapter is not None and dpo.precision == "bf16" else getattr(torch, dpo.weights_dtype),
        quantize=quantize,
        trainable=True,
        lora_dropout=adapter.lora_dropout if adapter is not None else 0.0,
        **_placed(accelerator, quantize=quantize),
    )
    if accelerator.device.type == "cuda":
        use_kernels(model, dpo.kernels)
    if adapter_base(spec.policy) is not None:
        _check_adapter(adapter, spec.policy)
    elif adapter is not None:
        model = with_new_adapter(model, **adapter.model_dump())
    if adapter is not None:
        _check_whole_modules(adapter.modules_to_save or [], model)
    if dpo.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapter is not None:
            model.enable_input_require_grads()
    return model


def _compute(spec: TrainSpec, accelerator: Accelerator, scorer: Scorer, pairs: RoundPairs) -> Compute:
    """How models compute in this round, with the fastest path that gives the right numbers on the first pairs."""
    allowed: Sequence[LogpPath] = ("shared", "rows") if spec.dpo.shared_prompts else ("rows",)
    trees, _ = pairs.trees(pairs.steps[0][:2])
    path = select_logp_path(scorer, trees, allowed=allowed)
    if accelerator.is_main_process:
        log.info("computing log-probabilities with the %r path", path)
    return Compute(accelerator, spec.dpo, path)


def _optimizer(dpo: DPOConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if dpo.optimizer == "adamw_8bit":
        from torchao.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(
            groups, lr=dpo.learning_rate, betas=dpo.adam_betas, bf16_stochastic_round=True
        )
        return made
    return torch.optim.AdamW(groups, lr=dpo.learning_rate, betas=dpo.adam_betas, fused=True)


def _check_adapter(configured: AdapterConfig | None, path: Path) -> None:
    """Raises a RuntimeError unless the adapter in `path` has the configured rank and alpha."""
    trained = read_json(path / ADAPTER_CONFIG)
    if configured is None or (configured.r, configured.alpha) != (trained["r"], trained["lora_alpha"]):
        wanted = f"of r {configured.r} and alpha {configured.alpha}" if configured else "null"
        raise RuntimeError(
            f"the policy {path} is an adapter of r {trained['r']} and alpha {trained['lora_alpha']}, but dpo.adapter is "
            f"{wanted}; set dpo.adapter to the values that it was trained with"
        )


def _check_whole_modules(configured: list[str], model: Any) -> None:
    """Raises a RuntimeError unless the modules that are trained whole are the configured ones."""
    trained = whole_modules(model)
    unknown = [name for name in configured if not any(f".{module}".endswith(f".{name}") for module in trained)]
    if unknown or (trained and not configured):
        raise RuntimeError(
            f"dpo.adapter.modules_to_save is {configured}, but the policy's adapter has "
            f"{', '.join(sorted(trained)) or 'none'} besides its matrices; set it to names of modules of the model, and "
            "in a run that goes on to the names that the adapter was trained with"
        )


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = (([p for p in trained if p.ndim >= 2], weight_decay), ([p for p in trained if p.ndim < 2], 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in parts if params]


if __name__ == "__main__":
    main()

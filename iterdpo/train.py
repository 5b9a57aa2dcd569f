"""One DPO round: the process that `accelerate launch` starts, with a specification file as its only argument.

    reference log-probabilities, once, before the first step      -> <round>/reference/
    AdamW on the DPO loss, a checkpoint every few steps           -> <round>/policy.partial/checkpoint-*
    the policy as a Hugging Face checkpoint, and train_log.jsonl  -> <round>/policy.partial/

One model is in memory at a time. Where the reference is the policy that the round starts from, its log-probabilities
come from the policy itself, over the very batches that training will use: at step 0 the implicit rewards are exactly 0.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from iterdpo.collate import Batch, TokenPair, collate_pairs, micro_batches, plan_steps
from iterdpo.launch import TRAIN_LOG, TrainSpec
from iterdpo.logps import completion_logps, load_policy
from iterdpo.losses import dpo_loss
from iterdpo.pairs import read_token_pairs
from iterdpo.rundir import Step, read_json, write_json, write_text

# Beside the weights; the tokenizer as it is, byte for byte.
CARRIED_FILES = (
    "tokenizer*",
    "special_tokens*",
    "added_tokens*",
    "vocab*",
    "merges*",
    "*.model",
    "chat_template*",
    "*.py",
)


def main() -> None:
    train(TrainSpec.read(Path(sys.argv[1])))


def train(spec: TrainSpec) -> None:
    """Run the round, or what is left of it. See the module's docstring for what is written.

    Raises:
        RuntimeError: fewer processes came up than were asked for, or a loss or gradient is not finite.
    """
    dpo = spec.dpo
    on_cpu = not torch.cuda.is_available()  # unless told so, accelerate runs each of several CPU processes alone
    accelerator = Accelerator(cpu=on_cpu)  # the autocast is ours: accelerate's would turn all logits into float32
    if accelerator.num_processes != dpo["processes"]:
        raise RuntimeError(
            f"{dpo['processes']} training processes were asked for and this one sees {accelerator.num_processes}; "
            "nothing would be distributed. Check dpo.processes against dpo.accelerate_config"
        )
    set_seed(spec.seed)
    pairs = read_token_pairs(Path(spec.pairs))
    eval_pairs = read_token_pairs(Path(spec.eval_pairs)) if spec.eval_pairs else []
    trainer = Trainer(spec, accelerator, pairs, eval_pairs)
    trainer.run()
    accelerator.end_training()  # takes the process group down while Python still runs


class Trainer:
    """The state of a round in training: model, optimizer, reference log-probabilities, step."""

    def __init__(
        self, spec: TrainSpec, accelerator: Accelerator, pairs: list[TokenPair], eval_pairs: list[TokenPair]
    ) -> None:
        self.spec, self.dpo, self.accelerator = spec, spec.dpo, accelerator
        self.pairs = pairs + eval_pairs
        self.lengths = [pair.tokens for pair in self.pairs]
        self.training, self.held_out = range(len(pairs)), range(len(pairs), len(self.pairs))
        self.output = Path(spec.output)
        self.steps = plan_steps(
            len(pairs), epochs=self.dpo["epochs"], pairs_per_step=self.dpo["pairs_per_step"], seed=spec.seed
        )

    def run(self) -> None:
        if self.spec.reference is not None:
            reference = self._load(self.spec.reference)
            self.reference_logps = self._reference_logps(self.accelerator.prepare(reference))
            self.accelerator.free_memory(reference)
            del reference
        policy = self._load(self.spec.policy)
        if self.dpo["gradient_checkpointing"]:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        optimizer = torch.optim.AdamW(
            parameter_groups(policy, self.dpo["weight_decay"]),
            lr=self.dpo["learning_rate"],
            betas=tuple(self.dpo["adam_betas"]),
            fused=True,
        )
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        if self.spec.reference is None:
            self.reference_logps = self._reference_logps(self.policy)
        first = self._resume()
        with open(self.output / TRAIN_LOG, "a", encoding="utf-8") as log:
            for step in range(first, len(self.steps)):
                metrics = self._step(step)
                if self.accelerator.is_main_process:
                    log.write(json.dumps(metrics) + "\n")
                    log.flush()
                if (step + 1) % self.dpo["checkpoint_every"] == 0 and step + 1 < len(self.steps):
                    os.fsync(log.fileno())
                    self._checkpoint(step + 1)
        if self.held_out:
            metrics = self._evaluate()
            if self.accelerator.is_main_process:
                write_json(self.output / "eval_metrics.json", metrics)
        self._save()

    def _load(self, path: str) -> Any:
        return load_policy(path, trust_remote_code=self.spec.trust_remote_code)

    def _batches(self, indices: list[int]) -> list[list[int]]:
        return micro_batches(
            indices,
            self.lengths,
            size=self.dpo["pairs_per_micro_batch"],
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def _autocast(self) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.dpo["precision"] == "bf16")

    def _collate(self, indices: list[int]) -> Batch:
        return collate_pairs([self.pairs[i] for i in indices]).to(self.accelerator.device)

    def _reference_logps(self, model: Any) -> Tensor:
        """[N, 2]: chosen and rejected, of all pairs. Stored as a step of its own: computed once, whatever happens."""
        from safetensors.torch import load_file, save_file

        attic = Path(self.spec.attic) if self.spec.attic else None
        step = Step(Path(self.spec.reference_output), self.spec.reference_inputs, attic=attic)
        if step.manifest() is None:
            logps = torch.zeros(len(self.pairs), 2, device=self.accelerator.device)
            once = [*self.steps[: len(self.steps) // self.dpo["epochs"]], *self._eval_steps()]
            for batch in (batch for indices in once for batch in self._batches(indices) if batch):
                with torch.no_grad(), self._autocast():
                    row_logps = completion_logps(model, self._collate(batch))
                logps[batch] = row_logps.view(2, -1).T
            logps = self.accelerator.reduce(logps, "sum").cpu()  # each pair was computed by one process
            if self.accelerator.is_main_process:
                save_file({"logps": logps}, step.begin() / "logps.safetensors")
                step.finish(counts={"pairs": len(self.pairs)})
            self.accelerator.wait_for_everyone()
        return load_file(step.path / "logps.safetensors")["logps"].to(self.accelerator.device)

    def _eval_steps(self) -> list[list[int]]:
        size = self.dpo["pairs_per_step"]
        return [list(self.held_out[i : i + size]) for i in range(0, len(self.held_out), size)]

    def _forward(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        """Losses [B] of a batch of pairs, and its statistics [B, 5] in the order of `STATISTICS`."""
        with self._autocast():
            chosen, rejected = completion_logps(self.policy, self._collate(batch)).view(2, -1)
        reference = self.reference_logps[batch]
        loss = dpo_loss(
            chosen,
            rejected,
            reference[:, 0],
            reference[:, 1],
            beta=self.dpo["beta"],
            label_smoothing=self.dpo["label_smoothing"],
        )
        statistics = [loss.losses, loss.chosen_rewards, loss.rejected_rewards, chosen, rejected]
        return loss.losses, torch.stack(statistics, dim=1).detach()

    def _step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        indices = self.steps[step]
        world = self.accelerator.num_processes
        batches = self._batches(indices)
        statistics: list[Tensor] = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with gradient_sync(self.accelerator, self.policy, now=last):
                losses, rows = self._forward(batch or indices[:1])
                # Processes average their gradients, and a step is the mean over all of its pairs. A process with
                # nothing to add takes part with weight zero.
                weight = world / len(indices) if batch else 0.0
                self.accelerator.backward(losses.sum() * weight)
            statistics.append(rows if batch else rows[:0])
        for group in self.optimizer.param_groups:
            group["lr"] = self.dpo["learning_rate"] * learning_rate_factor(
                step, len(self.steps), warmup_ratio=self.dpo["warmup_ratio"], schedule=self.dpo["lr_scheduler"]
            )
        grad_norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.dpo["max_grad_norm"])
        metrics = summarize(self._gather(torch.cat(statistics), len(indices)))
        norm = float(grad_norm)
        if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
            raise RuntimeError(
                f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}: not finite, and not applied. "
                "Lower dpo.learning_rate, or set dpo.precision to fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "epoch": round((step + 1) * self.dpo["epochs"] / len(self.steps), 4),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            **metrics,
            "pairs_per_second": len(indices) / seconds,
            "tokens_per_second": sum(self.lengths[i] for i in indices) / seconds,
        }

    def _gather(self, rows: Tensor, expected: int) -> Tensor:
        """Statistics of all processes' pairs; shares may differ by one."""
        if self.accelerator.num_processes == 1:
            return rows
        padded = self.accelerator.pad_across_processes(rows, dim=0, pad_index=float("nan"))
        gathered = self.accelerator.gather(padded)
        gathered = gathered[~gathered.isnan().all(dim=1)]
        assert len(gathered) == expected or gathered.isnan().any()
        return gathered

    def _evaluate(self) -> dict[str, float]:
        rows = []
        for indices in self._eval_steps():
            for batch in self._batches(indices):
                with torch.no_grad():
                    _, statistics = self._forward(batch or indices[:1])
                rows.append(statistics if batch else statistics[:0])
        metrics = summarize(self._gather(torch.cat(rows), len(self.held_out)))
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _checkpoint(self, step: int) -> None:
        """The state after `step` steps. The one before it goes only when this one is whole."""
        path = self.output / f"checkpoint-{step:06d}"
        fresh = path.with_name(path.name + ".new")
        self.accelerator.save_state(str(fresh))
        if self.accelerator.is_main_process:
            os.replace(fresh, path)
            for old in self.output.glob("checkpoint-*"):
                if old != path:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the last whole checkpoint. Returns the number of steps that are done."""
        found = sorted(p for p in self.output.glob("checkpoint-*") if not p.name.endswith(".new"))
        done = int(found[-1].name.removeprefix("checkpoint-")) if found else 0
        if found:
            self.accelerator.load_state(str(found[-1]))
        if self.accelerator.is_main_process:
            log = self.output / TRAIN_LOG
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            write_text(log, "".join(lines[:done]))
        self.accelerator.wait_for_everyone()
        return done

    def _save(self) -> None:
        state = self.accelerator.get_state_dict(self.policy)
        if self.accelerator.is_main_process:
            dtype = getattr(torch, self.dpo["save_dtype"])
            model = self.accelerator.unwrap_model(self.policy)
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
            model.save_pretrained(self.output, state_dict=state)
            config = read_json(self.output / "config.json")  # names the precision in memory
            write_json(self.output / "config.json", {**config, "dtype": self.dpo["save_dtype"]})
            for pattern in CARRIED_FILES:
                for file in Path(self.spec.policy).glob(pattern):
                    shutil.copy(file, self.output / file.name)
        self.accelerator.wait_for_everyone()


STATISTICS = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def summarize(rows: Tensor) -> dict[str, float]:
    """Means over pairs, under TRL's metric names, from rows [B, 5] in the order of `STATISTICS`."""
    means = dict(zip(STATISTICS, rows.double().mean(dim=0).tolist(), strict=True))
    margins = rows[:, 1].double() - rows[:, 2].double()
    return {
        **means,
        "rewards/accuracies": (margins > 0).double().mean().item(),
        "rewards/margins": margins.mean().item(),
    }


def learning_rate_factor(step: int, steps: int, *, warmup_ratio: float, schedule: str) -> float:
    """The share of the peak learning rate at `step` of `steps`, counted from 0. No step is wasted at zero.

    Linear warm-up over ceil(warmup_ratio * steps) steps that ends at the peak, then a decay that would reach 0 one
    step behind the last.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}")


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases and norms."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def gradient_sync(accelerator: Accelerator, model: Any, *, now: bool) -> Any:
    """Gradients meet across processes at a step's last micro-batch only."""
    return nullcontext() if now else accelerator.no_sync(model)


if __name__ == "__main__":
    main()

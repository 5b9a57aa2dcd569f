"""One optimizer step: pairs -> trees -> micro-batches -> log-probabilities -> losses -> gradient -> AdamW.

`Trainer.step` is one step, `Trainer.losses` one micro-batch of it. `Compute` says on which processes, in which precision
and by which path models compute. `summarize` turns the statistics of pairs into metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from iterdpo.config import DPOConfig
from iterdpo.training.collate import PairIndex, RoundPairs, Tree, micro_batches
from iterdpo.training.flops import forward_flops, matmul_peak, synchronize
from iterdpo.training.logps import CompletionLogps, LogpPath
from iterdpo.training.losses import PairLogps, kl_estimate, nll_term, preference_loss, wpo_weights
from iterdpo.training.sentinels import Alarm, Sentinels

STATISTICS = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logps/chosen_change")


class Trainer:
    """A policy, its optimizer and the reference log-probabilities [N, 3] of the round's pairs."""

    def __init__(
        self, compute: Compute, pairs: RoundPairs, policy: Any, optimizer: Any, reference_logps: Tensor
    ) -> None:
        self.compute, self.accelerator, self.dpo = compute, compute.accelerator, compute.dpo
        self.pairs, self.policy, self.optimizer, self.reference_logps = pairs, policy, optimizer, reference_logps
        self.sentinels = Sentinels(self.dpo.sentinels)

    def step(self, number: int) -> tuple[dict[str, Any], list[Alarm]]:
        """Train on the pairs of one step, counted from 0. Returns its line of the training log, and its alarms.

        Raises:
            RuntimeError: a loss or gradient is not finite, and the configuration does not skip such a step.
        """
        started = time.perf_counter()
        dpo, pairs, steps = self.dpo, self.pairs.steps[number], len(self.pairs.steps)
        trees, index = self.pairs.trees(pairs)
        kl = self.kl(pairs)
        factor = learning_rate_factor(number, steps, warmup_ratio=dpo.warmup_ratio, schedule=dpo.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = dpo.learning_rate * factor
        batches = self.compute.micro_batches(trees)
        statistics, flops = [], 0.0
        for position, batch in enumerate(batches, 1):
            with self.compute.gradient_sync(self.policy, now=position == len(batches)):
                # Processes average their gradients, and a step is the mean over all of its pairs. A process with
                # nothing to add takes part with weight zero.
                weight = self.accelerator.num_processes / len(pairs) if batch else 0.0
                losses, rows, batch_flops = self.losses(pairs, trees, index, batch or [0], kl)
                self.accelerator.backward(losses.sum() * weight)
            statistics.append(rows if batch else rows[:0])
            flops += batch_flops if batch else 0.0
        grad_norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), dpo.max_grad_norm))
        metrics = summarize(self.compute.gather(torch.cat(statistics))) | ({} if kl is None else {"kl": float(kl)})
        finite = math.isfinite(grad_norm) and math.isfinite(metrics["loss"])
        figures = f"step {number + 1}: loss {metrics['loss']}, gradient norm {grad_norm}"
        if finite:
            self.optimizer.step()
        elif dpo.sentinels.non_finite == "stop":
            remedy = "Lower dpo.learning_rate, or set dpo.precision to fp32"
            raise RuntimeError(f"{figures}: not finite, and not applied. {remedy}")
        self.optimizer.zero_grad()
        synchronize(self.accelerator.device)
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {
            "step": number + 1,
            "epoch": round((number + 1) * dpo.epochs / steps, 4),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **metrics,
            "pairs_per_second": len(pairs) / seconds,
            "tokens_per_second": sum(tree.tokens for tree in trees) / seconds,
            "mfu": flops / seconds / self.peak,
        }
        if finite:
            return row, self.sentinels.observe(row)
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        return row, [Alarm("non_finite", "skip", figures)]

    def losses(
        self, pairs: np.ndarray, trees: Sequence[Tree], index: PairIndex, batch: Sequence[int], kl: Tensor | None
    ) -> tuple[Tensor, Tensor, float]:
        """Losses [b] of the pairs of some trees, their statistics [b, S] in the order of `STATISTICS`, and the FLOPs."""
        dpo, scorer = self.dpo, self.accelerator.unwrap_model(self.policy)
        collated = scorer.collate([trees[number] for number in batch])
        with self.compute.saved_tensors(), self.compute.autocast():
            branches: CompletionLogps = self.policy(collated, aligned=dpo.wpo)
        lengths = torch.bincount(collated.branch, minlength=collated.branches)
        slots = index.in_batch(trees, batch)
        chosen, rejected = slots.gather(branches.logps, absent=math.nan)
        chosen_tokens, rejected_tokens = slots.gather(lengths, absent=0)
        reference = self.reference_logps[torch.from_numpy(pairs)[slots.local_pairs].to(chosen.device)]
        logps = PairLogps(chosen, rejected, reference[:, 0], reference[:, 1], chosen_tokens, rejected_tokens)
        losses, chosen_rewards, rejected_rewards = preference_loss(dpo.loss, logps, beta=dpo.beta, kl=kl)
        if branches.alignment is not None:
            losses = losses * wpo_weights(*slots.gather(branches.alignment / lengths, absent=math.nan))
        if dpo.nll_coefficient:
            nll = nll_term(chosen, chosen_tokens)
            losses = losses + dpo.nll_coefficient * torch.where(chosen_tokens > 0, nll, torch.zeros_like(nll))
        none = torch.full_like(chosen, math.nan)
        if dpo.loss.type == "sft":
            chosen_rewards = rejected_rewards = none
        change = chosen - reference[:, 0] if dpo.uses_reference else none
        columns = (losses, chosen_rewards, rejected_rewards, chosen, rejected, change)
        statistics = torch.stack([column.detach().float() for column in columns], dim=1)
        passes = 2 if dpo.adapter is not None else 3  # the weights' own gradient is a third of the work
        return losses, statistics, passes * forward_flops(scorer.causal, collated)

    def kl(self, pairs: np.ndarray) -> Tensor | None:
        """KTO's estimate over a step's pairs, from mismatched prompts and completions; None for another loss."""
        if self.pairs.partners is None:
            return None
        logps = torch.zeros(len(pairs), device=self.accelerator.device)
        for batch, branches in self.compute.branch_logps(self.policy, self.pairs.mismatched_trees(pairs)):
            logps[batch] = branches
        logps = self.accelerator.reduce(logps, "sum")
        return kl_estimate(logps, self.reference_logps[torch.from_numpy(pairs).to(logps.device), 2])

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs: `{"eval_loss": 0.62, ...}`."""
        rows = []
        for pairs in self.pairs.held_out_steps:
            trees, index = self.pairs.trees(pairs)
            kl = self.kl(pairs)
            for batch in self.compute.micro_batches(trees):
                with torch.no_grad():
                    _, statistics, _ = self.losses(pairs, trees, index, batch or [0], kl)
                rows.append(statistics if batch else statistics[:0])
        metrics = summarize(self.compute.gather(torch.cat(rows)))
        return {f"eval_{name}": value for name, value in metrics.items()}

    @cached_property
    def peak(self) -> float:
        return matmul_peak(self.accelerator.device, torch.bfloat16 if self.dpo.precision == "bf16" else torch.float32)


@dataclass(frozen=True)
class Compute:
    """On which processes, in which precision and by which path a round's models compute."""

    accelerator: Accelerator
    dpo: DPOConfig
    path: LogpPath

    def autocast(self) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.dpo.precision == "bf16")

    def saved_tensors(self) -> AbstractContextManager[Any]:
        offload = self.dpo.activation_offload and self.accelerator.device.type == "cuda"
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()

    def gradient_sync(self, policy: Any, *, now: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes at a step's last micro-batch only."""
        self.accelerator.gradient_state._set_sync_gradients(now)  # DeepSpeed takes its step by this
        return nullcontext() if now else self.accelerator.no_sync(policy)

    def micro_batches(self, trees: Sequence[Tree]) -> list[list[int]]:
        """This process's share of the trees, by their numbers, in batches of similar size."""
        shared = self.path == "shared"
        sizes = [t.tokens if shared else t.tokens + (len(t.branches) - 1) * len(t.prompt) for t in trees]
        accelerator, budget = self.accelerator, self.dpo.tokens_per_micro_batch
        return micro_batches(sizes, budget=budget, rank=accelerator.process_index, world=accelerator.num_processes)

    def branch_logps(self, model: Any, trees: Sequence[Tree]) -> Iterator[tuple[list[int], Tensor]]:
        """This process's batches of trees, and the log-probabilities [branches] of each, without gradient."""
        for batch in self.micro_batches(trees):
            collated = self.accelerator.unwrap_model(model).collate([trees[number] for number in batch or [0]])
            with torch.no_grad(), self.autocast():
                branches = model(collated).logps  # processes meet at each batch
            if batch:
                yield batch, branches.float()

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, which may have different numbers of them."""
        if self.accelerator.num_processes == 1:
            return rows
        marked = torch.cat((torch.ones_like(rows[:, :1]), rows), dim=1)
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(marked, dim=0))
        return gathered[gathered[:, 0] == 1, 1:]


def summarize(rows: Tensor) -> dict[str, float]:
    """Means over pairs, under TRL's metric names, from rows [B, S] in the order of `STATISTICS`.

    NaN marks the side that an unpaired example does not have; a mean is over the pairs that have it. A metric that no
    pair has is left out.
    """
    values = rows.double()
    metrics = {"loss": values[:, 0].mean().item()}
    for number, name in enumerate(STATISTICS[1:], 1):
        column = values[:, number]
        if not column.isnan().all():
            metrics[name] = column[~column.isnan()].mean().item()
    if "logps/chosen_change" in metrics:
        metrics["logps/chosen_drop"] = 0.0 - metrics.pop("logps/chosen_change")
    margins = values[:, 1] - values[:, 2]
    margins = margins[~margins.isnan()]
    if len(margins):
        metrics["rewards/accuracies"] = (margins > 0).double().mean().item()
        metrics["rewards/margins"] = margins.mean().item()
    return metrics


def learning_rate_factor(step: int, steps: int, *, warmup_ratio: float, schedule: str) -> float:
    """The share of the peak learning rate at `step` of `steps`, counted from 0. No step is wasted at zero.

    Linear warm-up over ceil(warmup_ratio * steps) steps that ends at the peak, then a decay that would reach 0 one
    step after the last.
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

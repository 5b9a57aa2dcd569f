"""One optimizer step: pairs -> trees -> micro-batches -> log-probabilities -> losses -> gradient -> AdamW.

`Trainer.step` is one step, `Trainer.losses` one micro-batch of it. `Compute` says on which processes, in which precision
and by which path models compute. `summarize` turns the statistics of pairs into metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from iterdpo.config import DPOConfig
from iterdpo.training.attention import moved
from iterdpo.training.collate import Batch, MicroBatch, PairSlots, RoundPairs, Tree, collate, micro_batches, tree_sizes
from iterdpo.training.flops import forward_flops, matmul_peak
from iterdpo.training.logps import CompletionLogps, LogpPath, summed
from iterdpo.training.losses import (
    PairLogps,
    RewardShift,
    aot_matches,
    exploration_term,
    kl_estimate,
    nll_term,
    preference_loss,
    wpo_weights,
)
from iterdpo.training.models import offloaded
from iterdpo.training.precision import bfloat16, bfloat16_copies
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
        self.shift = RewardShift()
        self.inputs = compute.ahead(pairs, pairs.steps)
        if self.dpo.loss.type == "bco":
            self.accelerator.register_for_checkpointing(self.shift)

    def step(self, number: int) -> tuple[dict[str, Any], list[Alarm]]:
        """Train on the pairs of one step, counted from 0. Returns its line of the training log, and its alarms.

        Raises:
            RuntimeError: a loss or gradient is not finite, and the configuration does not skip such a step.
        """
        started = time.perf_counter()
        dpo, pairs, steps = self.dpo, self.pairs.steps[number], len(self.pairs.steps)
        inputs = self.inputs(number)
        of_step = self.of_step(pairs)
        warmup = dpo.warmup_steps if dpo.warmup_steps is not None else math.ceil(dpo.warmup_ratio * steps)
        factor = learning_rate_factor(number, steps, warmup=warmup, schedule=dpo.lr_scheduler)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's
                group["lr"].fill_(dpo.learning_rate * factor)
            else:
                group["lr"] = dpo.learning_rate * factor
        statistics, flops = [], 0.0
        with self.compute.one_copy(self.policy):
            for position, batch in enumerate(inputs.batches, 1):
                with self.compute.gradient_sync(self.policy, now=position == inputs.size):
                    # Processes average their gradients, and a step is the mean over all of its pairs. A process with
                    # nothing to add takes part with weight zero.
                    weight = 0.0 if batch.empty else self.accelerator.num_processes / len(pairs)
                    losses, rows, batch_flops = self.losses(batch, of_step)
                    self.accelerator.backward(losses.sum() * weight)
                statistics.append(rows[:0] if batch.empty else rows)
                flops += 0.0 if batch.empty else batch_flops
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), dpo.max_grad_norm)
        metrics = summarize(self.compute.gather(torch.cat(statistics)).cpu())  # a GPU is waited for here alone
        grad_norm = float(norm)
        if of_step is not None and of_step.ndim == 0:
            metrics[{"kto": "kl", "bco": "reward_shift"}[dpo.loss.type]] = float(of_step)
        finite = math.isfinite(grad_norm) and math.isfinite(metrics["loss"])
        figures = f"step {number + 1}: loss {metrics['loss']}, gradient norm {grad_norm}"
        if finite:
            self.optimizer.step()
        elif dpo.sentinels.non_finite == "stop":
            remedy = "Lower dpo.learning_rate, or set dpo.precision to fp32"
            raise RuntimeError(f"{figures}: not finite, and not applied. {remedy}")
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {
            "step": number + 1,
            "epoch": round((number + 1) / self.pairs.steps_per_epoch, 4),
            "learning_rate": dpo.learning_rate * factor,
            "grad_norm": grad_norm,
            **metrics,
            "pairs_per_second": len(pairs) / seconds,
            "tokens_per_second": inputs.tokens / seconds,
            "mfu": flops / seconds / self.peak,
        }
        if finite:
            return row, self.sentinels.observe(row)
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        return row, [Alarm("non_finite", "skip", figures)]

    def losses(self, batch: MicroBatch, of_step: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Losses [b] of a batch's pairs, their statistics [b, S] in the order of `STATISTICS`, and the FLOPs."""
        dpo = self.dpo
        with self.compute.saved_tensors(self.policy), self.compute.precision(self.policy):
            branches: CompletionLogps = self.policy(batch.batch, aligned=dpo.wpo)
        lengths, slots = batch.lengths, batch.slots
        chosen, rejected = pair_logps(branches, lengths, slots, ld_alpha=dpo.ld_alpha, absent=math.nan).unbind(dim=1)
        chosen_tokens, rejected_tokens = slots.gather(lengths, absent=0)
        reference = self.reference_logps[batch.pairs]
        logps = PairLogps(chosen, rejected, reference[:, 0], reference[:, 1], chosen_tokens, rejected_tokens)
        if of_step is not None and of_step.ndim:
            of_step = of_step[slots.local_pairs]
        losses, chosen_rewards, rejected_rewards = preference_loss(dpo.loss, logps, beta=dpo.beta, of_step=of_step)
        if branches.alignment is not None:
            losses = losses * wpo_weights(*slots.gather(branches.alignment / lengths, absent=math.nan))
        if dpo.nll_coefficient:
            nll = nll_term(slots.gather(branches.logps, absent=math.nan)[0], chosen_tokens)
            losses = losses + dpo.nll_coefficient * torch.where(chosen_tokens > 0, nll, torch.zeros_like(nll))
        if dpo.xpo_alpha:
            whole = slots.gather(branches.logps, absent=math.nan)  # `ld_alpha` weights rewards alone
            losses = losses + dpo.xpo_alpha * exploration_term(torch.stack(whole, dim=1), batch.others)
        none = torch.full_like(chosen, math.nan)
        if dpo.loss.type == "sft":
            chosen_rewards = rejected_rewards = none
        change = chosen - reference[:, 0] if dpo.uses_reference else none
        columns = (losses, chosen_rewards, rejected_rewards, chosen, rejected, change)
        statistics = torch.stack([column.detach().float() for column in columns], dim=1)
        passes = 2 if dpo.adapter is not None else 3  # the weights' own gradient is a third of the work
        return losses, statistics, passes * self.forward_flops(batch.batch)

    def of_step(self, pairs: np.ndarray, *, training: bool = True) -> Tensor | None:
        """What `preference_loss` needs of all pairs of a step, from one more forward pass; None if it needs nothing.

        In `training`, the rewards enter BCO's shift.
        """
        match self.dpo.loss.type:
            case "kto":
                return self.kl(pairs)
            case "bco":
                if training:
                    logps = self.step_logps(pairs)
                    chosen, rejected = logps.chosen - logps.reference_chosen, logps.rejected - logps.reference_rejected
                    self.shift.update(self.dpo.beta * torch.stack((chosen, rejected), dim=1))
                return self.shift.value
            case "aot" | "aot_unpaired" as name:
                return aot_matches(self.step_logps(pairs), paired=name == "aot")
        return None

    def step_logps(self, pairs: np.ndarray) -> PairLogps:
        """Of a step's pairs, without gradient, on every process. NaN for a completion that a pair does not have."""
        local = self.compute.pair_logps(self.policy, self.compute.inputs(self.pairs, pairs), absent=math.nan)
        chosen, rejected = self.accelerator.reduce(local, "sum").unbind(dim=1)
        reference = self.reference_logps[torch.from_numpy(pairs).to(chosen.device)]
        return PairLogps(chosen, rejected, reference[:, 0], reference[:, 1], *torch.zeros(2, len(pairs)))

    def kl(self, pairs: np.ndarray) -> Tensor:
        """KTO's estimate over a step's pairs, from mismatched prompts and completions."""
        logps = torch.zeros(len(pairs), device=self.accelerator.device)
        for batch, branches in self.compute.branch_logps(self.policy, self.pairs.mismatched_trees(pairs)):
            logps[batch] = branches.logps
        logps = self.accelerator.reduce(logps, "sum")
        return kl_estimate(logps, self.reference_logps[torch.from_numpy(pairs).to(logps.device), 2])

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs: `{"eval_loss": 0.62, ...}`."""
        rows = []
        for pairs in self.pairs.held_out_steps:
            of_step = self.of_step(pairs, training=False)
            for batch in self.compute.inputs(self.pairs, pairs).batches:
                with torch.no_grad(), without_dropout(self.policy):
                    _, statistics, _ = self.losses(batch, of_step)
                rows.append(statistics[:0] if batch.empty else statistics)
        metrics = summarize(self.compute.gather(torch.cat(rows)))
        return {f"eval_{name}": value for name, value in metrics.items()}

    @cached_property
    def forward_flops(self) -> Callable[[Batch], float]:
        return forward_flops(self.accelerator.unwrap_model(self.policy).causal)

    @cached_property
    def peak(self) -> float:
        return matmul_peak(self.accelerator.device, torch.bfloat16 if self.dpo.precision == "bf16" else torch.float32)


@dataclass(frozen=True)
class Compute:
    """On which processes, in which precision and by which path a round's models compute."""

    accelerator: Accelerator
    dpo: DPOConfig
    path: LogpPath

    @property
    def copies(self) -> bool:
        """Whether a model computes over bfloat16 copies of its weights. FSDP and DeepSpeed keep copies of their own."""
        whole = self.accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
        return whole and self.accelerator.device.type == "cuda" and self.dpo.precision == "bf16"

    def precision(self, model: Any) -> AbstractContextManager[Any]:
        """In which `model` computes as configured."""
        return bfloat16(model, copies=self.copies) if self.dpo.precision == "bf16" else nullcontext()

    def one_copy(self, model: Any) -> AbstractContextManager[Any]:
        """In which the weights do not change: `precision` makes no further copies of them."""
        return bfloat16_copies(model) if self.copies else nullcontext()

    def saved_tensors(self, policy: Any) -> AbstractContextManager[Any]:
        offload = self.dpo.activation_offload and self.accelerator.device.type == "cuda"
        return offloaded(policy) if offload else nullcontext()

    def gradient_sync(self, policy: Any, *, now: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes at a step's last micro-batch only."""
        self.accelerator.gradient_state._set_sync_gradients(now)  # DeepSpeed takes its step by this
        return nullcontext() if now else self.accelerator.no_sync(policy)

    def micro_batches(self, trees: Sequence[Tree]) -> list[list[int]]:
        """This process's share of the trees, by their numbers, in batches of similar size."""
        sizes = tree_sizes(trees, shared=self.path == "shared")
        accelerator, budget = self.accelerator, self.dpo.tokens_per_micro_batch
        return micro_batches(sizes, budget=budget, rank=accelerator.process_index, world=accelerator.num_processes)

    def inputs(self, pairs: RoundPairs, numbers: np.ndarray) -> StepInputs:
        """This process's micro-batches of some pairs, each made when it is asked for."""
        trees, index = pairs.trees(numbers)
        shares = self.micro_batches(trees)
        others = pairs.others(numbers)

        def batches() -> Iterator[MicroBatch]:
            for share in shares:
                own = share or [0]
                slots = index.in_batch(trees, own)
                batch = MicroBatch(
                    collate([trees[number] for number in own], shared=self.path == "shared"),
                    torch.tensor([length for number in own for length in trees[number].lengths]),
                    slots,
                    torch.from_numpy(numbers)[slots.local_pairs],
                    others[slots.local_pairs],
                    empty=not share,
                )
                yield moved(batch, self.accelerator.device)

        return StepInputs(len(numbers), sum(tree.tokens for tree in trees), len(shares), batches())

    def ahead(self, pairs: RoundPairs, steps: Sequence[np.ndarray]) -> Callable[[int], StepInputs]:
        """The micro-batches of a step, by its number. On a GPU, a thread makes those of the next one meanwhile."""
        thread = collator(self.accelerator.device)
        made: dict[int, Future[StepInputs]] = {}

        def of(number: int) -> StepInputs:
            if thread is None:
                return self.inputs(pairs, steps[number])
            for step in range(number, min(number + 2, len(steps))):
                if step not in made:
                    made[step] = thread.submit(self.made_inputs, pairs, steps[step])
            return made.pop(number).result()

        return of

    def made_inputs(self, pairs: RoundPairs, numbers: np.ndarray) -> StepInputs:
        """As `inputs`, with all micro-batches made, to the last tensor."""
        inputs = self.inputs(pairs, numbers)
        batches = list(inputs.batches)
        for batch in batches:
            if batch.batch.layout is not None:
                batch.batch.layout.make_sequences()
        return inputs._replace(batches=iter(batches))

    def branch_logps(self, model: Any, trees: Sequence[Tree]) -> Iterator[tuple[list[int], CompletionLogps]]:
        """This process's batches of trees, and the log-probabilities of each."""
        for batch in self.micro_batches(trees):
            collated = self.accelerator.unwrap_model(model).collate([trees[number] for number in batch or [0]])
            branches = self.logps(model, collated)
            if batch:
                yield batch, branches

    def logps(self, model: Any, batch: Batch) -> CompletionLogps:
        """Without gradient and without dropout. Processes meet here."""
        with torch.no_grad(), self.precision(model), without_dropout(model):
            branches: CompletionLogps = model(batch)
        return branches

    def pair_logps(self, model: Any, inputs: StepInputs, *, absent: float) -> Tensor:
        """[n, 2], in nats, of the chosen and the rejected completions of a step's pairs, without gradient.

        0 for the pairs that another process computes.
        """
        found = torch.zeros(inputs.pairs, 2, device=self.accelerator.device)
        for batch in inputs.batches:
            branches = self.logps(model, batch.batch)
            if not batch.empty:
                found[batch.slots.local_pairs] = pair_logps(
                    branches, batch.lengths, batch.slots, ld_alpha=self.dpo.ld_alpha, absent=absent
                )
        return found

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, which may have different numbers of them."""
        if self.accelerator.num_processes == 1:
            return rows
        marked = torch.cat((torch.ones_like(rows[:, :1]), rows), dim=1)
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(marked, dim=0))
        return gathered[gathered[:, 0] == 1, 1:]


class StepInputs(NamedTuple):
    """What goes through the network in a step."""

    pairs: int
    tokens: int  # of all processes
    size: int  # of batches
    batches: Iterator[MicroBatch]


def collator(device: torch.device) -> ThreadPoolExecutor | None:
    """The thread that makes batches ahead for a GPU, which works on its own meanwhile. A CPU has no time to spare."""
    if device.type != "cuda":
        return None
    here = torch.cuda.current_device()  # of this thread; others begin with the first
    return ThreadPoolExecutor(1, "collate", initializer=torch.cuda.set_device, initargs=(here,))


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Only an adapter has dropout, and only in the forward pass of a training step."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def pair_logps(
    branches: CompletionLogps, lengths: Tensor, slots: PairSlots, *, ld_alpha: float | None, absent: float
) -> Tensor:
    """Log-probabilities [b, 2] of the chosen and the rejected completions of a batch's pairs, in nats.

        log pi(y|x) = sum_{t <= l} log pi(y_t) + alpha sum_{t > l} log pi(y_t),    l = min(|y_w|, |y_l|)

    With alpha = 1 or None this is the sum over all tokens. LD-DPO (arXiv:2409.06411) takes a smaller alpha, for the
    policy and for the reference: the tokens that make a completion longer than the other one count for less. `lengths`
    [branches] are numbers of tokens.
    """
    sums = torch.stack(slots.gather(branches.logps, absent=absent), dim=1)
    if ld_alpha is None:
        return sums
    ends = lengths.cumsum(dim=0)
    starts = torch.stack(slots.gather(ends - lengths, absent=0), dim=1)
    common = torch.stack(slots.gather(lengths, absent=0), dim=1).amin(dim=1, keepdim=True).expand_as(starts).flatten()
    owner = torch.arange(len(common), device=common.device).repeat_interleave(common)
    before = common.cumsum(dim=0) - common
    token = starts.flatten()[owner] + torch.arange(len(owner), device=owner.device) - before[owner]
    heads = summed(branches.token_logps[token], owner, len(common)).view_as(sums)
    return ld_alpha * sums + (1 - ld_alpha) * heads


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


def learning_rate_factor(step: int, steps: int, *, warmup: int, schedule: str) -> float:
    """The share of the peak learning rate at `step` of `steps`, counted from 0. No step is wasted at zero.

    Linear warm-up over `warmup` steps that ends at the peak, then a decay that would reach 0 one step after the last.
    """
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

"""One DPO round: the process that `accelerate launch` starts, with a specification file as its only argument.

    reference log-probabilities, once, before the first step      -> <round>/reference/
    AdamW on the loss, a checkpoint every few steps               -> <round>/policy.partial/checkpoint-*
    the policy as a Hugging Face checkpoint, and train_log.jsonl  -> <round>/policy.partial/

One model is in memory at a time. Where the reference is the policy that the round starts from, its log-probabilities
come from the policy itself, over the very batches that training will use: at step 0 the implicit rewards are exactly 0.
Where it is the base of the policy's adapter, they come from the policy with its adapter off.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor

from iterdpo.config import AdapterConfig
from iterdpo.data.pairs import TokenPairs
from iterdpo.run.rundir import Step, fsync, read_json, sync_tree, write_json, write_text
from iterdpo.seeds import derive_seed
from iterdpo.training.collate import TokenPair, Tree, grow_trees, micro_batches, plan_steps
from iterdpo.training.flops import forward_flops, matmul_peak
from iterdpo.training.launch import OPTIMIZER_STATE, TRAIN_LOG, TrainSpec
from iterdpo.training.logps import CompletionLogps, Scorer, Way, fastest_way
from iterdpo.training.losses import (
    PairLogps,
    kl_estimate,
    nll_term,
    preference_loss,
    wpo_weights,
)
from iterdpo.training.models import ADAPTER_CONFIG, adapter_base, load_policy, with_new_adapter
from iterdpo.training.sentinels import Sentinels

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
log = logging.getLogger(__name__)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    train(TrainSpec.read(Path(sys.argv[1])))


def train(spec: TrainSpec) -> None:
    """Run the round, or what is left of it. See the module's docstring for what is written.

    Raises:
        RuntimeError: fewer processes came up than were asked for, a loss or gradient is not finite, or a sentinel
            that is to stop the round saw what it looks for.
    """
    dpo = spec.dpo
    on_cpu = not torch.cuda.is_available()  # unless told so, accelerate runs each of several CPU processes alone
    # The autocast is ours: accelerate's would turn all logits into float32.
    accelerator = Accelerator(cpu=on_cpu, log_with=dpo.trackers or None, project_dir=spec.tracker_dir)
    if accelerator.num_processes != dpo.processes:
        raise RuntimeError(
            f"{dpo.processes} training processes were asked for and this one sees {accelerator.num_processes}; "
            "nothing would be distributed. Check dpo.processes against dpo.accelerate_config"
        )
    set_seed(spec.seed)
    if dpo.trackers:
        named: dict[str, dict[str, str]] = {
            "wandb": {"name": spec.name, "dir": str(spec.tracker_dir)},
            "mlflow": {"run_name": spec.name},
            "trackio": {"name": spec.name},
        }
        accelerator.init_trackers(dpo.tracker_project, flat(dpo.model_dump()), init_kwargs=named)
    Trainer(spec, accelerator).run()
    accelerator.end_training()  # takes the process group down while Python still runs


def _without_frozen(models: list[Any], states: list[dict[str, Tensor]], directory: str) -> None:
    """Leave out of a checkpoint what no step changes: the model under an adapter. FSDP and DeepSpeed give no states."""
    for model, state in zip(models, states, strict=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(name, None)


class Places(NamedTuple):
    """Where the completions of a step's pairs are: (tree, branch) of each, branch -1 where there is none."""

    chosen: list[tuple[int, int]]
    rejected: list[tuple[int, int]]


class Trainer:
    """The state of a round in training: model, optimizer, reference log-probabilities, step."""

    def __init__(self, spec: TrainSpec, accelerator: Accelerator) -> None:
        self.spec, self.dpo, self.accelerator = spec, spec.dpo, accelerator
        self.output = spec.output
        cache = spec.pairs_cache
        self.training = TokenPairs(spec.pairs, cache)
        self.held_out = TokenPairs(spec.eval_pairs, cache) if spec.eval_pairs else None
        self.steps = plan_steps(
            self.training.groups,
            epochs=self.dpo.epochs,
            pairs_per_step=self.dpo.pairs_per_step,
            seed=spec.seed,
        )
        self.with_reference = self.dpo.uses_reference
        self.partners = self._partners() if self.dpo.loss.type == "kto" else None
        self.sentinels = Sentinels(self.dpo.sentinels)
        self.reference_logps: Any = None  # [N, 3] once known
        self.way: Any = None
        self.peak: float | None = None
        self.stopping: list[str] = []

    def run(self) -> None:
        base = adapter_base(self.spec.policy)
        if not self.with_reference:
            self.reference_logps = torch.zeros(self._count(), 3, device=self.accelerator.device)
        elif self.spec.reference is not None and str(self.spec.reference) != base:
            reference = self._scorer(self._load(self.spec.reference)).to(self.accelerator.device).eval()
            self.reference_logps = self._reference_logps(reference)
            del reference
            self.accelerator.free_memory()
        model = self._load(self.spec.policy, trainable=True)
        if self.dpo.adapter is not None and base is None:
            model = with_new_adapter(model, **self.dpo.adapter.model_dump())
        elif base is not None:
            _same_adapter(read_json(self.spec.policy / ADAPTER_CONFIG), self.dpo.adapter, self.spec.policy)
        if self.dpo.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if self.dpo.adapter is not None:
                model.enable_input_require_grads()
        scorer = self._scorer(model)
        scorer.train()
        optimizer = torch.optim.AdamW(
            parameter_groups(scorer, self.dpo.weight_decay),
            lr=self.dpo.learning_rate,
            betas=self.dpo.adam_betas,
            fused=True,
        )
        if self.spec.optimizer is not None:
            carried = torch.load(self.spec.optimizer, weights_only=True)  # the moments; the settings are this round's
            optimizer.load_state_dict({**optimizer.state_dict(), "state": carried["state"]})
        self.policy, self.optimizer = self.accelerator.prepare(scorer, optimizer)
        self.accelerator.register_save_state_pre_hook(_without_frozen)
        if self.reference_logps is None:
            off = model.disable_adapter() if self.spec.reference is not None else nullcontext()
            with off:
                self.reference_logps = self._reference_logps(self.policy)
        first = self._resume()
        with open(self.output / TRAIN_LOG, "a", encoding="utf-8") as train_log:
            for step in range(first, len(self.steps)):
                metrics = self._step(step)
                self.accelerator.log(
                    {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}, step=step + 1
                )
                if self.accelerator.is_main_process:
                    train_log.write(json.dumps(metrics) + "\n")
                    train_log.flush()
                self._heed(metrics)
                if (step + 1) % self.dpo.checkpoint_every == 0 and step + 1 < len(self.steps):
                    os.fsync(train_log.fileno())
                    self._checkpoint(step + 1)
        if self.held_out is not None:
            metrics = self._evaluate()
            self.accelerator.log(metrics, step=len(self.steps))
            if self.accelerator.is_main_process:
                write_json(self.output / "eval_metrics.json", metrics)
        self._save()

    # The model

    def _load(self, path: Path, *, trainable: bool = False) -> Any:
        frozen = trainable and self.dpo.adapter is not None
        return load_policy(
            path,
            trust_remote_code=self.spec.trust_remote_code,
            dtype=torch.bfloat16 if frozen and self.dpo.precision == "bf16" else torch.float32,
            quantize=self.dpo.adapter.quantize if self.dpo.adapter is not None and trainable else "none",
            trainable=trainable,
        )

    def _scorer(self, model: Any) -> Scorer:
        """The model behind the fastest way to its log-probabilities, found on the first pairs."""
        if self.way is None:
            some = [self._read(int(i)) for i in self.steps[0][:2]]
            allowed: tuple[Way, ...] = ("shared", "rows") if self.dpo.shared_prompts else ("rows",)
            self.way = fastest_way(model.to(self.accelerator.device), grow_trees(some)[0], allowed=allowed)
            if self.accelerator.is_main_process:
                log.info("log-probabilities the way %r", self.way)
        return Scorer(model, self.way)

    def _autocast(self) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.dpo.precision == "bf16")

    def _saved_tensors(self) -> AbstractContextManager[Any]:
        offload = self.dpo.activation_offload and self.accelerator.device.type == "cuda"
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()

    # The data

    def _count(self) -> int:
        return len(self.training) + (len(self.held_out) if self.held_out is not None else 0)

    def _read(self, index: int) -> TokenPair:
        """Pair `index`, of those to train on and behind them those held out; without what the loss does not look at."""
        source, own = self._source(index)
        pair = source[own]
        return TokenPair(pair.prompt, pair.chosen, []) if self.dpo.loss.type == "sft" else pair

    def _source(self, index: int) -> tuple[TokenPairs, int]:
        if index < len(self.training):
            return self.training, index
        assert self.held_out is not None
        return self.held_out, index - len(self.training)

    def _eval_steps(self) -> list[np.ndarray]:
        size = self.dpo.pairs_per_step
        held_out = np.arange(len(self.training), self._count())
        return [held_out[i : i + size] for i in range(0, len(held_out), size)]

    def _partners(self) -> np.ndarray:
        """[N]: for each pair one of another prompt, whose completion KTO's KL estimate sets behind this prompt."""
        groups = [self.training.groups]
        if self.held_out is not None:
            groups.append(self.held_out.groups + 1 + int(self.training.groups.max()))
        _, first, group = np.unique(np.concatenate(groups), return_index=True, return_inverse=True)
        order = np.random.default_rng(derive_seed(self.spec.seed, "partners")).permutation(len(first))
        after = np.empty(len(first), dtype=np.int64)
        after[order] = first[np.roll(order, -1)]
        return after[group]

    def _mismatched(self, indices: np.ndarray) -> list[Tree]:
        """A tree for each pair: its prompt, and a completion of its partner's."""
        assert self.partners is not None
        trees = []
        for i in indices:
            partner = self._read(int(self.partners[i]))
            sides = [side for side in (partner.chosen, partner.rejected) if side]
            trees.append(Tree(self._read(int(i)).prompt, [sides[int(i) % len(sides)]]))
        return trees

    def _micro_batches(self, trees: Sequence[Tree]) -> list[list[int]]:
        shared = self.way == "shared"
        sizes = [t.tokens if shared else t.tokens + (len(t.branches) - 1) * len(t.prompt) for t in trees]
        return micro_batches(
            sizes,
            budget=self.dpo.tokens_per_micro_batch,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    # The reference

    def _reference_logps(self, model: Any) -> Tensor:
        """[N, 3]: chosen, rejected and, for KTO, mismatched, of all pairs. A step of its own: computed once, whatever
        happens.
        """
        from safetensors.torch import load_file, save_file

        step = Step(
            self.spec.reference_output, self.spec.reference_inputs.model_dump(mode="json"), attic=self.spec.attic
        )
        if step.manifest() is None:
            steps = [*self.steps[: len(self.steps) // self.dpo.epochs], *self._eval_steps()]
            counts: dict[str, Any] = {"pairs": self._count()}
            logps = None
            tolerance = self.dpo.sampler_logps_tolerance
            if tolerance is not None and self.training.sampler_logps is not None:
                logps, counts["sampler"] = self._sampler_logps(model, steps, tolerance)
            if logps is None:
                logps = self._computed_logps(model, steps)
            if self.accelerator.is_main_process:
                save_file({"logps": logps.cpu()}, step.begin() / "logps.safetensors")
                step.finish(counts=counts)
            self.accelerator.wait_for_everyone()
        return load_file(step.path / "logps.safetensors")["logps"].to(self.accelerator.device)

    def _computed_logps(self, model: Any, steps: Sequence[np.ndarray]) -> Tensor:
        logps = torch.zeros(self._count(), 3, device=self.accelerator.device)
        for indices in steps:
            trees, places = self._step_trees(indices)
            for batch, found in self._logps_of(model, trees):
                for column, side in enumerate(places):
                    here, branches = _in_batch(side, trees, batch)
                    logps[indices[here], column] = found[branches]
            if self.partners is not None:
                for batch, found in self._logps_of(model, self._mismatched(indices)):
                    logps[indices[batch], 2] = found
        return self.accelerator.reduce(logps, "sum")  # each pair was computed by one process

    def _sampler_logps(
        self, model: Any, steps: Sequence[np.ndarray], tolerance: float
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The sampler's own log-probabilities, where over a few steps' pairs they are the policy's; and how far apart."""
        some = steps[:4]
        indices = np.concatenate(some)
        ours = self._computed_logps(model, some)[indices, :2].double().cpu()
        theirs = torch.from_numpy(self.training.sampler_logps)
        tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in map(self._read, indices.tolist()))
        gap = float((ours - theirs[indices].double()).abs().sum()) / tokens
        used = gap <= tolerance and self.partners is None and self.held_out is None
        if self.accelerator.is_main_process:
            log.info(
                "the sampler's log-probabilities are off by %.4f nats a token: %s", gap, "used" if used else "not used"
            )
        found = torch.cat((theirs, torch.zeros(len(theirs), 1)), dim=1).float() if used else None
        return found, {"gap": gap, "pairs": len(indices), "used": used}

    def _logps_of(self, model: Any, trees: Sequence[Tree]) -> Iterator[tuple[list[int], Tensor]]:
        """This process's batches of trees, and their branches' log-probabilities, without gradient."""
        for batch in self._micro_batches(trees):
            collated = self.accelerator.unwrap_model(model).collate([trees[i] for i in batch or [0]])
            with torch.no_grad(), self._autocast():
                found = model(collated).logps  # processes meet at each batch
            if batch:
                yield batch, found.float()

    # A step

    def _step_trees(self, indices: np.ndarray) -> tuple[list[Tree], Places]:
        trees, places = grow_trees(map(self._read, indices.tolist()))
        return trees, Places([chosen for chosen, _ in places], [rejected for _, rejected in places])

    def _step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        indices = self.steps[step]
        trees, places = self._step_trees(indices)
        kl = self._kl(indices) if self.partners is not None else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.dpo.learning_rate * learning_rate_factor(
                step, len(self.steps), warmup_ratio=self.dpo.warmup_ratio, schedule=self.dpo.lr_scheduler
            )
        batches = self._micro_batches(trees)
        statistics: list[Tensor] = []
        flops = 0.0
        for number, batch in enumerate(batches):
            with self._gradient_sync(now=number == len(batches) - 1):
                # Processes average their gradients, and a step is the mean over all of its pairs. A process with
                # nothing to add takes part with weight zero.
                weight = self.accelerator.num_processes / len(indices) if batch else 0.0
                losses, rows, batch_flops = self._forward(indices, trees, places, batch or [0], kl)
                self.accelerator.backward(losses.sum() * weight)
            statistics.append(rows if batch else rows[:0])
            flops += batch_flops if batch else 0.0
        grad_norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.dpo.max_grad_norm)
        metrics = summarize(self._gather(torch.cat(statistics))) | ({} if kl is None else {"kl": float(kl)})
        norm = float(grad_norm)
        applied = math.isfinite(norm) and math.isfinite(metrics["loss"])
        if applied:
            self.optimizer.step()
        elif self.dpo.sentinels.non_finite == "stop":
            raise RuntimeError(
                f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}: not finite, and not applied. "
                "Lower dpo.learning_rate, or set dpo.precision to fp32"
            )
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        tokens = sum(tree.tokens for tree in trees)
        row: dict[str, Any] = {
            "step": step + 1,
            "epoch": round((step + 1) * self.dpo.epochs / len(self.steps), 4),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            **metrics,
            "pairs_per_second": len(indices) / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self._mfu(flops, seconds),
        }
        self.stopping = []
        if not applied:
            finite = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
            return {**finite, "alarms": [f"non_finite: step {step + 1}: loss {metrics['loss']}, gradient norm {norm}"]}
        alarms = self.sentinels.observe(row)
        self.stopping = [alarm.message for alarm in alarms if alarm.action == "stop"]
        return row | ({"alarms": [f"{alarm.name}: {alarm.message}" for alarm in alarms]} if alarms else {})

    def _heed(self, metrics: dict[str, Any]) -> None:
        """Say what was alarming about a step; end the round where that is asked for."""
        for alarm in metrics.get("alarms", []):
            log.warning("step %d: %s", metrics["step"], alarm)
        if self.stopping:
            raise RuntimeError(
                f"step {metrics['step']}: {self.stopping[0]}: the round is stopped. Look at {self.output / TRAIN_LOG}, "
                "and lower dpo.learning_rate or raise dpo.beta"
            )

    def _forward(
        self, indices: np.ndarray, trees: Sequence[Tree], places: Places, batch: Sequence[int], kl: Tensor | None
    ) -> tuple[Tensor, Tensor, float]:
        """Losses [B] of the pairs of some trees, their statistics [B, S] in the order of `STATISTICS`, and the FLOPs."""
        scorer = self.accelerator.unwrap_model(self.policy)
        collated = scorer.collate([trees[i] for i in batch])
        with self._saved_tensors(), self._autocast():
            found: CompletionLogps = self.policy(collated, aligned=self.dpo.wpo)
        lengths = torch.bincount(collated.branch, minlength=collated.branches)
        first = _first_branches(trees, batch)
        here = [p for p, (tree, _) in enumerate(places.chosen) if tree in first]
        # The branch of each pair here; behind the last one where it has no such completion.
        at = [
            torch.tensor([first[side[p][0]] + side[p][1] if side[p][1] >= 0 else collated.branches for p in here])
            for side in places
        ]

        def sides(values: Tensor, absent: float) -> list[Tensor]:
            padded = torch.cat((values, values.new_full((1,), absent)))
            return [padded[index.to(values.device)] for index in at]

        chosen, rejected = sides(found.logps, math.nan)
        chosen_tokens, rejected_tokens = sides(lengths, 0)
        reference = self.reference_logps[torch.from_numpy(indices[here]).to(chosen.device)]
        logps = PairLogps(chosen, rejected, reference[:, 0], reference[:, 1], chosen_tokens, rejected_tokens)
        losses, chosen_rewards, rejected_rewards = preference_loss(self.dpo.loss, logps, beta=self.dpo.beta, kl=kl)
        if found.alignment is not None:
            losses = losses * wpo_weights(*sides(found.alignment / lengths, math.nan))
        if self.dpo.nll_coefficient:
            nll = nll_term(chosen, chosen_tokens)
            losses = losses + self.dpo.nll_coefficient * torch.where(chosen_tokens > 0, nll, torch.zeros_like(nll))
        nothing = torch.full_like(chosen, float("nan"))
        if self.dpo.loss.type == "sft":
            chosen_rewards = rejected_rewards = nothing
        change = chosen - reference[:, 0] if self.with_reference else nothing
        columns = (losses, chosen_rewards, rejected_rewards, chosen, rejected, change)
        statistics = torch.stack([column.detach().float() for column in columns], dim=1)
        passes = 2 if self.dpo.adapter is not None else 3  # the weights' own gradient is a third of the work
        return losses, statistics, passes * forward_flops(scorer.causal, collated)

    def _kl(self, indices: np.ndarray) -> Tensor:
        """KTO's estimate over a step, from mismatched prompts and completions."""
        logps = torch.zeros(len(indices), device=self.accelerator.device)
        for batch, found in self._logps_of(self.policy, self._mismatched(indices)):
            logps[batch] = found
        logps = self.accelerator.reduce(logps, "sum")
        return kl_estimate(logps, self.reference_logps[torch.from_numpy(indices).to(logps.device), 2])

    def _gradient_sync(self, *, now: bool) -> AbstractContextManager[Any]:
        """Gradients meet across processes at a step's last micro-batch only."""
        self.accelerator.gradient_state._set_sync_gradients(now)  # DeepSpeed takes its step by this
        return nullcontext() if now else self.accelerator.no_sync(self.policy)

    def _mfu(self, flops: float, seconds: float) -> float:
        if self.peak is None:
            dtype = torch.bfloat16 if self.dpo.precision == "bf16" else torch.float32
            self.peak = matmul_peak(self.accelerator.device, dtype)
        return flops / seconds / self.peak

    def _gather(self, rows: Tensor) -> Tensor:
        """Statistics of all processes' pairs; shares may differ."""
        if self.accelerator.num_processes == 1:
            return rows
        marked = torch.cat((torch.ones_like(rows[:, :1]), rows), dim=1)
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(marked, dim=0))
        return gathered[gathered[:, 0] == 1, 1:]

    def _evaluate(self) -> dict[str, float]:
        rows = []
        for indices in self._eval_steps():
            trees, places = self._step_trees(indices)
            kl = self._kl(indices) if self.partners is not None else None
            for batch in self._micro_batches(trees):
                with torch.no_grad():
                    _, statistics, _ = self._forward(indices, trees, places, batch or [0], kl)
                rows.append(statistics if batch else statistics[:0])
        metrics = summarize(self._gather(torch.cat(rows)))
        return {f"eval_{name}": value for name, value in metrics.items()}

    # The disk

    def _checkpoint(self, step: int) -> None:
        """The state after `step` steps. The one before it goes only when this one is whole."""
        path = self.output / f"checkpoint-{step:06d}"
        fresh = path.with_name(path.name + ".new")
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()  # each process writes its random state there
        if self.accelerator.is_main_process:
            sync_tree(fresh)
            os.replace(fresh, path)
            fsync(self.output)
            for old in self.output.glob("checkpoint-*"):
                if old != path:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the last whole checkpoint. Returns the number of steps that are done."""
        found = sorted(p for p in self.output.glob("checkpoint-*") if not p.name.endswith(".new"))
        done = int(found[-1].name.removeprefix("checkpoint-")) if found else 0
        if found:
            whole = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            partial = self.dpo.adapter is not None and not whole
            self.accelerator.load_state(str(found[-1]), **({"strict": False} if partial else {}))
        if self.accelerator.is_main_process:
            kept = self.output / TRAIN_LOG
            lines = kept.read_text().splitlines(keepends=True) if kept.exists() else []
            write_text(kept, "".join(lines[:done]))
        self.accelerator.wait_for_everyone()
        return done

    def _save(self) -> None:
        state = self.accelerator.get_state_dict(self.policy)
        if self.accelerator.is_main_process:
            dtype = getattr(torch, self.dpo.save_dtype)
            model = self.accelerator.unwrap_model(self.policy).model
            state = {name.removeprefix("model.").replace("._orig_mod", ""): tensor for name, tensor in state.items()}
            cast: dict[tuple[Any, ...], Tensor] = {}  # tied weights stay one
            for name, tensor in state.items():
                if tensor.is_floating_point():
                    same = (tensor.data_ptr(), tensor.shape)
                    state[name] = cast.setdefault(same, tensor.to(dtype))
            model.save_pretrained(self.output, state_dict=state)
            if (self.output / "config.json").exists():  # names the precision in memory
                config = read_json(self.output / "config.json")
                write_json(self.output / "config.json", {**config, "dtype": self.dpo.save_dtype})
            if (adapter := self.output / ADAPTER_CONFIG).exists():  # PEFT writes a set, in another order each time
                config = read_json(adapter)
                targets = config["target_modules"]
                write_json(
                    adapter, config | {"target_modules": targets if isinstance(targets, str) else sorted(targets)}
                )
            for pattern in CARRIED_FILES:
                for file in self.spec.policy.glob(pattern):
                    shutil.copy(file, self.output / file.name)
            (self.output / "README.md").unlink(missing_ok=True)  # PEFT's, with nothing in it
            if self.dpo.optimizer_state == "carry":
                torch.save(self.optimizer.state_dict(), self.output / OPTIMIZER_STATE)
        self.accelerator.wait_for_everyone()


STATISTICS = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logps/chosen_change")


def summarize(rows: Tensor) -> dict[str, float]:
    """Means over pairs, under TRL's metric names, from rows [B, S] in the order of `STATISTICS`.

    NaN marks the side that an unpaired example does not have; a mean is over those that have it. What nothing has is
    left out.
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


def _same_adapter(trained: dict[str, Any], asked: AdapterConfig | None, path: Path) -> None:
    """Check that training continues an adapter with the rank and alpha that it has.

    Raises:
        RuntimeError: the configuration has others, or no adapter.
    """
    if asked is None or (asked.r, asked.alpha) != (trained["r"], trained["lora_alpha"]):
        wanted = f"of r {asked.r} and alpha {asked.alpha}" if asked else "null"
        raise RuntimeError(
            f"the policy {path} is an adapter of r {trained['r']} and alpha {trained['lora_alpha']}, and dpo.adapter is "
            f"{wanted}; set dpo.adapter to what it was trained with"
        )


def _first_branches(trees: Sequence[Tree], batch: Sequence[int]) -> dict[int, int]:
    """The number that each tree's first branch has in a batch of these trees."""
    first, total = {}, 0
    for tree in batch:
        first[tree] = total
        total += len(trees[tree].branches)
    return first


def _in_batch(side: list[tuple[int, int]], trees: Sequence[Tree], batch: Sequence[int]) -> tuple[list[int], list[int]]:
    """The pairs of a step that have this side in a batch of trees, and its branches there."""
    first = _first_branches(trees, batch)
    here = [p for p, (tree, branch) in enumerate(side) if tree in first and branch >= 0]
    return here, [first[side[p][0]] + side[p][1] for p in here]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as trackers take them: dotted keys, plain values."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[prefix + key] = value if isinstance(value, int | float | bool | str) else str(value)
    return rows


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


if __name__ == "__main__":
    main()

"""Reference log-probabilities of a round's pairs: a step of the run, `<round>/reference/`, computed once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from iterdpo.run.rundir import Step
from iterdpo.training.collate import RoundPairs
from iterdpo.training.launch import TrainSpec
from iterdpo.training.step import Compute

log = logging.getLogger(__name__)


def reference_logps(spec: TrainSpec, compute: Compute, model: Any, pairs: RoundPairs) -> Tensor:
    """[N, 3], in nats: of all pairs the chosen, the rejected and, for KTO, the mismatched completion.

    Read from the finished step, or computed with `model`, over the batches that training will use.
    """
    from safetensors.torch import load_file, save_file

    accelerator, tolerance = compute.accelerator, spec.dpo.sampler_logps_tolerance
    step = Step(spec.reference_output, spec.reference_inputs.model_dump(mode="json"), attic=spec.attic)
    [finished] = broadcast_object_list([step.manifest() is not None])  # another node may see the directory as it was
    if not finished:
        steps = [*pairs.one_epoch, *pairs.held_out_steps]
        counts: dict[str, Any] = {"pairs": len(pairs)}
        logps = None
        if tolerance is not None and pairs.training.sampler_logps is not None:
            logps, counts["sampler"] = sampler_logps(compute, model, pairs, steps[:4], tolerance=tolerance)
        if logps is None:
            logps = computed_logps(compute, model, pairs, steps)
        if accelerator.is_main_process:
            save_file({"logps": logps.cpu()}, step.begin() / "logps.safetensors")
            step.finish(counts=counts)
        accelerator.wait_for_everyone()
        return logps.to(accelerator.device)
    return load_file(step.path / "logps.safetensors")["logps"].to(accelerator.device)


def computed_logps(compute: Compute, model: Any, pairs: RoundPairs, steps: Sequence[np.ndarray]) -> Tensor:
    """[N, 3] as `model` has them; 0 for pairs that are in none of the steps."""
    logps = torch.zeros(len(pairs), 3, device=compute.accelerator.device)
    inputs, found = compute.ahead(pairs, steps), []
    with torch.no_grad(), compute.one_copy(model):
        for step, numbers in enumerate(steps):
            found.append(compute.pair_logps(model, inputs(step), absent=0.0))
            if pairs.partners is not None:
                for batch, branches in compute.branch_logps(model, pairs.mismatched_trees(numbers)):
                    logps[numbers[batch], 2] = branches.logps
    if found:
        logps[np.concatenate(steps), :2] = torch.cat(found)
    return compute.accelerator.reduce(logps, "sum")  # each pair was computed by one process


def sampler_logps(
    compute: Compute, model: Any, pairs: RoundPairs, steps: Sequence[np.ndarray], *, tolerance: float
) -> tuple[Tensor | None, dict[str, Any]]:
    """The sampler's own log-probabilities [N, 3], or None if over the pairs of some steps they are not the model's.

    Also returns how far apart the two are: `{"gap": 0.006, "pairs": 32, "used": True}`, in nats a token.
    """
    numbers = np.concatenate(steps)
    computed = computed_logps(compute, model, pairs, steps)[numbers, :2].double().cpu()
    sampled = torch.from_numpy(pairs.training.sampler_logps)
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in (pairs[number] for number in numbers.tolist()))
    gap = float((computed - sampled[numbers].double()).abs().sum()) / tokens
    used = gap <= tolerance and pairs.partners is None and pairs.held_out is None
    if compute.accelerator.is_main_process:
        outcome = "used" if used else "not used"
        log.info("the sampler's log-probabilities are off by %.4f nats per token: %s", gap, outcome)
    logps = torch.cat((sampled, torch.zeros(len(sampled), 1)), dim=1).float() if used else None
    return logps, {"gap": gap, "pairs": len(numbers), "used": used}

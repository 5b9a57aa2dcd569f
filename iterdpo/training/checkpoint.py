"""The trainer's files: checkpoints within a round, and the policy that the round ends with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from iterdpo.run.rundir import fsync, read_json, sync_tree, write_json, write_text
from iterdpo.run.sums import note, sha256_file
from iterdpo.training.launch import OPTIMIZER_STATE, TRAIN_LOG, TrainSpec
from iterdpo.training.models import ADAPTER_CONFIG, make_savable

# Files that a policy takes over from the one it was trained from: the tokenizer's, byte for byte, and its code.
CARRIED_FILES: tuple[str, ...] = (
    *("tokenizer*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.model", "chat_template*", "*.py"),
)


def save_checkpoint(accelerator: Accelerator, output: Path, *, steps: int) -> None:
    """The state after `steps` steps. The checkpoint before it is removed once this one is whole."""
    path = output / f"checkpoint-{steps:06d}"
    fresh = path.with_name(path.name + ".new")
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()  # each process writes its random state there
    if accelerator.is_main_process:
        shutil.copy(output / TRAIN_LOG, fresh)  # what resumes begins with it, whatever became of the other
        note(fresh, {str(p.relative_to(fresh)): sha256_file(p) for p in fresh.rglob("*") if p.is_file()})
        sync_tree(fresh)
        os.replace(fresh, path)
        fsync(output)
        for old in output.glob("checkpoint-*"):
            if old != path:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path, *, adapter: bool) -> int:
    """Load the last whole checkpoint, and the training log up to it. Returns how many steps are done."""
    whole = sorted(path for path in output.glob("checkpoint-*") if not path.name.endswith(".new"))
    [whole] = broadcast_object_list([whole])  # another node may see the directory as it was
    done = int(whole[-1].name.removeprefix("checkpoint-")) if whole else 0
    if whole:
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        accelerator.load_state(str(whole[-1]), **({"strict": False} if adapter and not sharded else {}))
    if accelerator.is_main_process:
        kept = whole[-1] / TRAIN_LOG if whole else None
        write_text(output / TRAIN_LOG, kept.read_text() if kept else "")
    accelerator.wait_for_everyone()
    return done


def drop_frozen(models: list[Any], states: list[dict[str, Tensor]], directory: str) -> None:
    """A hook of `Accelerator.save_state`: leaves out what no step changes, the model under an adapter."""
    for model, state in zip(models, states, strict=False):  # FSDP and DeepSpeed pass no states
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(name, None)


def save_policy(accelerator: Accelerator, policy: Any, optimizer: Any, spec: TrainSpec) -> None:
    """Write the policy as a Hugging Face checkpoint, or as a PEFT adapter, in `dpo.policy_dtype`."""
    state = accelerator.get_state_dict(policy)
    moments = whole_moments(accelerator, policy, optimizer) if spec.dpo.optimizer_state == "carry" else None
    if accelerator.is_main_process:
        output, dtype = spec.output, getattr(torch, spec.dpo.policy_dtype)
        model = accelerator.unwrap_model(policy).model
        state = {name.removeprefix("model.").replace("._orig_mod", ""): tensor for name, tensor in state.items()}
        cast: dict[tuple[Any, ...], Tensor] = {}  # tied weights stay one tensor
        for name, tensor in state.items():
            if tensor.is_floating_point():
                same = (tensor.data_ptr(), tensor.shape)
                state[name] = cast.setdefault(same, tensor.to(dtype))
        carried = CARRIED_FILES
        if spec.dpo.adapter is None and make_savable(model):
            carried += ("generation_config.json",)
        model.save_pretrained(output, state_dict=state)
        if (output / "config.json").exists():  # names the precision in memory
            config = read_json(output / "config.json")
            write_json(output / "config.json", {**config, "dtype": spec.dpo.policy_dtype})
        if (adapter := output / ADAPTER_CONFIG).exists():  # PEFT writes a set, in another order each time
            config = read_json(adapter)
            sets = {name: config[name] for name in ("target_modules", "modules_to_save", "exclude_modules")}
            write_json(adapter, config | {k: sorted(names) for k, names in sets.items() if isinstance(names, list)})
        for pattern in carried:
            for file in spec.policy.glob(pattern):
                shutil.copy(file, output / file.name)
        (output / "README.md").unlink(missing_ok=True)  # PEFT's, with nothing in it
        if moments is not None:
            torch.save(moments, output / OPTIMIZER_STATE)
    accelerator.wait_for_everyone()


def whole_moments(accelerator: Accelerator, policy: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state, as of one process; under FSDP2 on the first alone, but all of them call this."""
    if not accelerator.is_fsdp2:
        state: dict[str, Any] = optimizer.state_dict()
        return state
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_optimizer_state_dict(policy, optimizer.optimizer, options=options)["state"]
    return {"state": {at: found[name] for at, name in enumerate(_names(policy, optimizer)) if name in found}}


def carry_moments(accelerator: Accelerator, policy: Any, optimizer: Any, file: Path) -> None:
    """Give the optimizer the moments of an earlier round, whatever it was trained on; the settings stay this round's."""
    state = torch.load(file, weights_only=True, map_location="cpu")["state"]
    if not accelerator.is_fsdp2:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return
    names = _names(policy, optimizer)
    groups = [{**group, "params": [names.pop(0) for _ in group["params"]]} for group in optimizer.param_groups]
    moments = {"state": {name: state[at] for at, name in enumerate(_names(policy, optimizer))}, "param_groups": groups}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(policy, optimizer.optimizer, moments, options=options)


def _names(policy: Any, optimizer: Any) -> list[str]:
    """Of the optimizer's parameters, in its order."""
    names = {parameter: name for name, parameter in policy.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

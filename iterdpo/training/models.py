"""Checkpoints and adapters as models to train and to score with."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iterdpo.run.rundir import read_json

ADAPTER_CONFIG = "adapter_config.json"

DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "attn_dropout", "embd_pdrop", "embedding_dropout", "embed_dropout"),
    *("resid_pdrop", "residual_dropout", "hidden_dropout", "ffn_dropout", "activation_dropout", "dropout"),
)


def load_policy(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    empty: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    quantize: str = "none",
    trainable: bool = False,
    lora_dropout: float = 0.0,
) -> Any:
    """A checkpoint, or an adapter with its base, without dropout: preferences are learnt, and compared, without noise.

    `dtype` is that of a checkpoint's weights; an adapter's own are float32. On a `device` other than the CPU, they are
    never all in the host's memory. `empty`: they have no values, for another process to send. `trainable`: training
    continues an adapter, with `lora_dropout`, whatever it was trained with before.

    Raises:
        ValueError: the checkpoint lacks weights, which would be random.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the progress line is ours
    if (base := adapter_base(path)) is not None:
        from peft import PeftConfig, PeftModel

        how: dict[str, Any] = {"device": device, "empty": empty, "dtype": dtype, "quantize": quantize}
        model = load_policy(base, trust_remote_code=trust_remote_code, **how)
        adapter = PeftConfig.from_pretrained(str(path))
        adapter.lora_dropout = lora_dropout
        return _whole_in_float32(PeftModel.from_pretrained(model, str(path), is_trainable=trainable, config=adapter))
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    for section in (config, config.get_text_config()):
        for name in DROPOUTS:
            if getattr(section, name, None):
                setattr(section, name, 0.0)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # sdpa would leave the soft cap out (Gemma 2)
    if empty:
        model = _empty(config, dtype, options)
    else:
        if device is not None and torch.device(device).type != "cpu":
            options["device_map"] = {"": device}
        model = _loaded(path, config, dtype, quantize, options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _loaded(path: str | Path, config: Any, dtype: torch.dtype, quantize: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    if quantize == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, report = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path}: has no weights for {', '.join(missing[:3])}, which would be random; download it again"
        )
    return model


def _empty(config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A model with its buffers, such as the rotary tables, and memory for its weights that nothing is written to."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    model.tie_weights()
    return model


def use_kernels(model: Any, kernels: str) -> None:
    """Let a model on a GPU compute its norms, rotary positions and activations by Liger's kernels, as `dpo.kernels` asks.

    A model of a kind that Liger does not know stays as it is. The output head and the loss are not Liger's.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_liger_kernel_available

    if kernels == "none" or (kernels == "auto" and not is_liger_kernel_available()):
        return
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def adapter_base(path: str | Path) -> str | None:
    """The checkpoint that an adapter in `path` belongs to; None for a whole checkpoint."""
    config = Path(path) / ADAPTER_CONFIG
    return read_json(config)["base_model_name_or_path"] if config.exists() else None


def with_new_adapter(
    model: Any,
    *,
    r: int,
    alpha: int,
    target_modules: str | list[str],
    quantize: str,
    modules_to_save: list[str] | None = None,
    lora_dropout: float = 0.0,
) -> Any:
    """`model` with a LoRA adapter that changes nothing yet (its second matrix is zero); the rest is frozen.

    `modules_to_save` are trained whole, as copies. If the model ties its output head to its embeddings, either name
    stands for both, and the copies stay tied.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    whole: dict[str, Any] = {}
    if modules_to_save:
        modules = dict(model.named_modules())
        # In full: PEFT takes "norm" for every module whose name ends in these letters.
        names = [name for name in modules if any(f".{name}".endswith(f".{end}") for end in modules_to_save)]
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tied = model.config.get_text_config().tie_word_embeddings and any(modules[name] in ends for name in names)
        whole = {"modules_to_save": names, "exclude_modules": names, "ensure_weight_tying": tied}
    adapter = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules,
        lora_dropout=lora_dropout,
        task_type="CAUSAL_LM",
        **whole,
    )
    return _whole_in_float32(get_peft_model(model, adapter))


def whole_modules(model: Any) -> set[str]:
    """Names of the modules that are trained whole beside an adapter: `{"model.embed_tokens", "lm_head"}`."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = model.get_base_model().named_modules()
    return {name for name, module in wrapped if isinstance(module, ModulesToSaveWrapper)}


def _whole_in_float32(model: Any) -> Any:
    """The copies that are trained whole in float32, as an adapter's matrices: bfloat16 would lose small updates."""
    for name in whole_modules(model):
        model.get_base_model().get_submodule(name).modules_to_save.float()
    return model


def make_savable(model: Any) -> bool:
    """Take from a model's configurations what transformers loads but refuses to save.

    Older checkpoints have generation settings in config.json, or a generation_config.json with a temperature beside
    `do_sample: false`. Returns whether the second is so: the file then has to be copied, because what would be saved in
    its place has the end tokens alone.
    """
    from transformers import GenerationConfig

    for name in model.config._get_generation_parameters():  # what save_pretrained refuses
        delattr(model.config, name)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{n: getattr(model.generation_config, n) for n in names})
        return True
    return False


def average_checkpoints(first: Path, second: Path, *, decay: float, output: Path) -> None:
    """Write decay * first + (1 - decay) * second, tensor by tensor in float32, with the rest of `second`'s files."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in second.iterdir():
        own = file.suffix == ".pt" or file.name in ("MANIFEST.json", "train_log.jsonl", "train.json")
        if file.is_file() and not own:
            (output / file.name).unlink(missing_ok=True)
            shutil.copy(file, output / file.name)
    file_of: dict[str, Path] = {}
    for file in sorted(first.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            file_of.update(dict.fromkeys(weights.keys(), file))
    for file in sorted(second.glob("*.safetensors")):
        mixed = {}
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dictionary
                new = weights.get_tensor(name)
                with safe_open(file_of[name], "pt") as other:
                    old = other.get_tensor(name)
                mixed[name] = torch.lerp(new.float(), old.float(), decay).to(new.dtype)
        save_file(mixed, output / file.name, metadata={"format": "pt"})


@contextmanager
def offloaded(model: torch.nn.Module) -> Iterator[None]:
    """Keep what a backward pass needs in the host's pinned memory until then, but for weights, which stay anyway.

    Copies are queued behind the work that they belong to: nothing waits for them.
    """
    from torch.distributed.tensor import DTensor

    weights = {w.untyped_storage().data_ptr() for w in model.parameters() if not isinstance(w, DTensor)}

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True), tensor.device

    def unpack(packed: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].to(packed[1], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def free_memory() -> None:
    """Give back the memory of models that are no longer referenced, to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""A LoRA adapter as plain weights, for an engine that does not apply adapters itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

HEADS = ("lm_head", "embed_out", "output_layer")


def merge_adapter(adapter: str | Path, output: Path, *, dtype: Any, trust_remote_code: bool = False) -> None:
    """Write W + (alpha / r) B A in `dtype` to `output`: config.json and weights, as an engine reloads them.

    Added in float32 and rounded once, on the CPU; takes four bytes of memory a weight.

    Raises:
        ValueError: it adapts an output head, or embeddings, that are tied: two matrices would have to come of one.
    """
    from iterdpo.training.models import load_policy

    model = load_policy(adapter, trust_remote_code=trust_remote_code)
    inner = model.get_base_model()
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if inner.config.get_text_config().tie_word_embeddings and any(hasattr(end, "lora_A") for end in ends):
        raise ValueError(
            f"{adapter} adapts embeddings or output head of a model that ties them, and cannot be merged; leave them "
            "out of dpo.adapter.target_modules"
        )
    model.merge_and_unload().to(dtype).save_pretrained(output)


def adapts_head(adapter: str | Path) -> bool:
    """Whether the adapter changes the output head.

    vLLM 0.32 on a CPU leaves such a head in place when its adapter is gone: the base then samples with it.
    """
    with safe_open(Path(adapter) / "adapter_model.safetensors", framework="numpy") as tensors:
        return any(head in name.split(".") for name in tensors.keys() for head in HEADS)  # noqa: SIM118  # no mapping

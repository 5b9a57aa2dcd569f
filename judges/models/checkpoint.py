"""Checkpoints of Hugging Face classifiers: what is checked before one is loaded, and the loading.

In all of it `what` begins an error's message: `"reward model my-rm"`. Weights come from safetensors only, never unpickled.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iterdpo.errors import JudgeError
from iterdpo.run.rundir import read_json
from judges.base import nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")


def checkpoint_config(model: str, what: str) -> dict[str, Any] | None:
    """The config.json of the checkpoint directory `model`; None for a hub id, which is not looked up.

    Raises:
        JudgeError: no such directory, or no checkpoint with safetensors weights there.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        nested = len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())  # a hub id is `owner/name`
        if nested or path.is_absolute() or path.is_file() or str(model).startswith("."):
            beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
            raise JudgeError(f"{what}: no such directory; {nearest(path.name, beside, 'directories there')}")
        return None
    if not (path / "config.json").is_file():
        raise JudgeError(f"{what}: no config.json there; give the directory of a Hugging Face checkpoint")
    if not list(path.glob("*.safetensors")):
        raise JudgeError(f"{what}: has no .safetensors file; convert its weights, which are never unpickled")
    config: dict[str, Any] = read_json(path / "config.json")
    return config


def label_count(config: Mapping[str, Any]) -> int:
    """The labels of a config.json, which leaves them out if they are two."""
    return len(config.get("id2label", ())) or int(config.get("num_labels", 2))


def check_architecture(what: str, architectures: Sequence[str] | None, known: Sequence[str], remedy: str) -> None:
    """Refuse a checkpoint none of whose architectures has one of `known` in its name."""
    if not any(part in name for name in architectures or () for part in known):
        raise JudgeError(
            f"{what}: its architecture is {', '.join(architectures or ['none'])}, which gives no scores; give {remedy}"
        )


def load_config_and_tokenizer(what: str, path: str, **source: Any) -> tuple[Any, Any]:
    """Those of transformers. `source` is `revision` and `trust_remote_code`.

    Raises:
        JudgeError: they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoConfig.from_pretrained(path, **source), AutoTokenizer.from_pretrained(path, **source)
    except (OSError, ValueError) as error:
        raise JudgeError(f"{what}: cannot be loaded: {error}") from error


def load_classifier(what: str, kind: Any, path: str, *, dtype: str, device: str | None, **source: Any) -> Any:
    """A model of the class `kind` on the device, in evaluation mode. By default that is the GPU, if there is one.

    Raises:
        JudgeError: it cannot be loaded, or lacks weights.
    """
    import torch

    try:
        model, report = kind.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    except (OSError, ValueError) as error:
        raise JudgeError(f"{what}: cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise JudgeError(
            f"{what}: has no weights for {', '.join(sorted(report['missing_keys'])[:3])}, which would be random; give a "
            "checkpoint whose head was trained"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def token_limit(config: Any, tokenizer: Any, max_length: int | None) -> int:
    """The most tokens that the model reads, and no more than `max_length`."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(n for n in (max_length, positions, tokenizer.model_max_length) if n)


def free_memory() -> None:
    """Give back the memory of models that are no longer referenced, to the device too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Finding a model, and refusing one that could not run, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from iterdpo.config import AdapterConfig
from iterdpo.errors import ConfigError

HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "embeddings.weight", "word_embeddings.weight")


def resolve_checkpoint(path: str, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint: `path` itself, or the snapshot of a hub id (downloaded if it is not cached).

    Raises:
        ConfigError: neither a directory nor a hub id that can be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local.absolute()
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or local.suffix in (".gguf", ".bin", ".safetensors"):
        raise ConfigError(f"model.path {path!r}: no such directory; give a checkpoint directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_PATTERNS, etag_timeout=5))
    except (OSError, HFValidationError, RuntimeError) as error:  # not found, not reachable, not an id
        reason = str(error).strip().splitlines()[0][:200]
        problem = f"no such directory here, and not to be had from the hub ({reason})"
        raise ConfigError(f"model.path {path!r}: {problem}; check the spelling and the network") from None


def check_whole_modules(directory: Path, adapter: AdapterConfig | None) -> None:
    """Check that the model has the modules that `dpo.adapter.modules_to_save` names. Reads headers only.

    Raises:
        ConfigError: it has no such module; names those outside its layers.
    """
    from safetensors import safe_open

    if adapter is None or adapter.modules_to_save is None:
        return
    modules: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            modules |= {name.rpartition(".")[0] for name in weights.keys()}  # noqa: SIM118  # not a mapping
    modules.add("lm_head")  # not in the files if it is tied to the embeddings
    for name in adapter.modules_to_save:
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            outside = sorted(module for module in modules if not re.search(r"\.\d+\.", module))
            raise ConfigError(
                f"dpo.adapter.modules_to_save: the model in {directory} has no module {name!r}; it has "
                f"{', '.join(outside)}, and its layers' modules"
            )


def check_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The model's config.json, if the directory holds a causal language model with safetensors and a tokenizer.

    Reads headers only. A missing or contradictory part is a ConfigError that names it.
    """
    where = f"model.path {directory}"
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        base = json.loads((directory / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise ConfigError(
            f"{where}: holds only an adapter of {base}; merge the two with peft's merge_and_unload(), or start from "
            f"{base} with dpo.adapter"
        )
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: has no config.json, so it is not a Hugging Face checkpoint") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{where}/config.json: cannot be read: {error}") from None
    architectures = config.get("architectures") or []
    if architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise ConfigError(f"{where}: {architectures[0]} is not a causal language model")
    if config.get("auto_map") and not trust_remote_code:
        raise ConfigError(f"{where}: needs its own Python code; read it, then set model.trust_remote_code=true")
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        remedy = "convert them with from_pretrained(...).save_pretrained(...)"
        raise ConfigError(f"{where}: has no .safetensors weights; pickled ones are not loaded: {remedy}")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {file.name for file in weights}
        if missing:
            raise ConfigError(f"{where}: {sorted(missing)[0]} is missing, which {index.name} lists; download it again")
    if not (directory / "tokenizer_config.json").exists() and not (directory / "tokenizer.json").exists():
        raise ConfigError(f"{where}: has no tokenizer; save one there with tokenizer.save_pretrained(...)")
    _check_vocabulary(where, directory, config, weights)
    return config


def _check_vocabulary(where: str, directory: Path, config: dict[str, Any], weights: list[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    vocabulary = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if vocabulary is None:
        return
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = [name for name in tensors.keys() if name.endswith(EMBEDDINGS)]  # noqa: SIM118  # no mapping
                embedded = {name: tensors.get_slice(name).get_shape()[0] for name in names}
        except (SafetensorError, OSError) as error:
            problem = f"not a safetensors file ({error}); it was cut short, or is a Git LFS pointer"
            raise ConfigError(f"{where}/{file.name}: {problem}: download it again") from None
        for name, rows in embedded.items():
            if rows != vocabulary:
                raise ConfigError(
                    f"{where}: {file.name} embeds {rows:,} tokens ({name}), but config.json has vocab_size "
                    f"{vocabulary:,}; the files come from different models"
                )
    if (directory / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        known = tokenizer.get_vocab(with_added_tokens=True)
        beyond = sorted(token for token in known.values() if token >= vocabulary)
        # Some checkpoints add tokens after those of the model that it never sees, such as one for an image.
        unused = beyond == list(range(vocabulary, vocabulary + len(beyond))) and (
            set(beyond) <= tokenizer.get_added_tokens_decoder().keys()
        )
        if not unused:
            highest = beyond[-1]
            raise ConfigError(
                f"{where}: the tokenizer has ids up to {highest:,}, but the model embeds {vocabulary:,} tokens "
                "(config.json, vocab_size); use the tokenizer that the model was trained with"
            )


def context_length(config: dict[str, Any]) -> int | None:
    """Longest sequence that the model takes, in tokens, if its configuration says."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [section.get(key) for section in (config, config.get("text_config") or {}) for key in keys]
    return next((length for length in found if isinstance(length, int)), None)

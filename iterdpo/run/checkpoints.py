"""Finding a model, and refusing one that could not run, before anything is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from iterdpo.config import AdapterConfig, DPOConfig
from iterdpo.errors import ConfigError
from iterdpo.escape import printable
from iterdpo.run.devices import visible_gpus
from iterdpo.run.remote import Remote, is_url

HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "embeddings.weight", "word_embeddings.weight")
HEADS = ("lm_head", "embed_out")

# Matrices that are no linear layer's, beside token embeddings.
NOT_LINEAR = ("wpe.weight", "embed_positions.weight", *(f"{head}.weight" for head in HEADS))

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

NOT_ARCHITECTURE = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_scaling", "rope_parameters"),
)
"""Keys of config.json in which checkpoints may differ that compute the same; the last two by their own keys."""

OF_WINDOWS = ("sliding_window", "max_window_layers")
"""Keys of config.json without effect if `use_sliding_window` is false."""

INTEGERS, SHORT = ("I", "U"), ("F8", "F6", "F4")
"""How the names of types begin in which quantized weights are stored, in the headers of safetensors."""

DEQUANTIZED = ("fp8", "mxfp4")
"""Methods whose weights transformers turns into plain ones if it finds no GPU that computes with them."""


def resolve_checkpoint(path: str, *, revision: str | None = None, key: str = "model.path") -> Path:
    """The directory of a checkpoint: `path` itself, the snapshot of a hub id, or a copy of a URL's files (downloaded if it is
    not there yet). `key` names it in messages.

    Raises:
        ConfigError: neither a directory nor a hub id that can be reached. DataError: a URL that cannot be.
    """
    if is_url(path):
        remote = Remote(path)
        files = [f for f in remote.files if remote.is_directory and any(fnmatch(f, p) for p in HUB_PATTERNS)]
        if not files:
            raise ConfigError(f"{key} {path!r}: no directory with the files of a checkpoint in it")
        return remote.copies(files).absolute()
    local = Path(path).expanduser()
    if local.is_dir():
        return local.absolute()
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or local.suffix in (".gguf", ".bin", ".safetensors"):
        raise ConfigError(f"{key} {path!r}: no such directory; give a checkpoint directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_PATTERNS, etag_timeout=5))
    except (OSError, HFValidationError, RuntimeError) as error:  # not found, not reachable, not an id
        reason = str(error).strip().splitlines()[0][:200]
        problem = f"no such directory here, and not to be had from the hub ({reason})"
        raise ConfigError(f"{key} {path!r}: {problem}; check the spelling and the network") from None


def check_whole_modules(directory: Path, adapter: AdapterConfig | None) -> None:
    """Check that the model has the modules that `dpo.adapter.modules_to_save` names. Reads headers only.

    Raises:
        ConfigError: it has no such module; names those outside its layers.
    """
    if adapter is None or adapter.modules_to_save is None:
        return
    modules = {name.rpartition(".")[0] for name in weight_shapes(weight_files(directory))}
    modules.add("lm_head")  # not in the files if it is tied to the embeddings
    for name in adapter.modules_to_save:
        if not any(adapted(module, [name]) for module in modules):
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
    _refuse_adapter(where, directory)
    if not (directory / "config.json").exists():
        raise ConfigError(f"{where}: has no config.json, so it is not a Hugging Face checkpoint")
    config = _read_object(where, directory / "config.json")
    if not isinstance(config.get("text_config") or {}, dict):
        raise ConfigError(f"{where}/config.json: text_config is no object; download it again")
    architectures = config.get("architectures") or []
    if architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise ConfigError(f"{where}: {printable(architectures[0])} is not a causal language model")
    if config.get("auto_map") and not trust_remote_code:
        raise ConfigError(f"{where}: needs its own Python code; read it, then set model.trust_remote_code=true")
    _check_code(where, directory, config)
    _refuse_quantized(where, directory, config)
    if not (directory / "tokenizer_config.json").exists() and not (directory / "tokenizer.json").exists():
        raise ConfigError(f"{where}: has no tokenizer; save one there with tokenizer.save_pretrained(...)")
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            _read_object(where, directory / name)
    _check_weights(where, directory, config, weight_files(directory))
    return config


def check_model(directory: Path, config: dict[str, Any]) -> None:
    """Hold a checkpoint against the model that transformers makes of its config.json, without loading it.

    The imports take seconds. A ConfigError if transformers has no such model, if the weights are not those of it, or if
    the settings for generation are refused.
    """
    where = f"model.path {directory}"
    if not config.get("auto_map"):
        _check_known(where, config)
        _check_shapes(where, directory, weight_shapes(weight_files(directory), refused=()))
    _check_generation(where, directory)


def check_alike(directory: Path, policy: Path, key: str, *, column: str) -> None:
    """Refuse a checkpoint that cannot take the place of `policy` in its engine, or whose token ids mean other texts.

    Reads headers, config.json and tokenizers only. `column` is how a column is named in the key's place, for messages.

    Raises:
        ConfigError: it has other tensors, computes otherwise with them, or has another vocabulary.
    """
    remedy = f"write its completions into a column of the prompts, and name that: {column}"
    if weight_shapes(weight_files(directory)) != weight_shapes(weight_files(policy)):
        raise ConfigError(f"{key} {directory}: its weights have other names or shapes than those of {policy}; {remedy}")
    if differing := _differing_architecture(directory, policy):
        raise ConfigError(f"{key} {directory}: its config.json has another {differing} than that of {policy}; {remedy}")
    if _vocabulary(directory) != _vocabulary(policy):
        raise ConfigError(f"{key} {directory}: its tokenizer has another vocabulary than that of {policy}; {remedy}")


def _differing_architecture(directory: Path, policy: Path) -> str | None:
    """A key of both config.json files whose values let the same weights compute something else, such as `rope_theta`."""
    ours, theirs = map(_architecture, (policy, directory))
    return next((key for key in sorted(ours.keys() & theirs.keys()) if ours[key] != theirs[key]), None)


def _architecture(directory: Path) -> dict[str, Any]:
    """The keys of config.json, without those that change nothing, and with those of the rotary embedding among them."""
    config = _read_object(f"model.path {directory}", directory / "config.json")
    rotary = {"rope_type": "default", **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    config |= {"rope_type" if key == "type" else key: value for key, value in rotary.items()}
    unused = NOT_ARCHITECTURE if config.get("use_sliding_window", True) else (*NOT_ARCHITECTURE, *OF_WINDOWS)
    return {key: value for key, value in config.items() if key not in unused and "dropout" not in key}


def _vocabulary(directory: Path) -> Any:
    """What tokenizer.json says of texts and their ids; None without that file."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = _read_object(f"model.path {directory}", path)
    added = [(token.get("id"), token.get("content")) for token in tokenizer.get("added_tokens") or []]
    return tokenizer.get("model"), added


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights.

    Raises:
        ConfigError: there are none, or a shard is missing.
    """
    where = f"model.path {directory}"
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        remedy = "convert them with from_pretrained(...).save_pretrained(...)"
        raise ConfigError(f"{where}: has no .safetensors weights; pickled ones are not loaded: {remedy}")
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole in found:
        others = [path.name for path in found if path != whole]
        if others or (index.exists() and f'"{whole.name}"' not in index.read_text(errors="replace")):
            other = printable(others[0]) if others else index.name
            raise ConfigError(
                f"{where}: has {whole.name} and {other}: the trainer would load the first, and the engine both or the "
                f"second; move {other} away, if the weights are those in {whole.name}"
            )
        return [whole]
    if not index.exists():
        raise ConfigError(
            f"{where}: has {found[0].name}, but neither model.safetensors nor {index.name}, which lists the shards; "
            "download it again, or save it again with save_pretrained(...)"
        )
    listed = _read_object(where, index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{where}/{index.name}: has no weight_map; download it again")
    shards = sorted({str(name) for name in listed.values()})
    for name in shards:
        if directory / name not in found:
            raise ConfigError(f"{where}: {printable(name)} is missing, which {index.name} lists; download it again")
    return [directory / name for name in shards]


def weight_shapes(files: Iterable[Path], *, refused: tuple[str, ...] = INTEGERS) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the files' headers. `refused`: how the types of quantized weights begin.

    Raises:
        ConfigError: a file that is not safetensors, or quantized weights.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    tensor = tensors.get_slice(name)
                    if name.endswith("weight") and (kind := tensor.get_dtype()).startswith(refused):
                        how = "integers" if kind.startswith(INTEGERS) else f"{kind}, and config.json does not say how,"
                        raise ConfigError(_quantized(f"model.path {file.parent}", f"{how} in {file.name}"))
                    shapes[name] = tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            problem = f"not a safetensors file ({error}); it was cut short, or is a Git LFS pointer"
            raise ConfigError(f"model.path {file}: {problem}: download it again") from None
    return shapes


def check_adapter_targets(
    directory: Path, targets: str | list[str], whole: Sequence[str] = (), *, tied: bool, merged: bool
) -> None:
    """Hold `dpo.adapter.target_modules` against the names of the checkpoint's weights.

    `whole` are the modules that are trained whole, and get no adapter.
    `tied`: config.json ties the output head to the embeddings. `merged`: adapters will be merged into the weights.

    Raises:
        ConfigError: a target that no module matches, that is no matrix, or a tied head that would have to be merged.
    """
    shapes = weight_shapes(weight_files(directory))
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return
    modules = {name.rpartition(".")[0] for name in shapes}
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)}
    containers = {module[:end] for module in modules for end, c in enumerate(module) if c == "."}
    headless = not any(module.endswith(HEADS) for module in modules)
    if headless:  # it is tied, and not stored
        matrices |= set(HEADS)
    key = "dpo.adapter.target_modules"
    offered = sorted({m.rpartition(".")[2] for m in matrices if adapted(m, "all-linear")})
    remedy = f"the linear modules are {', '.join(offered)}; all-linear takes all of them"
    try:
        for target in [targets] if isinstance(targets, str) else targets:
            one = target if isinstance(targets, str) else [target]
            chosen = {module for module in matrices | modules | containers if adapted(module, one)}
            if not chosen:
                raise ConfigError(f"{key} = {target!r}: the model has no such module; {remedy}")
            chosen = {module for module in chosen if not adapted(module, list(whole))}
            if wrong := sorted(chosen - matrices):
                raise ConfigError(f"{key} = {target!r}: {wrong[0]} is no matrix, and cannot be adapted; {remedy}")
            ends = [m for m in sorted(chosen) if m.endswith(HEADS) or f"{m}.weight".endswith(EMBEDDINGS)]
            if merged and ends and (tied or headless):
                raise ConfigError(
                    f"{key} = {target!r}: {ends[0]} is tied to another matrix of this model, so its adapter cannot be "
                    "merged into the weights for sampling; leave it out"
                )
        if not targets:
            raise ConfigError(f"{key} is empty: nothing would be trained; {remedy}")
    except re.error as error:
        raise ConfigError(f"{key} = {targets!r}: not a regular expression: {error}") from None


def adapted(module: str, target_modules: str | list[str]) -> bool:
    """Whether the module of this name gets an adapter, as PEFT decides it."""
    if isinstance(target_modules, str):
        if target_modules.lower() == "all-linear":
            return not f"{module}.weight".endswith(EMBEDDINGS + NOT_LINEAR)
        # the names in a file may lack the name of the model within the model with its head
        return any(re.fullmatch(target_modules, f"{above}{module}") for above in ("", "model.", "transformer."))
    return any(module == target or module.endswith(f".{target}") for target in target_modules)


def training_bytes(directory: Path, dpo: DPOConfig) -> tuple[int, int]:
    """Bytes of a round's policy, in the precision in which it is saved, and of the trainer's checkpoint besides;
    from the headers of the initial checkpoint in `directory`.
    """
    shapes = weight_shapes(weight_files(directory))
    saved, frozen = sum(map(math.prod, shapes.values())), 0
    if dpo.adapter is not None:
        frozen, targets = saved, dpo.adapter.target_modules  # the trainer's checkpoint has the frozen weights too
        whole = _whole(shapes, dpo.adapter.modules_to_save or [])
        matrices = {n.removesuffix(".weight"): s for n, s in shapes.items() if _is_matrix(n, s) and n not in whole}
        saved = dpo.adapter.r * sum(sum(shape) for module, shape in matrices.items() if adapted(module, targets))
        saved += sum(whole.values())
    policy = saved * (2 if dpo.policy_dtype == "bfloat16" else 4)
    return policy, 2 * policy + frozen * (2 if dpo.precision == "bf16" else 4)


def _whole(shapes: dict[str, tuple[int, ...]], modules: list[str]) -> dict[str, int]:
    """Numbers of weights that are trained whole beside an adapter. A head that is tied to the embeddings is saved too."""
    found = {n: math.prod(s) for n, s in shapes.items() if modules and adapted(n.rpartition(".")[0], modules)}
    embeddings = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith(EMBEDDINGS)}
    untied = any(name.endswith("lm_head.weight") for name in shapes)
    if not untied and ("lm_head" in modules or embeddings.keys() & found.keys()):
        found |= embeddings | {"lm_head.weight": sum(embeddings.values())}
    return found


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def _refuse_adapter(where: str, directory: Path) -> None:
    """An adapter is refused, also beside a config.json: transformers would load its base and the adapter over it."""
    path = directory / "adapter_config.json"
    if not path.exists():
        return
    base = printable(str(_read_object(where, path).get("base_model_name_or_path")))
    whole = [file.name for file in directory.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if whole:
        raise ConfigError(
            f"{where}: holds weights ({sorted(whole)[0]}) and an adapter of {base} (adapter_config.json), which would "
            "be loaded in their place; if the weights are merged ones, remove adapter_config.json and the adapter"
        )
    raise ConfigError(
        f"{where}: holds only an adapter of {base}; merge the two with peft's merge_and_unload(), or start from "
        f"{base} with dpo.adapter"
    )


def _read_object(where: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}/{path.name}: cannot be read: {error}; download it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}/{path.name}: holds a {type(found).__name__}, not an object; download it again")
    return found


def _check_code(where: str, directory: Path, config: dict[str, Any]) -> None:
    """The files with the checkpoint's own code are there."""
    own = config.get("auto_map") or {}
    for reference in own.values() if isinstance(own, dict) else []:
        module, _, _ = str(reference).rpartition(".")
        if module and "--" not in module and not (directory / f"{module}.py").is_file():
            raise ConfigError(f"{where}: config.json names {printable(module)}.py, which is missing; download it again")


def _refuse_quantized(where: str, directory: Path, config: dict[str, Any]) -> None:
    sections = [config, config.get("text_config") or {}]
    own = next((s[key] for s in sections for key in ("quantization_config", "compression_config") if s.get(key)), None)
    if own is None:
        beside = [
            name
            for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
            if (directory / name).exists()
        ]
        if beside:
            raise ConfigError(_quantized(where, beside[0]))
        return
    settings = own if isinstance(own, dict) else {}
    bits = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "unknown method"
    method = str(settings.get("quant_method") or settings.get("quant_algo") or bits)
    if method in DEQUANTIZED and (settings.get("dequantize") or not visible_gpus()):
        return
    raise ConfigError(_quantized(where, method))


def _quantized(where: str, how: str) -> str:
    return (
        f"{where}: its weights are quantized ({printable(how)}), and cannot be trained; give the checkpoint that they "
        "were made from. To save memory, dpo.adapter={quantize: nf4} keeps frozen weights in 4 bits"
    )


def _check_known(where: str, config: dict[str, Any]) -> None:
    """Refuse a type of model that transformers does not have."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(
            f"{where}/config.json: has no model_type; save the checkpoint again with save_pretrained(...)"
        )
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"{where}: transformers {__version__} has no causal language model of the type {printable(kind)!r}; install a "
            "version that has it, or give another checkpoint"
        )


def _check_weights(where: str, directory: Path, config: dict[str, Any], weights: list[Path]) -> None:
    text = config.get("text_config") or {}
    vocabulary, layers = (config.get(key, text.get(key)) for key in ("vocab_size", "num_hidden_layers"))
    there = -1
    described = any(section.get("quantization_config") for section in (config, text))
    for file in weights:
        for name, shape in weight_shapes([file], refused=INTEGERS if described else INTEGERS + SHORT).items():
            if found := LAYER.search(name):
                there = max(there, int(found[1]))
            if name.endswith(EMBEDDINGS) and vocabulary is not None and shape[0] != vocabulary:
                raise ConfigError(
                    f"{where}: {file.name} embeds {shape[0]:,} tokens ({name}), but config.json has vocab_size "
                    f"{vocabulary:,}; the files come from different models"
                )
    if isinstance(layers, int) and 0 <= there < layers - 1:
        raise ConfigError(
            f"{where}: has weights of {there + 1} layers, but config.json has num_hidden_layers {layers}: the others would "
            "be random; download it again"
        )
    if vocabulary is None:
        return
    if (directory / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"{where}/tokenizer.json: cannot be read: {error}; download it again") from None
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


def _check_shapes(where: str, directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Hold the weights against the model that config.json describes, which is built without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    except Exception as error:  # whatever a value in config.json leads to
        reason = printable(" ".join(str(error).split())[:300])
        raise ConfigError(
            f"{where}/config.json: transformers makes no model of it: {reason}; download it again"
        ) from None
    for name, tensor in model.state_dict().items():
        if shapes.get(name, shape := tuple(tensor.shape)) != shape:
            raise ConfigError(
                f"{where}: {name} has the shape {list(shapes[name])}, but config.json describes {list(shape)}; the files come "
                "from different models"
            )


def _check_generation(where: str, directory: Path) -> None:
    """Refuse settings for generation with which transformers does not load the model."""
    path = directory / "generation_config.json"
    if not path.exists():
        return
    from transformers import GenerationConfig
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of those that are only ignored it would say so
    try:
        GenerationConfig.from_dict(_read_object(where, path))
    except Exception as error:  # whatever a value leads to
        reason = printable(" ".join(str(error).split())[:200])
        raise ConfigError(f"{where}/{path.name}: transformers refuses it: {reason}; correct it there") from None
    finally:
        logging.set_verbosity(level)


def context_length(config: dict[str, Any]) -> int | None:
    """Longest sequence that the model takes, in tokens, if its configuration says."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [section.get(key) for section in (config, config.get("text_config") or {}) for key in keys]
    return next((length for length in found if isinstance(length, int)), None)

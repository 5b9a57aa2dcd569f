"""Whether a judge's model and the policy come from one base, so that the judge may like the policy's own habits.

Models favour what is like their own writing (arXiv:2404.13076), and a policy that is trained on such a judge's scores
is not held back where both err.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from iterdpo.run.sums import sha256_file

MODELS = ("model", "policy", "reference")
"""The arguments of judges that name a checkpoint, or a model at an endpoint."""
SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
TUNED = re.compile(
    r"(?:^|[-_.])(?:\d+(?:\.\d+)?(?:x\d+)?[bm]|instruct|chat|base|it|hf|sft|dpo|latest|preview|awq|gptq|gguf|fp8)"
    r"(?=$|[-_.])"
)
"""The first of these ends a base model's name: `qwen2.5-7b-instruct`."""
COMMON = {
    "model",
    "policy",
    "judge",
    "checkpoint",
    "output",
    "final",
    "initial",
    "reward",
    "rm",
    "my",
    "fake",
    "tiny",
    "merged",
}
"""Names of directories that tell nothing of what is in them."""


class _Model(NamedTuple):
    given: str
    bases: frozenset[str]
    tokenizer: str | None
    shape: tuple[Any, ...] | None


def shared_lineage(args: dict[str, Any], policy: str) -> str | None:
    """A sentence if a model in a judge's arguments and the policy are of one lineage; None if nothing shows it.

    Compared are the base names (`qwen2.5` of `Qwen/Qwen2.5-7B-Instruct`, also that in a checkpoint's configuration), and of
    local checkpoints the tokenizer's file and the shape of the network.
    """
    ours = _model(policy)
    for name in dict.fromkeys(_models_in(args)):
        theirs = _model(name)
        if reason := _reason(ours, theirs):
            return f"The judge's model {name} and the policy {policy} are of one lineage ({reason})."
    return None


def _reason(a: _Model, b: _Model) -> str | None:
    if os.path.realpath(os.path.expanduser(a.given)) == os.path.realpath(os.path.expanduser(b.given)):
        return "they are the same"
    common = [x for x in sorted(a.bases) for y in b.bases if _within(x, y) or _within(y, x)]
    if common:
        return f"by name both are {common[0]}"
    if a.tokenizer is not None and a.tokenizer == b.tokenizer:
        return "their tokenizers are the same file"
    if a.shape is not None and a.shape == b.shape:
        return f"their networks have the same shape, of the type {a.shape[0]}"
    return None


def _within(name: str, longer: str) -> bool:
    """Whether a base name is, or ends, another: `llama3.1` in `skyworkllama3.1`, but not `llama3` in it."""
    return re.search(rf"{re.escape(name)}(?![0-9.])", longer) is not None


def _models_in(args: Any) -> Iterator[str]:
    if isinstance(args, dict):
        named = (value for key, value in args.items() if key in MODELS)
        yield from (name for name in named if isinstance(name, str) and "\0" not in name)
        args = list(args.values())
    for value in args if isinstance(args, list | tuple) else []:
        yield from _models_in(value)


def _model(given: str) -> _Model:
    directory = Path(os.path.expanduser(given))
    config, adapter = (_object(directory / name) for name in ("config.json", "adapter_config.json"))
    names = [given, config.get("_name_or_path"), adapter.get("base_model_name_or_path")]
    bases = frozenset(base for name in names if isinstance(name, str) and (base := base_name(name)))
    file = directory / "tokenizer.json"
    tokenizer = sha256_file(file) if os.path.isfile(file) else None
    values = tuple(config.get(key) for key in SHAPE)
    return _Model(given, bases, tokenizer, values if None not in values else None)


def base_name(model: str) -> str | None:
    """`qwen2.5` of `Qwen/Qwen2.5-7B-Instruct`; None of a name that tells no base, such as `my-rm` or `policy`."""
    name = model.rstrip("/").rpartition("/")[2].casefold().removeprefix("meta-")
    parts = re.split(r"[-_ ]+", TUNED.split(name, maxsplit=1)[0])
    base = "".join(part for part in parts if part not in COMMON)
    return base if len(base) >= 4 and re.match(r"[a-z]{3}", base) else None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

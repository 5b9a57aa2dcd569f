"""Writes docs/configuration.md from the models in `iterdpo.config`.

python tools/configuration_docs.py            write it
python tools/configuration_docs.py --check    exit with status 1 where it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from iterdpo.config import (
    LOSSES,
    AdapterConfig,
    Config,
    DPOConfig,
    JudgeConfig,
    OfflineConfig,
    RuleConfig,
    SupervisionConfig,
    TagsConfig,
)

BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

HEADER = """\
# Configuration

<!-- Written by tools/configuration_docs.py from iterdpo/config.py: edit the fields there, and run it again. -->

A configuration is one or more YAML files, merged left to right, then `dotted.key=value` overrides, whose values are
read as YAML. Mappings of files merge key by key; everything else, lists included, is replaced. An override replaces all
that its key holds: `judge.args={}` removes the arguments that a file gives.

```
iterdpo run base.yaml site.yaml dpo.beta=0.2 prompts.heldout=256
```

An unknown key, a missing one and a value out of range are refused before anything is loaded. Relative paths start at
the current directory, and `~` is the home directory.

There are two kinds of configuration: [`iterdpo run` and `iterdpo serve`](#iterdpo-run) read rounds of iterative DPO,
[`iterdpo train`](#iterdpo-train) reads one offline round. Complete files are in [configs](../configs). For
`iterdpo judge check`, `compare` and `try`, a file with the section `judge` alone is enough; it may also have
`evaluation.judge` and `model`.
"""


def write_page(name: str, text: str) -> None:
    """Command line of a script: write `text` to docs/`name`, or to a path; `--check` is status 1 if that is not there."""
    parser = argparse.ArgumentParser(description=f"Write docs/{name}.")
    page = Path(__file__).parents[1] / "docs" / name
    parser.add_argument("path", nargs="?", type=Path, default=page, help=f"another file than docs/{name}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if it is out of date")
    arguments = parser.parse_args()
    if not arguments.check:
        arguments.path.write_text(text, encoding="utf-8")
    elif not arguments.path.exists() or arguments.path.read_text(encoding="utf-8") != text:
        sys.exit(f"{arguments.path}: out of date; run python tools/{Path(sys.argv[0]).name}")


def render() -> str:
    """The page."""
    run, train = dict(sections(Config)), dict(sections(OfflineConfig))
    parts = [HEADER, "## iterdpo run", *(part for key, model in run.items() for part in section(key, model))]
    parts += ["## iterdpo train"]
    for key, model in train.items():
        above = [f"### {key}", f"As [above](#{key.replace('.', '')})."]
        parts += above if run.get(key) is model else section(key, model)
    parts += ["One round has one reference, the initial policy: `reference` has no effect, unless it is `none`."]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def sections(model: type[BaseModel], key: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections of a configuration by dotted key, the outermost ("") first."""
    yield key, model
    for name, field in model.model_fields.items():
        nested = section_of(field)
        if nested is not None and is_own_section(field):
            yield from sections(nested, f"{key}.{name}".lstrip("."))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, `Section | None` too."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind not in LOSSES.values()]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def is_own_section(field: FieldInfo) -> bool:
    """Whether the field gets a table. A second judge is a row, which names the section that it is like; so are tags."""
    if section_of(field) is TagsConfig:
        return False
    return NoneType not in get_args(field.annotation) or section_of(field) is not JudgeConfig


def section(key: str, model: type[BaseModel]) -> list[str]:
    """A heading and a table of keys."""
    fields = {k: field for k, field in model.model_fields.items() if not (section_of(field) and is_own_section(field))}
    table = "\n".join(
        ["| key | value | default | meaning |", "| --- | --- | --- | --- |", *map(row, fields, fields.values())]
    )
    if not key:
        return [f"{model.__doc__}", table]
    if model is DPOConfig:
        return [f"### {key}", table, *loss_section(model.model_fields["loss"])]
    return [f"### {key}", *_optional(key, model), table]


def _optional(key: str, model: type[BaseModel]) -> list[str]:
    """What an optional section, or one of a list, is for: its own docstring, and that of the key."""
    if model in (RuleConfig, SupervisionConfig):
        return [" ".join(f"{model.__doc__}".split())]
    owner = Config
    *above, last = key.split(".")
    for part in above:
        owner = section_of(owner.model_fields[part]) if part in owner.model_fields else None
    field = owner.model_fields.get(last) if owner is not None else None
    if field is None or NoneType not in get_args(field.annotation):
        return []
    if model is AdapterConfig:
        return [f"{model.__doc__} `null` unless given."]
    said = [" ".join(text.split()) for text in (field.description, model.__doc__) if text]
    return [" ".join([*said, "`null` unless given."])]


def loss_section(field: FieldInfo) -> list[str]:
    """The section `dpo.loss`, with a row for each key that some loss has."""
    names: dict[type[BaseModel], list[str]] = {}
    for name, model in LOSSES.items():
        names.setdefault(model, []).append(f"`{name}`")
    rows = [
        f"| {', '.join(of)} {row(key, value)}"
        for model, of in names.items()
        for key, value in model.model_fields.items()
        if key != "type"
    ]
    plain = ", ".join(", ".join(of) for model, of in names.items() if list(model.model_fields) == ["type"])
    return [
        "### dpo.loss",
        " ".join((field.description or "").split()),
        "A bare name takes the loss's defaults: `loss: ipo`. With keys it is a mapping: `loss: {type: simpo, gamma: 0.8}`. "
        "Overrides do either: `dpo.loss=ipo` replaces the whole loss, `dpo.loss.gamma=0.8` changes one key of it. A key "
        "of another loss is refused.",
        "\n".join(["| type | key | value | default | meaning |", "| --- | --- | --- | --- | --- |", *rows]),
        f"No keys of their own: {plain}.",
    ]


def row(name: str, field: FieldInfo) -> str:
    if name == "loss":
        return "| `loss` | name, or mapping | `sigmoid` | The objective: see [dpo.loss](#dpoloss). |"
    assert field.description, f"{name} has no docstring"
    default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
    cells = [f"`{name}`", value_of(field), default, " ".join(field.description.split())]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def value_of(field: FieldInfo) -> str:
    """What the field takes: `integer, ≥ 1`."""
    kinds = get_args(field.annotation) if NoneType in get_args(field.annotation) else (field.annotation,)
    named = " or ".join(kind_name(kind) for kind in kinds if kind is not NoneType)
    optional = ["or null"] if NoneType in kinds else []
    return ", ".join([named, *bounds(field.metadata), *optional])


def bounds(metadata: Iterable[Any]) -> list[str]:
    signs = [(sign, getattr(m, name)) for m in metadata for name, sign in BOUNDS.items() if hasattr(m, name)]
    return [f"{sign} {bound:g}" for sign, bound in signs]


def kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return ", ".join([kind_name(inner), *bounds(m for part in more for m in getattr(part, "metadata", ()))])
    if get_origin(kind) is tuple:
        return f"list of {len(get_args(kind))} numbers"
    if get_origin(kind) is list:
        return f"list of {kind_name(get_args(kind)[0])}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(kind_name, get_args(kind)))
    if get_origin(kind) is dict:
        return "mapping"
    if kind is TagsConfig:
        return "mapping of " + " and ".join(f"`{name}`" for name in TagsConfig.model_fields)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        name = next(key for key, model in sections(Config) if model is kind)
        return f"like [`{name}`](#{name})"
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}[kind]


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value


if __name__ == "__main__":
    write_page("configuration.md", render())

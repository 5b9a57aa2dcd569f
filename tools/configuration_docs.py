"""Writes docs/configuration.md from the models in `iterdpo.config`.

    python tools/configuration_docs.py [PATH]            write it
    python tools/configuration_docs.py --check [PATH]    exit with status 1 where it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from iterdpo.config import Config, OfflineConfig

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
SYMBOLS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

HEADER = """\
# Configuration

<!-- Written by tools/configuration_docs.py from iterdpo/config.py. Edit the field there, then run the script. -->

A configuration is one or more YAML files, merged left to right, then `dotted.key=value` overrides. A value of an
override is read as YAML. Mappings merge key by key; anything else, lists included, is replaced.

```
iterdpo run base.yaml site.yaml dpo.beta=0.2 prompts.heldout=256
```

An unknown key, a missing one, and a value out of range are refused before anything is loaded. Paths are relative to
the current directory, and a leading `~` is the home directory. YAML reads `1e-6` as text, and it is accepted as a
number all the same.

Two kinds of configuration share these sections: [`iterdpo run` and `iterdpo serve`](#iterdpo-run) take rounds of
iterative DPO, [`iterdpo train`](#iterdpo-train) takes one offline round. Complete files are in
[configs](../configs).
"""

SHARED = "`iterdpo train` reads this section too."


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md from the models in iterdpo.config.")
    parser.add_argument("path", nargs="?", type=Path, default=TARGET)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 where it is out of date")
    arguments = parser.parse_args()
    text = render()
    if not arguments.check:
        arguments.path.write_text(text, encoding="utf-8")
        return 0
    if arguments.path.exists() and arguments.path.read_text(encoding="utf-8") == text:
        return 0
    print(f"{arguments.path}: out of date; run python tools/configuration_docs.py", file=sys.stderr)
    return 1


def render() -> str:
    """The whole page."""
    run, train = dict(sections(Config)), dict(sections(OfflineConfig))
    parts = [HEADER, "## iterdpo run\n", intro(Config)]
    parts += [section(key, model, shared=train.get(key) is model) for key, model in run.items()]
    parts += ["## iterdpo train\n", intro(OfflineConfig)]
    known = [key for key in train if run.get(key) is train[key]]
    links = ", ".join(f"[`{key}`](#{key})" for key in known)
    parts.append(f"The sections {links} are those above. `dpo.reference` has no effect in a single round.\n")
    parts += [section(key, model) for key, model in train.items() if key not in known]
    return "\n".join(parts)


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a configuration names, as (dotted key, model), each before those inside it."""
    for name, field in model.model_fields.items():
        nested = section_of(field)
        if nested is not None and not field.description:
            yield f"{prefix}{name}", nested
        elif nested is not None and nested not in dict(sections_seen(model)).values():
            yield f"{prefix}{name}", nested


def table(model: type[BaseModel], prefix: str) -> str:
    """A row for each key of `model`."""


def section_of(field: FieldInfo) -> type[BaseModel] | None: ...

"""ARCHITECTURE.md says what the code does: the path of a pair, the rooms, the walls, the files to touch."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text below a heading, up to the next of the same or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    _, _, rest = PAGE.partition(f"\n{heading}\n")
    assert rest, f"no heading {heading!r}"
    return re.split(rf"\n#{{1,{level}}} ", rest)[0]


def cells(text: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-: ")]


def defined(path: Path) -> set[str]:
    """Names of functions and classes of a module, methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


PATH = [
    (file.strip("`"), re.findall(r"`([\w.]+)`", functions))
    for _, file, functions, _ in cells(section("## The path of a pair"))[1:]
]


@pytest.mark.parametrize(("file", "functions"), PATH)
def test_the_path_of_a_pair_names_functions_that_exist(file: str, functions: list[str]) -> None:
    assert functions
    assert set(functions) <= defined(ROOT / file)


def test_the_path_of_a_pair_enters_at_most_twelve_files_each_at_most_twice() -> None:
    files = [file for file, _ in PATH]
    assert len(set(files)) <= 12
    assert max(map(files.count, files)) <= 2


def test_the_walls_are_those_that_the_linter_holds() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    drawn = re.search(r"```\n(flows\njudges\n.*?)```", section("## Walls"), re.DOTALL)
    assert drawn
    lines = [re.split(r"\s+[|:]\s+|\s+", line.strip()) for line in drawn[1].splitlines()]
    held = [c for c in settings["contracts"] if c["type"] == "layers"]
    outer, inner = ([re.split(r"\s+[|:]\s+", layer) for layer in c["layers"]] for c in held)
    assert lines[:2] == outer[:2] == [["flows"], ["judges"]]
    assert lines[2:] == [[f"iterdpo.{room}" for room in layer] for layer in inner]


def test_every_room_of_iterdpo_is_behind_a_wall() -> None:
    drawn = set(re.findall(r"iterdpo\.(\w+)", section("## Walls")))
    there = {p.stem for p in (ROOT / "iterdpo").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert drawn == there - {"__init__"}


def test_every_module_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:iterdpo|judges|flows|tests|tools)/[\w/]+\.py)`", PAGE))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_no_cell_of_a_table_is_longer_than_200_characters() -> None:
    assert [cell for row in cells(PAGE) for cell in row if len(cell) > 200] == []

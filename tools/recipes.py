"""Writes the table of recipes in README.md from the files in configs/recipes.

python tools/recipes.py            write it
python tools/recipes.py --check    exit with status 1 if it is out of date

A recipe begins with a comment: its title on the first line, and its source after `# Source: `.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from iterdpo.config import Config, load_any_config

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- recipes: written by tools/recipes.py -->\n", "<!-- end of recipes -->\n"
HEAD = "| recipe | model | judge or data | loss | source |\n| --- | --- | --- | --- | --- |\n"
ADDRESS = re.compile(r"arXiv:(\d{4}\.\d{5})|github\.com/([\w-]+/[\w.-]+)")


def recipes() -> list[Path]:
    return sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


def title(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")


def source(path: Path) -> str:
    """The text after `# Source: `, as one line."""
    _, found, rest = path.read_text().partition("# Source: ")
    if not found:
        raise ValueError(f"{path}: has no line that begins with # Source:")
    lines = rest.split("\n")
    more = [line.removeprefix("#   ") for line in lines[1:] if line.startswith("#   ")]
    return " ".join([lines[0], *more])


def row(path: Path) -> str:
    config = load_any_config(path)
    loss: Any = config.dpo.loss
    links = [
        f"[{paper}](https://arxiv.org/abs/{paper})" if paper else f"[{repository}](https://github.com/{repository})"
        for paper, repository in dict.fromkeys(ADDRESS.findall(source(path)))
    ]
    asked = f"`{config.judge.use}`" if isinstance(config, Config) else config.data.path
    cells = [
        f"[{title(path)}](configs/recipes/{path.name})",
        config.model.path,
        asked,
        f"`{loss.type}`, beta {config.dpo.beta:g}",
        ", ".join(links),
    ]
    return f"| {' | '.join(cells)} |\n"


def written(page: str) -> str:
    """The page with the present table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError("README.md has no place for the table of recipes")
    return f"{before}{BEGIN}{HEAD}{''.join(map(row, recipes()))}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of recipes in README.md.")
    parser.add_argument("path", nargs="?", type=Path, default=ROOT / "README.md", help="another file than README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if it is out of date")
    arguments = parser.parse_args()
    page = arguments.path.read_text(encoding="utf-8")
    if not arguments.check:
        arguments.path.write_text(written(page), encoding="utf-8")
    elif page != written(page):
        sys.exit(f"{arguments.path}: out of date; run python tools/recipes.py")


if __name__ == "__main__":
    main()

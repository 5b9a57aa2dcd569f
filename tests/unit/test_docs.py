"""The documentation is current: generated pages, links, the code in docs/judges.md, rows and tables."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
import yaml

from iterdpo.config import LOSSES, Config, DataConfig, SentinelsConfig, merge
from iterdpo.data.preferences import PreferenceData
from iterdpo.evaluation.metrics import unmeasured
from judges.llm.server import ServerSettings
from judges.llm.settings import Endpoint
from judges.load import BUILT_IN

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPT = ROOT / "tools" / "configuration_docs.py"


def configuration_docs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_the_configuration_reference_is_what_the_models_say() -> None:
    result = configuration_docs("--check")
    assert result.returncode == 0, result.stderr


def test_an_outdated_configuration_reference_is_noticed_and_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "configuration.md"
    assert configuration_docs("--check", str(page)).returncode == 1
    assert not page.exists()
    assert configuration_docs(str(page)).returncode == 0
    assert page.read_text() == (ROOT / "docs" / "configuration.md").read_text()
    page.write_text(page.read_text().replace("`0.1`", "`0.2`"))
    assert configuration_docs("--check", str(page)).returncode == 1


def test_the_dockerfile_installs_as_the_readme_says() -> None:
    install = re.search(r"^RUN pip install --no-cache-dir (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert install
    assert f"pip install {install[1]}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in links(page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        assert not path or (page.parent / path).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_to_a_heading_has_one(page: Path) -> None:
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def test_the_code_in_the_page_about_judges_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that begin with `# my_judges.py` are that file; the others run in order, in its directory."""
    blocks = python_blocks((ROOT / "docs" / "judges.md").read_text(encoding="utf-8"))
    file = [block for block in blocks if block.startswith("# my_judges.py\n")]
    assert len(file) >= 5
    (tmp_path / "my_judges.py").write_text("\n\n".join(file), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, object] = {}
    for block in blocks:
        if block not in file:
            exec(compile(block, "docs/judges.md", "exec"), namespace)


def test_every_example_in_the_page_about_evaluation_is_a_configuration() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        whole = {"run_dir": "r", "model": {"path": "m"}, "prompts": {"path": "p"}, "judge": {"use": "j:j"}}
        config = Config.model_validate(merge(whole, yaml.safe_load(block)))
        for _, metric in config.gate.metrics():
            judge = config.evaluation.judge is not None
            known = {"references": True, "other_model": config.evaluation.against is not None}
            assert unmeasured(metric, heldout_judge=judge, thinking=False, completions=1, **known) is None
    assert len(blocks) >= 4


def test_every_example_row_in_the_page_about_data_is_read_as_the_format_of_its_heading(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    seen = set()
    for heading, section in re.findall(r"^### (\w+)$(.*?)(?=^##)", page, flags=re.DOTALL | re.MULTILINE):
        for block in re.findall(r"^```json\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE):
            (tmp_path / "rows.jsonl").write_text(block, encoding="utf-8")
            data = PreferenceData(str(tmp_path / "rows.jsonl"))
            rows = [pair for batch in data.parsed() for pair in batch]
            assert data.format == heading
            assert len(rows) == block.count("\n") == data.account.rows
            seen.add(heading)
    assert seen == set(get_args(DataConfig.model_fields["format"].annotation)) - {"auto"}


def test_every_reason_for_leaving_a_row_out_is_in_the_page_about_data() -> None:
    from iterdpo.data import preferences

    names = "DIVERGE EMPTY IDENTICAL IDENTICAL_TOKENS NO_PROMPT OTHER_PROMPT NO_TRANSCRIPT NO_LAST_TURN USERS_TURN"
    names += " NO_ASSISTANT NOT_LAST NO_MARGIN IDENTICAL_ANSWERS NO_ANSWER"
    known = {getattr(preferences, name).format("...") for name in names.split()}
    assert known == reasons_in("Rows that are left out")


def reasons_in(heading: str) -> set[str]:
    """The first column of the table in a section of the page about data."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    reasons = [row.split(" | ")[0].removeprefix("| ") for row in section.splitlines() if row.startswith("| ")]
    return {reason for reason in reasons[1:] if not reason.startswith("-")}


def test_every_reason_why_a_row_cannot_be_used_is_in_the_page_about_data() -> None:
    found = set()
    for file in (ROOT / "iterdpo" / "data").glob("*.py"):
        module = import_module(f"iterdpo.data.{file.stem}")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "RowError":
                reason = eval(ast.unparse(call.args[1]), {**vars(module), "column": "..."})
                found.add(reason.replace("'...'", "..."))
    assert found == reasons_in("Rows that cannot be used")


def test_the_table_of_losses_has_every_loss_once() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    _, _, behind = page.partition("| `dpo.loss` |")
    table, _, _ = behind.partition("\n\n")
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == sorted(LOSSES)


def test_the_table_of_sentinels_has_each_with_its_default_action() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    _, _, behind = page.partition("| sentinel |")
    table, _, _ = behind.partition("\n\n")
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \|$", table, flags=re.MULTILINE)
    actions = {n.removesuffix("_action"): v for n, v in SentinelsConfig() if n.endswith("_action")}
    assert dict(rows) == {"non_finite": SentinelsConfig().non_finite, **actions}


def test_the_table_of_judges_arguments_has_each_once_with_its_default() -> None:
    page = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    table = page.partition("| judge | argument | default | meaning |")[2]
    rows = re.findall(r"^\| (`.*?`) \| `(\w+)` \| (?:`(.*)`|required) \|", table, flags=re.MULTILINE)
    written = sorted(
        (judge, argument, yaml.safe_load(default) if default else "required")
        for judges, argument, default in rows
        for judge in re.findall(r"\w+", judges)
    )
    code = [
        (use, p.name, "required" if p.default is p.empty else p.default)
        for use, place in BUILT_IN.items()
        for p in inspect.signature(
            attrgetter(place.partition(":")[2])(import_module(place.partition(":")[0]))
        ).parameters.values()
    ]
    for name, model in (("endpoint", Endpoint), ("serve", ServerSettings)):
        code += [(name, n, f.get_default(call_default_factory=True)) for n, f in model.model_fields.items()]
    plain = ((j, a, list(default) if isinstance(default, tuple) else default) for j, a, default in code)
    assert written == sorted(plain, key=lambda row: row[:2])


def test_the_page_about_judges_lists_its_sections_and_has_no_long_table_cell() -> None:
    page = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    contents = page.partition("\n## ")[0]
    for heading in re.findall(r"^## (.+)$", page, flags=re.MULTILINE):
        assert f"[{heading}](#" in contents
    cells = [c for line in page.splitlines() if line.startswith("|") for c in re.split(r" \| ", line.strip("| "))]
    assert max(map(len, cells)) <= 200


def links(text: str) -> Iterator[str]:
    """Relative targets of the links and images outside code."""
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for target in re.findall(r"\]\(([^()\s]+)[^()]*\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(
        r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)

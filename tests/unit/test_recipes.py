"""Recipes for real models: each loads, names its source, and passes a dry run with a small model in place of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from iterdpo.config import Config, load_any_config
from tools.recipes import ADDRESS, ROOT, recipes, source, title, written

NAMED = {
    *("rlhflow", "sppo", "spin", "zephyr", "tulu3", "olmo3-instruct", "olmo3-think", "rlmt", "delta-learning"),
    *("iterative-rpo", "dpo-vp", "self-rewarding", "rlaif-constitution", "dpo-hh", "dpo-tldr"),
}
COLUMNS = {"completion": "Once.", "llama-3.2-3b-instruct": "Then.", "answer": "It is #### 4", "gold": "4"}


def test_every_recipe_that_the_readme_promises_is_there() -> None:
    assert {name for name in NAMED for path in recipes() if path.name.startswith(name)} == NAMED


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_a_recipe_names_its_source_and_its_run_directory_is_its_own(path: Path) -> None:
    assert ADDRESS.search(source(path))
    assert len(title(path)) < 80
    assert Path(load_any_config(path).run_dir).name == path.stem


def test_the_table_in_the_readme_is_made_from_the_recipes(tmp_path: Path) -> None:
    script = ROOT / "tools" / "recipes.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text().replace("beta 5", "beta 6"))
    assert subprocess.run([sys.executable, str(script), "--check", str(page)], capture_output=True).returncode == 1
    assert written(page.read_text()) == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_a_recipe_passes_a_dry_run_with_a_small_model(
    path: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    shutil.copytree(tiny_model, tmp_path / "model")
    config = load_any_config(path)
    overrides = ["model.path=model", f"run_dir={tmp_path / 'run'}"]
    pairs = [{"prompt": f"Tale {i}", "chosen": "yes", "rejected": "no"} for i in range(600)]
    if isinstance(config, Config):
        prompts = [{config.prompts.column: f"Tale {i}", "column": i, **COLUMNS} for i in range(40)]
        file = write(tmp_path / "prompts.jsonl", prompts)
        overrides += [f"prompts.path={file}", "prompts.per_round=8", "prompts.heldout=4", "prompts.split=train"]
        overrides += ["sampling.max_tokens=16"]
        if config.prompts.reuse is False:
            overrides += ["rounds=2"]
        if config.pairing.offline is not None:
            overrides += [f"pairing.offline.path={write(tmp_path / 'pairs.jsonl', pairs)}"]
    else:
        if config.data.format == "hh":
            pairs = [
                {
                    "chosen": f"\n\nHuman: Tale {i}\n\nAssistant: yes",
                    "rejected": f"\n\nHuman: Tale {i}\n\nAssistant: no",
                }
                for i in range(600)
            ]
        overrides += [f"data.path={write(tmp_path / 'pairs.jsonl', pairs)}", "data.heldout=8"]
    with pytest.raises(SystemExit) as ended:
        main(["run" if isinstance(config, Config) else "train", str(path), "--dry-run", *overrides])
    out = capsys.readouterr()
    assert ended.value.code in (0, None), out.err
    assert "optimizer steps" in out.out
    assert not (tmp_path / "run").exists()


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

"""Twelve mistakes that people make: each gives one clear message, before an engine starts and before vLLM is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.api import open_run
from flows.cli import main
from iterdpo.config import Config, parse_config
from iterdpo.errors import JudgeError
from iterdpo.run.rundir import RunDir


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(40)))
    (tmp_path / "judge.py").write_text("def score(prompt, completion):\n    return len(completion)\n")
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_round": 8, "heldout": 4},
        "sampling": {"max_tokens": 16},
        "judge": {"use": f"{tmp_path / 'judge.py'}:score"},
    }


@pytest.fixture(autouse=True)
def no_engine(config: dict[str, Any]) -> Iterator[None]:
    yield
    assert "vllm" not in sys.modules
    log = Path(config["run_dir"]) / "logs" / "sampler.log"  # the worker may have begun to import vLLM
    assert not log.exists() or "LLM engine" not in log.read_text()


def message(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What `iterdpo run` prints about a configuration that cannot run."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as exit:
        main(["run", str(path), *overrides, "--no-prefect"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("iterdpo: ")
    assert "Traceback" not in error
    return error


def test_a_missing_model(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = message(config, tmp_path, capsys, f"model.path={tmp_path / 'no-model'}")
    assert "model.path" in error
    assert "no such directory" in error


def test_a_wrong_column(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = message(config, tmp_path, capsys, "prompts.column=promt")
    assert "prompts.jsonl" in error
    assert "'promt'" in error
    assert "prompt" in error.split("'promt'")[1]  # what there is


def test_an_unknown_key(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = message(config, tmp_path, capsys, "dpo.learning_rat=1e-5")
    assert "unknown key 'dpo.learning_rat'" in error
    assert "did you mean 'learning_rate'?" in error


def test_a_negative_beta(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dpo.beta = -0.1: input should be greater than 0" in message(config, tmp_path, capsys, "dpo.beta=-0.1")


def test_a_prompt_longer_than_the_context(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Tale {i}"} for i in range(40)] + [{"prompt": "x" * 600}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["prompts"] |= {"per_round": 18, "heldout": 5}  # all 41 are used in two rounds
    error = message(config, tmp_path, capsys, "rounds=2")
    assert "has 600 tokens, but 496 fit" in error  # 512 of the model less 16 to sample


def test_an_empty_prompt_file(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    error = message(config, tmp_path, capsys)
    assert "prompts.jsonl" in error
    assert "no rows in it" in error


def test_a_jsonl_file_with_a_broken_line(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "prompts.jsonl", "a") as file:
        file.write('{"prompt": "cut off\n')
    error = message(config, tmp_path, capsys)
    assert "prompts.jsonl:41" in error
    assert "JSON" in error


def test_a_judge_path_with_a_typo(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = message(config, tmp_path, capsys, f"judge.use={tmp_path / 'jugde.py'}:score")
    assert "jugde.py" in error
    error = message(config, tmp_path, capsys, f"judge.use={tmp_path / 'judge.py'}:scor")
    assert "'scor'" in error
    assert "score" in error


def test_a_column_that_the_judge_asks_for_and_the_prompts_lack(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function = "def score(prompt, completion, gold):\n    return gold in completion\n"
    in_a_class = (
        "class Gold:\n    def score(self, completion, gold):\n        return gold in completion\nscore = Gold\n"
    )
    for source, name in ((function, "score"), (in_a_class, "Gold")):
        (tmp_path / "judge.py").write_text(source)
        error = message(config, tmp_path, capsys, f"judge.use={tmp_path / 'judge.py'}:{name}")
        assert "asks for a column 'gold' that the prompts do not have" in error


def test_a_heldout_judge_may_read_a_column_that_only_the_heldout_prompts_have(
    config: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Song {i}", "gold": "x"} for i in range(4)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gold.py").write_text("def score(completion, gold):\n    return gold in completion\n")
    config["prompts"]["heldout_path"] = str(tmp_path / "heldout.jsonl")
    reads_gold = {"use": f"{tmp_path / 'gold.py'}:score"}
    open_run(parse_config(Config, {**config, "evaluation": {"judge": reads_gold}}))
    with pytest.raises(JudgeError, match="asks for a column 'gold'"):
        open_run(parse_config(Config, {**config, "judge": reads_gold}))


def test_a_run_directory_that_cannot_be_written(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    error = message(config, tmp_path, capsys, f"run_dir={tmp_path / 'file' / 'run'}")
    assert "run_dir" in error
    assert "cannot be written" in error


def test_two_runs_on_one_directory(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDir(config["run_dir"]).lock():
        error = message(config, tmp_path, capsys)
    assert f"in use by process {os.getpid()}" in error


def test_one_completion_a_prompt(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = message(config, tmp_path, capsys, "sampling.n=1")
    assert "sampling.n = 1: input should be greater than or equal to 2" in error


def test_a_checkpoint_with_the_wrong_vocabulary(
    config: dict[str, Any], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": 200}))
    error = message(config, tmp_path, capsys, f"model.path={model}")
    assert "embeds 259 tokens" in error
    assert "vocab_size 200" in error


def test_the_plan_of_a_dry_run_has_the_numbers(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as exit:
        main(["run", str(path), "--dry-run"])
    assert exit.value.code == 0
    plan = capsys.readouterr().out
    assert "36 to train on, 4 held out; 8 a round" in plan
    assert "32 a round and 4 an evaluation; 112 in all" in plan  # 3 * 8 * 4 + 4 * 4
    assert "next: round-000/evaluation" in plan
    assert "at most 1 optimizer steps a round of 8 pairs" in plan


def test_overrides_may_stand_behind_options(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as exit:
        main(["run", str(path), "--dry-run", "rounds=2"])
    assert exit.value.code == 0
    assert "2; next: round-000/evaluation" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["run", str(path), "--dry-rnu", "rounds=2"])
    assert exit.value.code == 2
    assert "--dry-rnu" in capsys.readouterr().err


def test_the_command_prints_one_line_for_a_mistake_that_is_found_last(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "sampling": {"max_tokens": 508}}))  # found last: by tokenizing
    result = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "4 fit" in result.stderr
    assert len(result.stderr.splitlines()) == 1

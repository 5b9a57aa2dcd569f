"""Cards of runs that differ; tests/unit/flows/test_export.py has the whole card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from iterdpo.report.card import pairs_card, policy_card
from iterdpo.run.read import read_run
from iterdpo.run.rundir import RunDir

CONFIG: dict[str, Any] = {
    "rounds": 1,
    "seed": 3,
    "model": {"path": "owner/model"},
    "prompts": {"path": "p.jsonl", "per_round": 2048},
    "judge": {"use": "math"},
    "dpo": {"loss": "ipo", "beta": 0.25},
    "gate": {"metric": "score/train_judge", "minimum": 0},
}


def card(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    run = RunDir(tmp_path)
    run.write_config({**CONFIG, **changes})
    _, front, text = policy_card(read_run(tmp_path), 1, adapter=False, dtype="bfloat16").split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_hub_id_is_the_base_model_of_the_card(tmp_path: Path) -> None:
    front, text = card(tmp_path)
    assert front["base_model"] == "owner/model"
    assert "trained from owner/model with iterative DPO (loss `ipo`, beta 0.25; bfloat16)" in text
    assert "| prompts | p.jsonl, 2,048 a round |" in text
    assert "held-out judge |" not in text


def test_a_directory_is_named_by_its_last_part_and_is_no_base_model(tmp_path: Path) -> None:
    front, text = card(tmp_path, model={"path": "/srv/secret/my-model/"})
    assert "base_model" not in front
    assert "trained from my-model with" in text
    assert "/srv" not in text


def test_an_offline_round_names_its_data(tmp_path: Path) -> None:
    config = {name: CONFIG[name] for name in ("model", "dpo", "seed")}
    RunDir(tmp_path).write_config({**config, "data": {"path": "data/pairs.jsonl", "heldout": 0}})
    text = policy_card(read_run(tmp_path), 1, adapter=True, dtype="float32")
    assert "with an offline round" in text
    assert "| pairs from | pairs.jsonl |" in text


@pytest.mark.parametrize("name", ["a|b", "<img src=x>", "two\nlines", "\x1b[31m"])
def test_a_name_cannot_break_the_table(tmp_path: Path, name: str) -> None:
    _, text = card(tmp_path, judge={"use": f"{name}.py"})
    [line] = [line for line in text.splitlines() if line.startswith("| training judge")]
    assert line.replace("\\|", "").count("|") == 3
    assert "<img" not in line
    assert line.isprintable()


def test_pairs_of_a_round_that_is_not_decided_have_a_card(tmp_path: Path) -> None:
    RunDir(tmp_path).write_config(CONFIG)
    assert "The preference pairs of round 1" in pairs_card(read_run(tmp_path), 1, tmp_path)

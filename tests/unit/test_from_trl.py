"""The table of TRL's keys: complete, true of the configuration, in the page and in messages."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from iterdpo.config import LOSSES, Config, OfflineConfig, dotted_keys, parse_config
from iterdpo.errors import ConfigError
from iterdpo.from_trl import KEYS, SECTIONS
from iterdpo.from_trl import LOSSES as OTHER_NAMES

ROOT = Path(__file__).parents[2]
OURS = {*dotted_keys(Config), *dotted_keys(OfflineConfig)}
OFFLINE = {"run_dir": "runs/x", "model": {"path": "m"}, "data": {"path": "d.jsonl"}}


@pytest.mark.parametrize("name", ["DPOConfig", "ModelConfig", "ScriptArguments"])
def test_every_key_of_trl_is_in_the_table(name: str) -> None:
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(getattr(trl, name))}
    assert fields - KEYS.keys() == set()


def test_every_loss_of_trls_trainer_is_one_of_ours() -> None:
    from typing import Any

    trl: Any = pytest.importorskip("trl")
    field = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}["loss_type"]
    named = set(field.metadata["help"].split("Possible values are: ")[1].split(". If ")[0].strip("`").split("`, `"))
    names = {name.strip("'") for name in named}
    assert "aot_unpaired" in names
    assert names - LOSSES.keys() == set()


def test_a_key_stands_in_one_section_and_its_equivalents_are_keys_of_the_configuration() -> None:
    assert sum(map(len, SECTIONS.values())) == len(KEYS)
    assert {key for found in KEYS.values() for key in found.keys} - OURS == set()
    assert all(found.keys or found.note for found in KEYS.values())
    assert set(OTHER_NAMES.values()) <= LOSSES.keys()
    assert not OTHER_NAMES.keys() & LOSSES.keys()


def from_trl_docs(*arguments: str) -> int:
    return subprocess.run([sys.executable, str(ROOT / "tools" / "from_trl_docs.py"), *arguments]).returncode


def test_the_page_is_what_the_table_says(tmp_path: Path) -> None:
    assert from_trl_docs("--check") == 0
    assert from_trl_docs(str(tmp_path / "page.md")) == 0
    (tmp_path / "page.md").write_text((tmp_path / "page.md").read_text().replace("rpo_alpha", "rpo_beta"))
    assert from_trl_docs("--check", str(tmp_path / "page.md")) == 1


def message(**dpo: object) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_config(OfflineConfig, {**OFFLINE, "dpo": dpo})
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("rpo_alpha", "TRL's rpo_alpha is dpo.nll_coefficient here"),
        ("loss_type", "TRL's loss_type is dpo.loss here: one name, no sums; sigmoid plus sft is dpo.nll_coefficient"),
        ("num_train_epochs", "TRL's num_train_epochs is dpo.epochs here: 1 here, 3 in TRL"),
        ("lora_r", "TRL's lora_r is dpo.adapter.r here"),
        ("max_completion_length", "TRL's max_completion_length is data.max_completion_tokens here"),  # no sampling
        ("padding_free", "TRL's padding_free has no equivalent here: always, with dpo.shared_prompts"),
        ("simpo_gamma", "TRL's simpo_gamma is dpo.loss.gamma here: with simpo"),
        ("path", "did you mean 'data.path' or 'model.path'?"),
        ("max_prompt_tokens", "did you mean 'data.max_prompt_tokens'?"),
        ("seed", "did you mean 'seed'?"),
        ("gamma", "did you mean 'loss.gamma'?"),
        ("modules_to_save", "did you mean 'adapter.modules_to_save'?"),
    ],
)
def test_a_key_of_trl_or_of_another_section_is_refused_with_ours(key: str, hint: str) -> None:
    assert f"unknown key 'dpo.{key}'; {hint}" in message(**{key: 1})


SLIPS = {
    "beta": ["bta", "betta", "btea", "Beta"],
    "wpo": ["wp", "wpoo"],
    "epochs": ["epoch", "epohcs", "epocs"],
    "max_steps": ["max_step", "maxsteps", "max_stpes"],
    "learning_rate": ["learningrate", "lerning_rate", "learning_rat", "learnig_rate"],
    "pairs_per_step": ["pair_per_step", "pairs_per_steps", "pairs_per_stpe"],
    "reference": ["refrence", "referance", "references"],
    "nll_coefficient": ["nll_coeficient", "nll_coefficent", "nll_coeff"],
    "gradient_checkpointing": ["gradient_checkpoint", "grad_checkpointing"],
    "precision": ["precison", "percision"],
}
FAR = ["zzz", "temperature_decay", "kl", "clip_range", "vf_coef", "num_workers", "rank", "warmup", "lora"]


@pytest.mark.parametrize(("meant", "typed"), [(meant, typed) for meant, slips in SLIPS.items() for typed in slips])
def test_a_slip_of_the_finger_is_recognised(meant: str, typed: str) -> None:
    assert f"unknown key 'dpo.{typed}'; did you mean {meant!r}?" in message(**{typed: 1})


@pytest.mark.parametrize("typed", FAR)
def test_a_word_that_is_no_key_gets_the_list_of_keys_and_no_guess(typed: str) -> None:
    assert f"unknown key 'dpo.{typed}'; known keys: " in message(**{typed: 1})


@pytest.mark.parametrize(("name", "ours"), OTHER_NAMES.items())
def test_another_name_of_a_loss_is_refused_with_ours(name: str, ours: str) -> None:
    assert f"dpo.loss = {name!r}: did you mean {ours!r}?" in message(loss=name)

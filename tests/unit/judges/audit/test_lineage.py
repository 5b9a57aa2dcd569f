"""Whether a judge's model and the policy are of one lineage, by names and by files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.judge_cli import app
from iterdpo.testing import build_tiny_checkpoint
from judges.audit.lineage import base_name, shared_lineage


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5"),
        ("Qwen2.5-0.5B", "qwen2.5"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Llama-3.1-70B-Instruct", "llama3.1"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral"),
        ("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", "skyworkllama3.1"),
        ("gpt-4o-mini", "gpt4omini"),
        ("./my-reward-model", None),
        ("runs/a/round-001/policy", None),
        ("judge", None),
        ("my-rm/", None),
        ("", None),
        ("7B", None),
    ],
)
def test_a_base_name_is_what_stands_before_size_and_tuning(model: str, base: str | None) -> None:
    assert base_name(model) == base


@pytest.mark.parametrize(
    ("judge", "policy", "shared"),
    [
        ("Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-0.5B", True),
        ("Skywork/Skywork-Reward-Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("meta-llama/Llama-3.1-70B", "meta-llama/Meta-Llama-3-8B", False),
        ("gpt-4o-mini", "HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("my-rm", "my-rm-2", False),
        ("same", "same", True),
    ],
)
def test_models_of_one_base_name_are_of_one_lineage(judge: str, policy: str, shared: bool) -> None:
    assert (shared_lineage({"model": judge}, policy) is not None) == shared
    nested = {"judges": [{"use": "clip", "args": {"judge": {"use": "rubric", "args": {"model": judge}}}}]}
    assert (shared_lineage(nested, policy) is not None) == shared


def test_checkpoints_are_compared_by_their_files(tmp_path: Path) -> None:
    one, two = (build_tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    found = shared_lineage({"model": str(one)}, str(two))
    assert found is not None
    assert "their tokenizers are the same file" in found
    (one / "tokenizer.json").write_text((one / "tokenizer.json").read_text() + " ")
    found = shared_lineage({"model": str(one)}, str(two))
    assert found is not None
    assert "their networks have the same shape, of the type llama" in found
    change(one / "config.json", num_hidden_layers=3)
    assert shared_lineage({"model": str(one)}, str(two)) is None
    change(one / "config.json", _name_or_path="org/Nice3-1B")
    assert "by name both are nice3" in str(shared_lineage({"model": str(one)}, "org/Nice3-7B-Instruct"))
    (two / "adapter_config.json").write_text('{"base_model_name_or_path": "org/Nice3-7B"}')
    assert "by name both are nice3" in str(shared_lineage({"policy": str(one)}, str(two)))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, '{"_name_or_path": 3}'])
def test_a_configuration_that_cannot_be_read_tells_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert shared_lineage({"model": str(tmp_path)}, "org/Nice3-7B") is None


@pytest.mark.parametrize("model", ["~nobody-of-that-name/x", "x" * 5000, "a\0b", "{{ model }}\n"])
def test_an_argument_that_cannot_be_a_path_tells_nothing(model: str) -> None:
    assert shared_lineage({"model": model}, "org/Nice3-7B") is None


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_check_warns_of_one_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.py").write_text(
        "class Model:\n    def __init__(self, model):\n        pass\n\n    def score(self, completion):\n        return 0.0\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("check", "my.py:Model", "--attack", "--attack-prompts", "1", "--args", "model=org/Nice3-1B")
    app([*arguments, "--policy", "org/Nice3-7B-Instruct"], result_action="return_value")
    said = " ".join(capsys.readouterr().out.split())
    assert "The judge's model org/Nice3-1B and the policy org/Nice3-7B-Instruct are of one lineage" in said
    app([*arguments, "--policy", "org/Other-7B"], result_action="return_value")
    assert "lineage" not in capsys.readouterr().out

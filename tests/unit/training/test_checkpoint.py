"""Checkpoints within a round, and the policy as it is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iterdpo.run.rundir import read_jsonl
from iterdpo.training.models import load_policy
from iterdpo.training.step import Trainer
from tests.unit.training.rounds import (
    LOG_2,
    apart,
    log_of,
    run,
)

pytestmark = pytest.mark.usefixtures("the_peak_is_known")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": {}, "optimizer_state": "carry"},
        {"loss": "bco", "learning_rate": 1e-2},
        {"loss": "aot"},
        {"adapter": {"lora_dropout": 0.3, "modules_to_save": ["lm_head"]}},
    ],
)
def test_training_that_stops_at_a_checkpoint_and_goes_on_ends_bit_identical(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    expected = run(tmp_path / "a", tiny_model, pairs, **settings)
    step = Trainer.step

    def fail_at_4(self: Trainer, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", fail_at_4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", tiny_model, pairs, **settings)
    monkeypatch.setattr(Trainer, "step", step)
    kept = load_file(tmp_path / "b" / "policy.partial" / "checkpoint-000004" / "model.safetensors")
    adapter = "adapter" in settings  # the model under it is not kept with it
    assert all("lora" in name or "modules_to_save" in name for name in kept) == adapter
    log = tmp_path / "b" / "policy.partial" / "train_log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss"')  # and a line that was cut short
    resumed = run(tmp_path / "b", tiny_model, pairs, **settings)

    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert (resumed / name).read_bytes() == (expected / name).read_bytes()
    timeless = [{k: v for k, v in row.items() if "per_second" not in k and k != "mfu"} for row in read_jsonl(log)]
    assert timeless == [
        {k: v for k, v in row.items() if "per_second" not in k and k != "mfu"} for row in log_of(expected)
    ]


def test_of_an_adapter_only_the_adapter_is_saved_and_its_base_stays_as_it_is(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    before = (tiny_model / "model.safetensors").read_bytes()
    output = run(tmp_path, tiny_model, grouped, adapter={"r": 4}, learning_rate=1e-2, epochs=2)
    log = log_of(output)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[0]["loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert log[-1]["loss"] < log[0]["loss"]
    tensors = load_file(output / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert len(tensors) == 2 * 7 * 2  # two matrices for each of seven modules in two layers
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert not (output / "model.safetensors").exists()
    assert not (output / "README.md").exists()
    assert (output / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert (tiny_model / "model.safetensors").read_bytes() == before
    policy = load_policy(output)
    with policy.disable_adapter():
        assert (
            apart(
                {
                    n.replace(".base_layer", ""): p
                    for n, p in policy.get_base_model().state_dict().items()
                    if "lora" not in n
                },
                load_policy(tiny_model).state_dict(),
            )
            == 0.0
        )


def test_the_policy_carries_the_tokenizer_byte_for_byte(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    output = run(tmp_path, tiny_model, pairs)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (tiny_model / name).read_bytes()


def test_save_dtype_is_the_precision_on_disk_and_in_the_configuration(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    output = run(tmp_path, tiny_model, pairs, save_dtype="bfloat16")
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(output / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_a_generation_config_that_cannot_be_saved_is_carried_over_as_it_is(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "generation_config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name != "_from_model_config"}
    file.write_text(json.dumps(kept | {"do_sample": False, "temperature": 0.9}))
    output = run(tmp_path / "run", model, grouped)
    assert (output / "model.safetensors").exists()
    assert (output / "generation_config.json").read_bytes() == file.read_bytes()

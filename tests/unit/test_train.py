"""The trainer, in this process, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iterdpo.config import DPOConfig
from iterdpo.launch import TrainSpec
from iterdpo.models import load_policy
from iterdpo.pairs import write_pairs
from iterdpo.rundir import read_jsonl
from iterdpo.train import learning_rate_factor, train
from iterdpo.types import Completion, PreferencePair, Prompt


def completion(ids: list[int]) -> Completion:
    return Completion("text", ids, [], "stop")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    rows = [
        PreferencePair(Prompt(f"p{i}", "x"), ids(2, 8), completion(ids(3, 12)), completion(ids(3, 12)))
        for i in range(22)
    ]
    directory = tmp_path_factory.mktemp("pairs")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"


def run(tmp_path: Path, model: Path, pairs: Path, *, reference: Path | None = None, **dpo: Any) -> Path:
    output = tmp_path / "policy.partial"
    output.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": 1e-3, "pairs_per_step": 4, "precision": "fp32", "checkpoint_every": 2, **dpo}
    train(
        TrainSpec(
            name="round-001",
            policy=str(model),
            reference=str(reference) if reference else None,
            pairs=str(pairs),
            eval_pairs=None,
            output=str(output),
            reference_output=str(tmp_path / "reference"),
            attic=None,
            reference_inputs={"reference": str(reference)},
            dpo=DPOConfig(**settings).model_dump(),
            seed=3,
            pairs_cache=str(tmp_path / "cache"),
            tracker_dir=str(tmp_path / "trackers"),
        )
    )
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_policy(output).state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_implicit_rewards_are_exactly_zero_at_step_0_where_the_reference_is_the_policy(
    tmp_path: Path, tiny_model: Path, pairs: Path, precision: str
) -> None:
    log = read_jsonl(run(tmp_path, tiny_model, pairs, precision=precision) / "train_log.jsonl")
    assert log[0]["rewards/chosen"] == 0.0
    assert log[0]["rewards/rejected"] == 0.0
    assert log[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)  # log 2
    assert log[-1]["rewards/margins"] != 0.0


def test_every_pair_is_trained_on_once_an_epoch_also_those_of_the_last_short_step(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    log = read_jsonl(run(tmp_path, tiny_model, pairs) / "train_log.jsonl")
    assert len(log) == 6  # 22 pairs, 4 a step


def test_micro_batches_do_not_change_the_policy(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    whole = weights(run(tmp_path / "a", tiny_model, pairs, tokens_per_micro_batch=4096))
    cut = weights(run(tmp_path / "b", tiny_model, pairs, tokens_per_micro_batch=1))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=2e-5, rtol=0)


def test_gradient_checkpointing_does_not_change_the_policy(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    plain = weights(run(tmp_path / "a", tiny_model, pairs))
    checkpointed = weights(run(tmp_path / "b", tiny_model, pairs, gradient_checkpointing=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-6, rtol=0)


def test_training_that_stops_at_a_checkpoint_and_goes_on_ends_bit_identical(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iterdpo.train import Trainer

    expected = run(tmp_path / "a", tiny_model, pairs)
    step = Trainer._step

    def fail_at_4(self: Trainer, number: int) -> dict[str, Any]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", fail_at_4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", tiny_model, pairs)
    monkeypatch.setattr(Trainer, "_step", step)
    log = tmp_path / "b" / "policy.partial" / "train_log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss"')  # and a line that was cut short
    resumed = run(tmp_path / "b", tiny_model, pairs)

    assert (resumed / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    timeless = [{k: v for k, v in row.items() if "per_second" not in k and k != "mfu"} for row in read_jsonl(log)]
    assert timeless == [
        {k: v for k, v in row.items() if "per_second" not in k and k != "mfu"}
        for row in read_jsonl(expected / "train_log.jsonl")
    ]


def test_another_reference_gives_other_rewards_and_is_named_nowhere_else(
    tmp_path: Path, tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from iterdpo.testing import build_tiny_checkpoint

    other = build_tiny_checkpoint(tmp_path_factory.mktemp("reference"), seed=9)
    log = read_jsonl(run(tmp_path, tiny_model, pairs, reference=other) / "train_log.jsonl")
    assert log[0]["rewards/chosen"] != 0.0


def test_a_loss_that_is_not_finite_ends_training_before_it_is_applied(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    with pytest.raises(RuntimeError, match="not finite, and not applied"):
        run(tmp_path, tiny_model, pairs, learning_rate=1e30, max_grad_norm=1e30, lr_scheduler="constant")


def test_fewer_processes_than_asked_for_is_an_error(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    with pytest.raises(RuntimeError, match="2 training processes were asked for and this one sees 1"):
        run(tmp_path, tiny_model, pairs, processes=2)


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


def test_the_learning_rate_warms_up_to_its_peak_and_is_never_zero() -> None:
    def factors(schedule: str) -> list[float]:
        return [learning_rate_factor(s, 10, warmup_ratio=0.2, schedule=schedule) for s in range(10)]

    assert factors("constant") == [0.5, *[1.0] * 9]
    assert factors("linear") == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert factors("cosine")[2] == 1.0
    assert min(factors("cosine")) > 0

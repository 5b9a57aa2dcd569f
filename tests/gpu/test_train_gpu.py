"""The trainer on a CUDA GPU."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from iterdpo.data.pairs import write_pairs
from iterdpo.run.devices import visible_gpus
from iterdpo.run.rundir import read_jsonl
from iterdpo.training.launch import TRAIN_LOG, ReferenceInputs, TrainSpec, launch_training
from iterdpo.types import Completion, PreferencePair, Prompt

pytestmark = pytest.mark.gpu

ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 259) for _ in range(rng.randrange(low, high))]

    def completion() -> Completion:
        return Completion("text", ids(16, 200), [], "stop")

    prompts = [ids(8, 100) for _ in range(20)]  # three pairs of each
    rows = [PreferencePair(Prompt(f"p{i % 20}", "x"), prompts[i % 20], completion(), completion()) for i in range(60)]
    directory = tmp_path_factory.mktemp("pairs")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"


def spec_of(tmp_path: Path, model: Path, pairs: Path, **dpo: Any) -> TrainSpec:
    from iterdpo.config import DPOConfig

    output = tmp_path / "policy.partial"
    output.mkdir(parents=True)
    settings = DPOConfig(**{"learning_rate": 1e-4, "checkpoint_every": 3, **dpo})
    return TrainSpec(
        policy=model,
        reference=None,
        pairs=pairs,
        eval_pairs=None,
        output=output,
        reference_output=tmp_path / "reference",
        attic=None,
        reference_inputs=ReferenceInputs(
            reference="", pairs="", precision="", adapter=False, sampler_logps_tolerance=None, mismatched=None
        ),
        dpo=settings,
        seed=0,
        pairs_cache=tmp_path / "cache",
    )


def run(tmp_path: Path, model: Path, pairs: Path, **dpo: Any) -> list[dict[str, Any]]:
    """The training log of a round in this process. Liger's kernels would stay in it, for models on the CPU too."""
    from iterdpo.training.train import train

    spec = spec_of(tmp_path, model, pairs, **{"kernels": "none", **dpo})
    train(spec)
    return read_jsonl(spec.output / TRAIN_LOG)


def launched(tmp_path: Path, model: Path, pairs: Path, **dpo: Any) -> list[dict[str, Any]]:
    """The same, in a process that is started as a run starts it."""
    spec = spec_of(tmp_path, model, pairs, **dpo)
    log: list[dict[str, Any]] = []
    launch_training(spec, spec_path=spec.output / "train.json", log=tmp_path / "train.log", on_step=log.append)
    return log


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_round_trains_from_zero_rewards_and_the_margin_grows(
    tmp_path: Path, model: Path, pairs: Path, precision: str
) -> None:
    log = run(tmp_path, model, pairs, precision=precision, epochs=3)
    assert log[0]["rewards/chosen"] == 0.0
    assert log[0]["rewards/rejected"] == 0.0
    assert sum(row["rewards/margins"] for row in log[-4:]) > 4 * 0.05
    print(f"{precision}: {log[-1]['pairs_per_second']:.1f} pairs/s, margin {log[-1]['rewards/margins']:.3f}")


def test_the_losses_of_a_batch_are_computed_without_a_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, pairs: Path
) -> None:
    import torch

    from iterdpo.training.step import Trainer

    of_batch = Trainer.losses

    def watched(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return of_batch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "losses", watched)
    run(tmp_path, model, pairs, tokens_per_micro_batch=2048)
    assert (tmp_path / "policy.partial" / "model.safetensors").exists()


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path, model: Path, pairs: Path) -> None:
    plain = run(tmp_path / "plain", model, pairs, precision="fp32")
    checkpointed = run(tmp_path / "checkpointed", model, pairs, precision="fp32", gradient_checkpointing=True)
    losses = [[row["loss"] for row in log] for log in (plain, checkpointed)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_sharing_prompts_gives_the_same_losses(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, model: Path, pairs: Path
) -> None:
    caplog.set_level(logging.INFO, "iterdpo.training.train")
    shared = run(tmp_path / "shared", model, pairs, precision="fp32")
    own = run(tmp_path / "own", model, pairs, precision="fp32", shared_prompts=False)
    assert [record.args for record in caplog.records if "path" in record.msg] == [("shared",), ("rows",)]
    assert [row["loss"] for row in shared] == pytest.approx([row["loss"] for row in own], abs=1e-4)


def test_offloaded_activations_give_the_same_losses(tmp_path: Path, model: Path, pairs: Path) -> None:
    plain = run(tmp_path / "plain", model, pairs)
    offloaded = run(tmp_path / "offloaded", model, pairs, activation_offload=True)
    assert offloaded[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-2)
    # FlashAttention adds gradients in no certain order.
    assert [row["loss"] for row in offloaded] == pytest.approx([row["loss"] for row in plain], abs=0.02)


def test_ligers_kernels_train_from_zero_rewards_to_about_the_same_losses(
    tmp_path: Path, model: Path, pairs: Path
) -> None:
    pytest.importorskip("liger_kernel")
    plain = launched(tmp_path / "plain", model, pairs, kernels="none")
    fused = launched(tmp_path / "fused", model, pairs, kernels="liger")
    assert fused[0]["rewards/chosen"] == fused[0]["rewards/rejected"] == 0.0
    assert [row["loss"] for row in fused] == pytest.approx([row["loss"] for row in plain], abs=0.02)


def test_adamw_8bit_trains_from_zero_rewards(tmp_path: Path, model: Path, pairs: Path) -> None:
    pytest.importorskip("torchao")
    log = run(tmp_path, model, pairs, optimizer="adamw_8bit", epochs=3)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_trains_from_zero_rewards(tmp_path: Path, model: Path, pairs: Path, quantize: str) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    log = run(tmp_path, model, pairs, adapter={"quantize": quantize}, learning_rate=1e-3, epochs=3)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "policy.partial" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["fsdp2-8gpu", "deepspeed-zero2"])
def test_a_round_under_a_launcher_of_one_process_gives_about_the_same_losses(
    tmp_path: Path, model: Path, pairs: Path, name: str
) -> None:
    if name == "deepspeed-zero2":
        pytest.importorskip("deepspeed")
    settings = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text()) | {"num_processes": 1}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    plain = run(tmp_path / "plain", model, pairs)
    divided = launched(tmp_path / "divided", model, pairs, accelerate_config=str(tmp_path / "accelerate.yaml"))
    assert divided[0]["rewards/chosen"] == divided[0]["rewards/rejected"] == 0.0
    assert [row["loss"] for row in divided] == pytest.approx([row["loss"] for row in plain], abs=0.02)
    assert (tmp_path / "divided" / "policy.partial" / "model.safetensors").exists()


@pytest.mark.parametrize("groups", [8, 2])
def test_flash_attention_and_the_blocks_give_the_same_outputs_and_gradients(groups: int) -> None:
    found = attended(groups, "bfloat16", window=None, softcap=None)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 2e-2 * one.norm()


@pytest.mark.parametrize(
    ("groups", "window", "softcap"), [(8, None, None), (2, 100, None), (2, None, 1.5), (8, 100, 1.5)]
)
def test_flex_attention_and_the_blocks_give_the_same_outputs_and_gradients(
    groups: int, window: int | None, softcap: float | None
) -> None:
    for one, other in zip(*attended(groups, "float32", window=window, softcap=softcap), strict=True):
        assert (one - other).norm() <= 5e-3 * one.norm()  # TF32


def attended(groups: int, dtype: str, *, window: int | None, softcap: float | None) -> list[list[Any]]:
    """Outputs and gradients of attention over trees: on the CPU in float32, on the GPU in `dtype`."""
    import torch

    from iterdpo.training import attention

    generator = torch.Generator().manual_seed(0)
    shape = [(150, [90, 200]), (70, [30]), (2, [100, 4, 60]), (400, [10])]
    width, tokens = 1152, 1116  # more than dense blocks compute on a GPU
    layout = attention.tree_layout(shape, width)
    tensors = [torch.randn(1, heads, width, 64, generator=generator) for heads in (8, groups, groups)]
    wanted = torch.randn(1, width, 8, 64, generator=generator)
    wanted[:, tokens:] = 0
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", getattr(torch, dtype))):
        inputs = [t.detach().to(device, kind).requires_grad_() for t in tensors]
        attention.use_layout(attention.moved(layout, device))
        output, _ = attention.tree_attention(None, *inputs, None, sliding_window=window, softcap=softcap)
        gradients = torch.autograd.grad((output * wanted.to(device, kind)).sum(), inputs)
        found.append([output[:, :tokens].float().cpu(), *(g.float().cpu() for g in gradients)])
    return found


def test_the_gpu_and_the_cpu_compute_the_same_log_probabilities(tmp_path: Path, model: Path) -> None:
    import torch

    from iterdpo.training.logps import completion_logps, score_completions
    from iterdpo.training.models import load_policy

    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
    on_gpu = score_completions(model, prompts, completions, precision="fp32")
    with torch.no_grad():
        on_cpu = completion_logps(load_policy(model).eval(), prompts, completions)
    assert on_gpu == pytest.approx(on_cpu.tolist(), abs=1e-2)
    assert visible_gpus()

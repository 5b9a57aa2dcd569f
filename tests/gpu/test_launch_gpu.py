"""Trainings on a GPU in processes of their own: with Liger's kernels, under launchers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.gpu.rounds import launched, run

pytestmark = pytest.mark.gpu

ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"


def test_ligers_kernels_train_from_zero_rewards_to_about_the_same_losses(
    tmp_path: Path, model: Path, pairs: Path
) -> None:
    pytest.importorskip("liger_kernel")
    plain = run(tmp_path / "plain", model, pairs)
    fused = launched(tmp_path / "fused", model, pairs, kernels="liger")
    assert fused[0]["rewards/chosen"] == fused[0]["rewards/rejected"] == 0.0
    assert [row["loss"] for row in fused] == pytest.approx([row["loss"] for row in plain], abs=0.02)


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

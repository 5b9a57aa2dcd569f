"""Training divided by FSDP2, which accelerate knows for accelerators alone: here over gloo, on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from iterdpo.run.rundir import read_json
from iterdpo.training import train as train_module
from iterdpo.training.launch import TrainSpec
from tests.unit.training.rounds import apart, log_of, losses, run, weights

pytestmark = pytest.mark.usefixtures("the_peak_is_known")

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def over_gloo(self: PartialState, *arguments: Any, **settings: Any) -> tuple[str, DistributedType]:
    """As `PartialState._prepare_backend` would answer for GPUs."""
    torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FSDP2 in this process, as the only one."""

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in {**FSDP, **place, "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_prepare_backend", over_gloo)
    forget()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    forget()


def test_a_round_divided_by_fsdp2_is_the_round_of_a_whole_model(
    tmp_path: Path, sharp: Path, tiny_model: Path, pairs: Path, request: pytest.FixtureRequest
) -> None:
    """Against another checkpoint, with moments of an earlier round, some of which are of a whole model."""
    first = run(tmp_path / "first", tiny_model, pairs, optimizer_state="carry", max_steps=2)
    settings = {"against": sharp, "optimizer_state": "carry", "max_steps": 3}
    whole = run(tmp_path / "whole", first, pairs, carried=first / "optimizer.pt", **settings)
    request.getfixturevalue("divided")
    ours = run(tmp_path / "divided", first, pairs, carried=first / "optimizer.pt", **settings)
    assert losses(ours) == pytest.approx(losses(whole), abs=1e-5)
    assert apart(weights(ours), weights(whole)) < 1e-5
    assert load_file(ours / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    one, other = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (whole, ours))
    assert one.keys() == other.keys()
    for at, moments in one.items():
        assert not isinstance(other[at]["exp_avg"], DTensor)
        torch.testing.assert_close(other[at]["exp_avg"], moments["exp_avg"], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(other[at]["step"], moments["step"])


@pytest.mark.usefixtures("divided")
def test_a_path_that_the_model_refuses_is_passed_over_when_it_is_divided(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr("iterdpo.training.attention.tree_attention", refuse, raising=True)
    paths = []
    select = train_module.select_logp_path
    monkeypatch.setattr(train_module, "select_logp_path", lambda *a, **k: paths.append(select(*a, **k)) or paths[-1])
    output = run(tmp_path, tiny_model, pairs, max_steps=2)
    assert paths == ["rows"]
    assert losses(output)[0] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.slow
@pytest.mark.extended
def test_a_divided_round_goes_on_with_another_number_of_processes(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    """Two processes are stopped after their third step, and three go on from the checkpoint after the second."""
    whole = run(tmp_path / "whole", tiny_model, pairs)
    spec = TrainSpec.model_validate(read_json(write_spec(tmp_path, tiny_model, pairs)))
    for processes, stop in ((2, 3), (3, 0)):
        dpo = spec.dpo.model_copy(update={"processes": processes})
        (tmp_path / "train.json").write_text(spec.model_copy(update={"dpo": dpo}).model_dump_json())
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*launcher, "-m", "tests.unit.training.test_fsdp", str(tmp_path / "train.json"), str(stop)],
            env={**os.environ, **FSDP, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) is (stop == 0), done.stderr[-3000:]
        left = sorted(path.name for path in spec.output.glob("checkpoint-*"))
        assert left == (["checkpoint-000002"] if stop else ["checkpoint-000004"])
        if stop:
            shards = sorted(path.name for path in (spec.output / left[0] / "pytorch_model_fsdp_0").glob("*.distcp"))
            assert shards == ["__0_0.distcp", "__1_0.distcp"]
    assert [row["step"] for row in log_of(spec.output)] == [1, 2, 3, 4, 5, 6]
    assert losses(spec.output) == pytest.approx(losses(whole), abs=1e-5)
    assert apart(weights(spec.output), weights(whole)) < 5e-5


def write_spec(tmp_path: Path, model: Path, pairs: Path) -> Path:
    """The specification that `run` would train by."""
    made: list[TrainSpec] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.unit.training.rounds.train", made.append)
        run(tmp_path / "divided", model, pairs)
    (tmp_path / "train.json").write_text(made[0].model_dump_json())
    return tmp_path / "train.json"


def main(spec: str, stop: int) -> None:
    """One of several processes, which fails at the step `stop`."""
    step = train_module.Trainer.step

    def stopping(self: Any, number: int) -> Any:
        if stop and number == stop:
            raise RuntimeError("stopped")
        return step(self, number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PartialState, "_prepare_backend", over_gloo)
        patched.setattr("iterdpo.training.step.matmul_peak", lambda device, dtype: 1e12)
        patched.setattr(train_module.Trainer, "step", stopping)
        train_module.train(TrainSpec.model_validate(read_json(Path(spec))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""How a training process is started. `tests/integration` starts real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import DPOConfig, SupervisionConfig
from iterdpo.errors import ChildFailed, ChildLost, ConfigError
from iterdpo.run.rundir import read_json, write_json
from iterdpo.testing import train_spec
from iterdpo.training.launch import (
    TrainSpec,
    check_training,
    command,
    environment,
    launch_training,
    threads,
    warm_up,
)


def spec(**dpo: Any) -> TrainSpec:
    return train_spec(
        Path("/"), Path("/policy"), Path("/pairs/train.parquet"), DPOConfig(**dpo), output=Path("/output")
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_specification_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = spec(
        loss={"type": "kto", "desirable_weight": 1.5}, adapter={}, adam_betas=(0.5, 0.75), sentinels={"margin": 3.0}
    )
    write_json(tmp_path / "train.json", written.model_dump(mode="json"))
    assert TrainSpec.model_validate(read_json(tmp_path / "train.json")) == written


def test_a_specification_with_a_key_that_there_is_not_is_refused(tmp_path: Path) -> None:
    values = spec().model_dump(mode="json")
    values["dpo"]["betta"] = 0.2
    write_json(tmp_path / "train.json", values)
    with pytest.raises(ValueError, match=r"dpo\.betta"):
        TrainSpec.model_validate(read_json(tmp_path / "train.json"))


@pytest.mark.parametrize("devices", ["gpus", "cpus"])
def test_one_process_is_the_trainer_itself(request: pytest.FixtureRequest, devices: str) -> None:
    request.getfixturevalue(devices)
    assert command(spec().dpo, "/train.json")[1:] == ["-m", "iterdpo.training.train", "/train.json"]


@pytest.mark.parametrize("devices", ["gpus", "cpus"])
def test_several_processes_are_started_by_torchrun(request: pytest.FixtureRequest, devices: str) -> None:
    request.getfixturevalue(devices)
    words = command(spec(processes=2).dpo, "/train.json")
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in words
    assert words[-3:] == ["-m", "iterdpo.training.train", "/train.json"]


@pytest.mark.usefixtures("cpus")
def test_an_accelerate_configuration_says_everything() -> None:
    words = command(spec(accelerate_config="/fsdp.yaml", processes=2).dpo, "/train.json")
    assert words[1:] == [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "/fsdp.yaml",
        "-m",
        "iterdpo.training.train",
        "/train.json",
    ]


def test_processes_share_the_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    assert [threads(processes) for processes in (1, 2, 3, 8)] == [7, 3, 2, 1]
    assert environment(processes=2)["OMP_NUM_THREADS"] == "3"


@pytest.mark.usefixtures("gpus")
def test_a_package_that_is_not_installed_is_named_with_the_key_that_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"dpo\.trackers: the package 'wandb' is not installed; run: pip install"):
        check_training(DPOConfig(trackers=["wandb"]))
    check_training(DPOConfig())
    with pytest.raises(
        ConfigError, match=r"dpo\.kernels: the package 'liger_kernel' is not installed; run: pip install"
    ):
        check_training(DPOConfig(kernels="liger"))


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"quantize": "nf4"}}, r"^dpo\.adapter\.quantize = 'nf4' needs a GPU"),
        ({"kernels": "liger"}, r"^dpo\.kernels = 'liger' needs a GPU, but this machine has none; set it to auto"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_training(DPOConfig(**settings))


def test_an_accelerate_configuration_must_exist_and_mean_as_many_processes(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    with pytest.raises(ConfigError, match="no such file"):
        check_training(DPOConfig(accelerate_config=str(path)))
    path.write_text("num_processes: 4\n")
    with pytest.raises(ConfigError, match=r"num_processes is 4, but dpo\.processes is 1"):
        check_training(DPOConfig(accelerate_config=str(path)))
    check_training(DPOConfig(accelerate_config=str(path), processes=4))


def test_a_trainer_that_waits_reads_its_round_from_its_input(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    told = warm_up(spec().dpo, log=log)
    with pytest.raises(ChildFailed, match=r"training failed: FileNotFoundError: .*/no-such-file"):
        launch_training(
            spec().model_copy(update={"output": tmp_path, "pairs": Path("/no-such-file")}),
            spec_path=tmp_path / "train.json",
            log=log,
            on_step=lambda row: None,
            child=told,
        )
    assert "leaked" not in log.read_text()  # of objects that the collector was told to leave alone


def test_processes_that_a_launcher_starts_do_not_wait(tmp_path: Path) -> None:
    assert warm_up(spec(processes=2).dpo, log=tmp_path / "train.log") is None
    assert not (tmp_path / "train.log").exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 1000", "no sign of work for 2 seconds"),  # of its start
        ("sleep 1; touch train_log.jsonl; sleep 1000", "no sign of work for 1 seconds"),
        ("kill -KILL $$", "ended by SIGKILL"),
        ("kill -TERM $$", "ended by SIGTERM"),
    ],
)
def test_a_trainer_that_hangs_or_that_a_signal_ends_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iterdpo.training.launch.command", lambda dpo, path: ["sh", "-c", script])
    with pytest.raises(ChildLost, match=f"training failed: .*{reason}"):
        launch_training(
            spec().model_copy(update={"output": tmp_path}),
            spec_path=tmp_path / "train.json",
            log=tmp_path / "train.log",
            on_step=lambda row: None,
            supervision=SupervisionConfig(silence=1, start=2),
        )


def test_a_trainer_that_works_long_and_ends_with_an_error_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 0.5; touch train_log.jsonl; done; echo RuntimeError: no luck; exit 1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iterdpo.training.launch.command", lambda dpo, path: ["sh", "-c", script])
    with pytest.raises(ChildFailed, match="RuntimeError: no luck") as failed:
        launch_training(
            spec().model_copy(update={"output": tmp_path}),
            spec_path=tmp_path / "train.json",
            log=tmp_path / "train.log",
            on_step=lambda row: None,
            supervision=SupervisionConfig(silence=3, start=3),
        )
    assert not isinstance(failed.value, ChildLost)

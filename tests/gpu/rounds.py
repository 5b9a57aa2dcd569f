"""Rounds of DPO on a GPU, in this process and in one of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterdpo.config import DPOConfig
from iterdpo.run.rundir import read_jsonl
from iterdpo.testing import train_spec
from iterdpo.training.launch import TRAIN_LOG, TrainSpec, launch_training


def spec_of(tmp_path: Path, model: Path, pairs: Path, **dpo: Any) -> TrainSpec:
    settings = DPOConfig(**{"learning_rate": 1e-4, "checkpoint_every": 3, **dpo})
    spec = train_spec(tmp_path, model, pairs, settings)
    spec.output.mkdir(parents=True)
    return spec


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

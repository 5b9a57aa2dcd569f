"""A calibration of a tiny model, with a sampler that needs no engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.api import open_run
from flows.calibrate import Recorder, cached, cached_rates, calibrate, resident
from flows.plan import describe_cost
from iterdpo.config import Config, parse_config
from iterdpo.run.cost import CARDS
from iterdpo.testing import FakeSampler


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("ITERDPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(99)))
    (tmp_path / "judge.py").write_text("def score(completion):\n    return len(completion)\n")
    values = {
        "run_dir": str(tmp_path / "run"),
        "rounds": 5,
        "model": {"path": str(tiny_model)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_round": 8, "heldout": 4},
        "sampling": {"n": 2, "max_tokens": 8, "shard_size": 4},
        "judge": {"use": f"{tmp_path / 'judge.py'}:score"},
        "dpo": {"precision": "fp32", "pairs_per_step": 2},
        "evaluation": {"max_logp_gap": 100.0},
    }
    return parse_config(Config, values)


@pytest.mark.slow
def test_a_calibration_leaves_rates_of_each_stage_for_this_machine_and_these_settings(
    config: Config, tmp_path: Path
) -> None:
    assert cached_rates(config) is None
    sampler = FakeSampler(lambda ids, k: f"{ids[-1] % 7}" * (k + 1))
    rates = calibrate(config, say=lambda text: None, sampler=sampler)
    assert {"sample", "judge", "train", "evaluate", "score", "kl"} <= rates.stages.keys()
    assert all(start >= 0 and each > 0 for name, (start, each) in rates.stages.items() if name != "judge")
    assert rates.stages["train"][0] > 0.1  # its process has to start
    assert rates.memory["trainer"] > 50e6
    assert cached_rates(config) == rates
    longer = config.model_copy(update={"rounds": 9, "run_dir": str(tmp_path / "other")})
    assert cached(longer) == cached(config)
    assert cached(config.model_copy(update={"sampling": config.sampling.model_copy(update={"n": 3})})) != cached(config)
    assert not (tmp_path / "run").exists()
    with open_run(config) as run:
        said = describe_cost(run, rates, None)
    assert "a calibration on this machine" in said
    assert "trainer" in said


def test_the_plan_says_what_does_not_fit_and_which_keys_to_change(config: Config) -> None:
    with open_run(config) as run:
        fits = describe_cost(run, None, CARDS["H100"])
        small = describe_cost(run, None, CARDS["H100"]._replace(memory=1e9))
        tight = describe_cost(run, None, CARDS["H100"]._replace(memory=2.3e9))
    assert "does not fit" not in fits
    assert "pass --calibrate" in fits
    assert re.search(r"^does not fit +the trainer; change one of these: the model, for a smaller one", small, re.M)
    assert re.search(r"^engine does not fit +.*sampling\.engine\.gpu_memory_utilization=0\.\d+$", tight, re.M)


def test_a_recorder_has_the_last_start_of_a_stage_and_the_mean_of_all_its_units() -> None:
    now = [0.0]
    recorder = Recorder()
    recorder.clock = lambda: now[0]
    for wait, work in ((20.0, 4.0), (1.0, 2.0)):
        with recorder.stage("evaluate", 4, "completions") as stage:
            now[0] += wait
            stage.begin()
            now[0] += work
            stage.to(4)
    assert recorder.rates() == {"evaluate": (1.0, 0.75)}
    with recorder.stage("sample", 8, "completions") as stage:
        now[0] += 2.0
        stage.to(8)
    assert recorder.rates() == {"evaluate": (1.0, 0.5), "sample": (0.0, 0.5)}  # 4 + 2 + 2 seconds for 16
    assert recorder.seconds() == 29.0


def test_the_peak_of_a_child_is_found_by_its_module() -> None:
    code = "import time; block = bytearray(40_000_000); print('ready', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, "iterdpo.training.train"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert resident(os.getpid())["trainer"] > 40e6
        child.kill()

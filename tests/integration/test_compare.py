"""An experiment with real training, killed in its middle and gone on. The sampler is no engine."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.verify import verify
from iterdpo.run.rundir import read_json, read_manifest
from tests.integration.harness import Workspace, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.extended]

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from flows.compare import compare
from flows.experiment import load_experiment
from iterdpo.testing import FakeSampler


class Noting(FakeSampler):
    def sample(self, prompt_ids, seeds, parameters):
        with open(sys.argv[3], "a") as log:
            log.write(f"{len(prompt_ids)}\\n")
        return super().sample(prompt_ids, seeds, parameters)


sampler = Noting(lambda ids, k: "abcdefghij"[: 3 + (k * 2 + ids[-1]) % 7])
print(compare(load_experiment(sys.argv[1], out=sys.argv[2]), sampler=sampler))
"""


def test_an_arm_of_online_rl_by_trl_moves_the_policy_with_no_more_completions_than_others(workspace: Workspace) -> None:
    root, out = workspace.root, workspace.root / "out"
    base = {**workspace.config, "evaluation": {**workspace.config["evaluation"], "max_logp_gap": 1e3}}
    del base["run_dir"]
    grpo = {"command": ["{python}", str(ROOT / "benchmarks" / "trl_online.py"), "{spec}"], "requires": ["trl"]}
    experiment = {"base": base, "arms": {"grpo": grpo}, "seeds": [0]}
    (root / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    command = [sys.executable, "-c", SCRIPT, str(root / "experiment.yaml"), str(out), str(root / "asked")]
    done = subprocess.run(command, env=workspace.environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = read_json(out / "compare.json")["arms"]["grpo"]
    assert found["budget"]["completions"] == found["budget"]["judge_calls"] == 16 * 3
    assert found["budget"]["steps"] == 8
    first, last = found["seeds"]["0"]["points"]
    assert first["kl"] == 0 != last["kl"]
    assert verify(out / "grpo" / "seed-0").problems == []


def test_an_experiment_that_is_killed_goes_on_and_samples_nothing_twice(workspace: Workspace) -> None:
    root, out = workspace.root, workspace.root / "out"
    base = {**workspace.config, "evaluation": {**workspace.config["evaluation"], "max_logp_gap": 1e3}}
    base["sampling"] = {**base["sampling"], "shard_size": 16}
    del base["run_dir"]
    arms = {"small": {"dpo.beta": 0.1}, "large": {"dpo.beta": 1.0}}
    (root / "experiment.yaml").write_text(yaml.safe_dump({"base": base, "arms": arms, "seeds": [0]}, sort_keys=False))
    command = [sys.executable, "-c", SCRIPT, str(root / "experiment.yaml"), str(out), str(root / "asked")]
    large = out / "large" / "seed-0" / "round-001"
    with subprocess.Popen(command, env=workspace.environment()) as first:
        wait_for(lambda: (large / "pairs").exists(), seconds=300, what="the second arm's pairs")
        first.send_signal(signal.SIGKILL)
    wait_for(lambda: workspace.survivors() == [], seconds=20, what="the trainer to end")
    again = subprocess.run(command, env=workspace.environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    # the initial policy on 8 prompts and a round of 16 for both arms, then each arm's policy on 8
    assert (root / "asked").read_text().split() == ["8", "16", "8", "8"]
    found = read_json(out / "compare.json")
    assert found["missing"] == []
    [end, _] = found["differences"]
    scores = [found["arms"][arm]["end"]["kl"]["value"] for arm in arms]
    assert len(set(scores)) == 2  # they were trained, and differently
    assert (end["a"], end["b"], end["seeds"]) == ("small", "large", 1)
    for arm in arms:
        assert verify(out / arm / "seed-0").problems == []
    completions = [out / arm / "seed-0/round-001/completions" for arm in arms]
    assert read_manifest(completions[0]) == read_manifest(completions[1])
    assert Path(again.stdout.strip()).read_text().count("<svg") == 3

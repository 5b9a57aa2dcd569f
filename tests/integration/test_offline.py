"""One offline round on real preference data, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flows import train_offline
from iterdpo import load_offline_config, read_run
from iterdpo.errors import StaleStepError
from tests.integration.harness import Workspace

pytestmark = pytest.mark.slow


def test_a_round_on_hh_rlhf_reports_what_it_left_out_and_why(
    workspace: Workspace, hh_rlhf: Path, tiny_model: Path
) -> None:
    path = workspace.root / "offline.yaml"
    data = {"path": str(hh_rlhf), "max_prompt_tokens": 48, "max_completion_tokens": 16, "heldout": 64}
    dpo = {"pairs_per_step": 64, "learning_rate": 1e-3, "precision": "fp32"}
    path.write_text(
        yaml.safe_dump(
            {"run_dir": str(workspace.run_dir), "model": {"path": str(tiny_model)}, "data": data, "dpo": dpo}
        )
    )
    result = workspace.iterdpo("train", str(path))
    assert result.returncode == 0, result.stderr
    assert (
        "kept 2,292 of 2,312 pairs (11 have identical completions after truncation, 5 diverge before the last turn, "
        "4 have an empty completion); 2,228 to train on, 64 held out"
    ) in result.stdout

    manifest = json.loads((workspace.run_dir / "round-001" / "pairs" / "MANIFEST.json").read_text())
    left_out = manifest["counts"]["left_out"]
    assert left_out["have identical completions after truncation"]["count"] == 11
    assert left_out["diverge before the last turn"] == {"count": 5, "rows": [1255, 1689, 1951, 1953, 2037]}
    assert left_out["have an empty completion"] == {"count": 4, "rows": [87, 517, 926, 1104]}

    run = read_run(workspace.run_dir)
    log = run.train_log()
    assert log.iloc[0]["rewards/margins"] == 0.0
    trained_on = manifest["counts"]["kept"]
    assert len(log) == -(-trained_on // 64)
    assert len(run.pairs(1)) == trained_on
    assert 0 < run.metrics.loc[1, "eval_rewards/accuracies"] < 1
    assert (workspace.run_dir / "report.html").exists()

    again = workspace.iterdpo("train", str(path))
    assert again.returncode == 0
    assert "train " not in again.stdout.replace("to train on", "")  # nothing was trained again

    with pytest.raises(StaleStepError, match=r"dpo\.beta = 0\.1, but now dpo\.beta = 0\.5"):
        train_offline(load_offline_config(path, overrides=["dpo.beta=0.5"]))


TWO_NODES = {"distributed_type": "MULTI_GPU", "num_machines": 2, "num_processes": 2, "mixed_precision": "no"}


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.extended)])
@pytest.mark.parametrize("loss", ["aot_unpaired"])  # each process needs the other's pairs
def test_two_processes_train_the_policy_of_one(workspace: Workspace, tiny_model: Path, loss: str, nodes: int) -> None:
    """On CPUs, by torchrun or by `iterdpo join`, and gloo; 21 pairs, so that the shares of the last step differ."""
    import torch
    from safetensors.torch import load_file

    other = None
    if nodes == 2:
        (workspace.root / "nodes.yaml").write_text(yaml.safe_dump(TWO_NODES))
        other = workspace.start("join", str(workspace.root / "run-2"), "--rank", "1")
    rows = [{"prompt": f"Tale {i}", "chosen": f" of sea {i * 7}", "rejected": f" sky {i}"} for i in range(21)]
    (workspace.root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policies, logs = [], []
    for processes in (1, 2):
        overrides = [
            f"run_dir={workspace.root}/run-{processes}",
            f"model.path={tiny_model}",
            f"data.path={workspace.root}/pairs.jsonl",
            f"dpo.processes={processes}",
        ]
        settings = [
            f"dpo.loss={loss}",
            "dpo.pairs_per_step=4",
            "dpo.tokens_per_micro_batch=64",
            "dpo.learning_rate=1e-3",
            "dpo.precision=fp32",
        ]
        if processes == nodes == 2:
            settings.append(f"dpo.accelerate_config={workspace.root}/nodes.yaml")
        run = train_offline(load_offline_config(overrides=overrides + settings))
        policies.append(load_file(run.policy() / "model.safetensors"))
        logs.append(run.train_log())
    if other is not None:
        assert "training with the node" in (workspace.root / "output.log").read_text()
        other.terminate()
        other.wait(20)
    one, two = logs
    assert two["loss"].tolist() == pytest.approx(one["loss"].tolist(), abs=1e-5)
    assert two["rewards/accuracies"].tolist() == pytest.approx(one["rewards/accuracies"].tolist())
    for name, tensor in policies[0].items():
        torch.testing.assert_close(policies[1][name], tensor, atol=5e-5, rtol=0)

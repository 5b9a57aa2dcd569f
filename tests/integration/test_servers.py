"""Two real vLLM servers that were started by somebody else sample for a run of two rounds."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from iterdpo.run import supervise
from iterdpo.run.devices import answers, free_port
from iterdpo.run.rundir import read_json, read_manifest
from iterdpo.sampling.client import engine_share
from iterdpo.testing import build_tiny_checkpoint
from tests.integration.harness import Workspace, call, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.extended]


def test_two_servers_sample_two_rounds_from_the_policies_that_each_round_left(tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    workspace = Workspace(tmp_path / "workspace", model)
    ports = [free_port(), free_port()]
    with ExitStack() as servers:
        for number, port in enumerate(ports):
            command = [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                str(model),
                "--port",
                str(port),
            ]
            command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
            command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
            variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **engine_share(number, 2, 1)}
            log = tmp_path / f"server-{number}.log"
            servers.enter_context(supervise.start(command, log=log, env={**os.environ, **variables}))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        wait_for(lambda: all(answers(f"{url}/health") for url in urls), seconds=300, what="two vLLM servers")
        workspace.config["sampling"]["servers"] = urls
        result = workspace.iterdpo("run", str(workspace.write(rounds=2)), "--no-prefect")
        assert result.returncode == 0, result.stdout + result.stderr
        policy = read_manifest(workspace.run_dir / "round-002" / "policy")
        versions = [call(f"{url}/weight_info")["weight_version"] for url in urls]
        asked = [(tmp_path / f"server-{number}.log").read_text().count("POST /v1/completions") for number in range(2)]
    for round in (1, 2):  # the log-probabilities that the servers reported are those of each round's policy
        metrics = read_json(workspace.run_dir / f"round-{round:03d}" / "evaluation" / "metrics.json")
        assert metrics["sampler/logp_gap"] < 1e-3
    assert policy is not None
    assert versions == [policy.digest] * 2
    assert sum(asked) >= 2 * 16 + 3 * 8
    assert min(asked) > 0

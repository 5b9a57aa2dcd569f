"""A Ray cluster of two nodes on this machine, each with a real vLLM engine, of which one node is lost in the middle of a round."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iterdpo.config import EngineConfig, SupervisionConfig
from iterdpo.sampling import Pool, SamplingParameters
from iterdpo.sampling.ray import RaySampler, connect
from tests.integration.test_sampling import transformers_logps

ray = pytest.importorskip("ray", reason="needs the package ray")
pytestmark = pytest.mark.slow

PARAMETERS = SamplingParameters(n=3, max_tokens=24)
BATCHES = [([[70 + number, 71, number], [80 + number]], [number, 1000 + number]) for number in range(24)]


def test_a_lost_node_costs_its_unfinished_prompts(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
    said: list[str] = []
    engines = [
        RaySampler(
            gpus=0,
            max_model_len=lambda: 64,
            log=tmp_path / f"sampler-{number}.log",
            engine=EngineConfig(dtype="float32"),
            supervision=SupervisionConfig(start=300),
        )
        for number in range(2)
    ]
    pool = Pool(engines, say=said.append)
    try:
        assert connect(cluster.address) == 0
        pool.warm_up()
        pool.load(tiny_model, "first")
        assert said == []
        sampled = pool.sample_batches(BATCHES, PARAMETERS)
        found = [next(sampled)]
        cluster.remove_node(nodes[1], allow_graceful=False)
        found += sampled
        [line] = said
        assert "prompts are dealt again: sampler: its node or its actor is lost" in line
    finally:
        pool.close()
        ray.shutdown()
        cluster.shutdown()
    assert len(found) == len(BATCHES)
    for batch, groups in zip(BATCHES[::6], found[::6], strict=True):
        for prompt, completions in zip(batch[0], groups, strict=True):
            assert len(completions) == PARAMETERS.n
            for completion in completions:
                expected = transformers_logps(tiny_model, prompt, completion.token_ids)
                assert completion.logprobs == pytest.approx(expected, abs=1e-3)

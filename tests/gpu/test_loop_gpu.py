"""A vLLM engine on a CUDA GPU, by itself and in a run: it sleeps, wakes, reloads, and goes on after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from iterdpo.config import EngineConfig
from iterdpo.run.rundir import read_json, read_jsonl
from iterdpo.sampling import SamplingParameters, VLLMSampler
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import Completion
from tests.integration.harness import Workspace
from tests.integration.test_crash import kill_when, sampling

pytestmark = pytest.mark.gpu

PROMPTS = [[70, 71, 72, 73], [80, 81], [90] * 9, [100, 7, 40]] * 4
PARAMETERS = SamplingParameters(n=3, max_tokens=24)
# With a cache of a given size vLLM does not look at free memory, which other tests take and give back meanwhile.
SMALL = EngineConfig(max_num_seqs=4, gpu_memory_utilization=0.3, extra={"kv_cache_memory_bytes": 2 << 30})
EAGER = SMALL.model_copy(update={"extra": {**SMALL.extra, "enforce_eager": True}})  # it starts sooner


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    size = read_json(model / "config.json")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return build_tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=1, **{name: size[name] for name in names})


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    log = tmp_path_factory.mktemp("sampler") / "sampler.log"
    made = VLLMSampler(max_model_len=lambda: 64, log=log, engine=SMALL)
    yield made
    made.close()


def assert_agrees(model: Path, sampled: list[list[Completion]]) -> None:
    """The engine's log-probabilities are the model's, but for the rounding of bfloat16."""
    from iterdpo.training.logps import score_completions

    prompts = [prompt for prompt, group in zip(PROMPTS, sampled, strict=True) for _ in group]
    completions = [completion for group in sampled for completion in group]
    expected = score_completions(model, prompts, [c.token_ids for c in completions], precision="fp32")
    tokens = sum(len(c.token_ids) for c in completions)
    gaps = (abs(sum(c.logprobs) - score) for c, score in zip(completions, expected, strict=True))
    assert sum(gaps) / tokens < 0.02


def test_many_batches_in_flight_have_the_models_logprobs_before_and_after_sleep_and_reload(
    sampler: VLLMSampler, model: Path, other: Path
) -> None:
    batches = [(PROMPTS[at : at + 2], [at, at + 1]) for at in range(0, len(PROMPTS), 2)]

    def sampled() -> list[list[Completion]]:
        return [group for batch in sampler.sample_batches(batches, PARAMETERS) for group in batch]

    for policy in (model, other, model):
        sampler.load(policy, str(policy))
        assert_agrees(policy, sampled())
        sampler.release()
        sampler.load(policy, str(policy))  # awake again, with the same weights
        assert_agrees(policy, sampled())
        sampler.release()


def test_a_run_of_two_rounds_goes_on_after_a_kill_and_samples_no_shard_again(tmp_path: Path, model: Path) -> None:
    workspace = Workspace(tmp_path / "run", model)
    workspace.config["sampling"] |= {"shard_size": 1, "max_tokens": 300, "engine": EAGER.model_dump()}
    workspace.config["dpo"]["precision"] = "bf16"
    workspace.write(rounds=2)
    run = workspace.run_dir
    kill_when(workspace, sampling, "--no-prefect")
    completions = run / "round-001" / "completions"
    partial = completions.with_name("completions.partial")
    before = {p.name: p.stat().st_mtime_ns for d in (completions, partial) for p in d.glob("shard-*.parquet")}
    assert before
    result = workspace.iterdpo("run", str(workspace.root / "config.yaml"), "--no-prefect")
    assert result.returncode == 0, result.stderr
    after = {p.name: p.stat().st_mtime_ns for p in completions.glob("shard-*.parquet")}
    assert before.items() <= after.items()
    for round in (1, 2):
        log = read_jsonl(run / f"round-{round:03d}" / "policy" / "train_log.jsonl")
        assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert read_jsonl(run / "metrics.jsonl")[-1]["round"] == 2

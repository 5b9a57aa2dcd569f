"""LoRA adapters through the whole loop, and through the engine: applied by vLLM itself, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flows import run_rounds
from iterdpo.config import Config, EngineConfig, parse_config
from iterdpo.run.artifacts import read_groups
from iterdpo.run.rundir import read_json, read_jsonl
from iterdpo.sampling import SamplingParameters, VLLMSampler
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.models import adapter_base, load_policy, with_new_adapter
from iterdpo.types import CompletionGroup
from tests.integration.harness import Workspace

pytestmark = pytest.mark.slow

PROMPTS = [[70, 71, 72, 73], [80, 81], [90] * 9, [100, 7, 40]]
SEEDS = [11, 12, 13, 14]
PARAMETERS = SamplingParameters(n=3, temperature=1.0, max_tokens=12)


def longer(prompt: str, completion: str) -> int:
    return len(completion)


def vowels(prompt: str, completion: str) -> int:
    return sum(letter in "aeiou" for letter in completion)


def token_logps(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits.log_softmax(-1)[0]
    return [logps[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def largest_gap(policy: Path, groups: list[CompletionGroup]) -> float:
    """Nats a token, between what the engine reported and what this policy says."""
    model = load_policy(policy).eval()
    return max(
        abs(reported - own)
        for group in groups
        for c in group.completions
        for reported, own in zip(c.logprobs, token_logps(model, group.prompt_ids, c.token_ids), strict=True)
    )


def random_adapter(base: Path, output: Path, *, seed: int, target_modules: str | list[str] = "all-linear") -> Path:
    torch.manual_seed(seed)
    model = with_new_adapter(load_policy(base), r=4, alpha=8, target_modules=target_modules, quantize="none")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished run of two rounds with an adapter."""
    workspace = Workspace(tmp_path_factory.mktemp("adapters"), tiny_model)
    values = {
        **workspace.config,
        "rounds": 2,
        "judge": {"use": "given:below"},
        "evaluation": {"max_logp_gap": 1e-3},
        "sampling": {"n": 3, "max_tokens": 12, "shard_size": 8, "engine": {"dtype": "float32"}},
        "dpo": {"adapter": {"r": 4}, "learning_rate": 2e-2, "pairs_per_step": 4, "precision": "fp32"},
    }
    run_rounds(parse_config(Config, values), judge=longer, heldout_judge=vowels, prefect=False)
    return workspace.run_dir


@pytest.mark.parametrize("number", [1, 2])
def test_a_rounds_policy_is_an_adapter_of_the_initial_checkpoint(run_dir: Path, tiny_model: Path, number: int) -> None:
    policy = run_dir / f"round-00{number}" / "policy"
    assert adapter_base(policy) == str(tiny_model)
    assert not (policy / "config.json").exists()
    assert [file.name for file in policy.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert (policy / "tokenizer.json").exists()
    assert (run_dir / "policy").resolve() == (run_dir / "round-002" / "policy").resolve()


def test_the_second_round_samples_from_the_first_rounds_adapter(run_dir: Path, tiny_model: Path) -> None:
    groups = list(read_groups(run_dir / "round-002" / "completions"))
    assert largest_gap(run_dir / "round-001" / "policy", groups) < 1e-3
    assert largest_gap(tiny_model, groups) > 0.1
    assert list((run_dir / "logs").glob(".merged*")) == []  # the scratch directory is gone


def test_the_policy_moves_away_from_the_initial_one(run_dir: Path) -> None:
    rows = {row["round"]: row for row in read_jsonl(run_dir / "metrics.jsonl")}
    assert rows[1]["kl/to_initial"] > 0.1
    assert read_json(run_dir / "round-002" / "evaluation" / "metrics.json")["sampler/logp_gap"] < 1e-3
    first, second = (read_jsonl(run_dir / f"round-00{t}" / "policy" / "train_log.jsonl")[0] for t in (1, 2))
    assert first["rewards/margins"] == second["rewards/margins"] == 0.0  # each round's reference is where it starts


def test_transformers_loads_the_policy(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = run_dir / "policy"
    loaded = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(policy)("Tale", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, load_policy(policy).eval()(ids).logits)


def test_the_engine_moves_between_adapters_and_their_base(tmp_path: Path) -> None:
    base = build_tiny_checkpoint(tmp_path / "base", tie_word_embeddings=False)
    policies = {
        "first": random_adapter(base, tmp_path / "first", seed=5),
        "base": base,
        "head": random_adapter(base, tmp_path / "head", seed=6, target_modules=["q_proj", "lm_head"]),
        "second": random_adapter(base, tmp_path / "second", seed=7, target_modules=["v_proj", "down_proj"]),
    }
    log = tmp_path / "sampler.log"
    engine = EngineConfig(dtype="float32", lora="vllm")
    sampler = VLLMSampler(max_model_len=lambda: 64, log=log, engine=engine, adapter_rank=4)
    try:
        sampled: dict[str, Any] = {}
        for name in ("first", "base", "head", "base", "second", "first"):
            sampler.load(policies[name], name)
            found = sampler.sample(PROMPTS, SEEDS, PARAMETERS)
            groups = [CompletionGroup(None, *row) for row in zip(PROMPTS, found, strict=True)]  # type: ignore[arg-type]
            assert largest_gap(policies[name], groups) < 1e-3, name
            assert sampled.setdefault(name, found) == found
    finally:
        sampler.close()
    merged = [line for line in log.read_text().splitlines() if line.startswith("merging the adapter")]
    assert len(merged) == 1  # "head": vLLM's CPU backend does not let go of an adapted head

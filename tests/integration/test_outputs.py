"""What a run leaves behind opens with the tools that people use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from iterdpo import read_run
from iterdpo.run.rundir import read_jsonl
from tests.integration.harness import Workspace

pytestmark = pytest.mark.slow

REQUIRED = [
    "round",
    "score/train_judge",
    "score/heldout_judge",
    "win_rate/vs_initial",
    "win_rate/vs_initial_low",
    "win_rate/vs_initial_high",
    "win_rate/vs_previous",
    "kl/to_initial",
    "length/mean_tokens",
    "pairs/kept",
    "pairs/tied",
    "pairs/unjudged",
    "rewards/accuracies",
    "rewards/margins",
    "time/sample_s",
    "time/judge_s",
    "time/train_s",
    "time/evaluate_s",
    "time/round_s",
]


def test_metrics_have_a_line_a_round_from_the_initial_policy_on(finished: Workspace) -> None:
    lines = read_jsonl(finished.run_dir / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert set(REQUIRED) <= line.keys()
    assert lines[0]["kl/to_initial"] == 0.0
    for line in lines[1:]:
        assert all(line[name] is not None for name in REQUIRED)
        assert (
            0 <= line["win_rate/vs_initial_low"] <= line["win_rate/vs_initial"] <= line["win_rate/vs_initial_high"] <= 1
        )
        groups = line["pairs/tied"] + line["pairs/unjudged"] + line["pairs/identical"] + line["pairs/truncated"]
        assert line["pairs/kept"] + groups == line["prompts/sampled"] == 16


def test_rounds_share_no_prompt_with_each_other_nor_with_the_heldout_set(finished: Workspace) -> None:
    run = read_run(finished.run_dir)
    first, second = (set(run.completions(t).prompt_id) for t in (1, 2))
    heldout = set(run.evaluation(0).prompt_id)
    assert len(first) == len(second) == 16
    assert len(heldout) == 8
    assert not first & second
    assert not (first | second) & heldout
    assert set(run.evaluation(2).prompt_id) == heldout


def test_the_second_round_samples_from_the_first_rounds_policy(finished: Workspace) -> None:
    trained = json.loads((finished.run_dir / "round-001" / "round.json").read_text())
    sampled = json.loads((finished.run_dir / "round-002" / "completions" / "MANIFEST.json").read_text())
    assert trained["decision"] == "promote"
    assert sampled["inputs"]["policy"] == trained["policy_digest"]
    assert sampled["inputs"]["policy"] != sampled["inputs"]["model"]


def test_implicit_rewards_are_exactly_zero_at_the_first_step_of_every_round(finished: Workspace) -> None:
    log = read_run(finished.run_dir).train_log()
    first_steps = log[log.step == 1]
    assert len(first_steps) == 2
    assert (first_steps["rewards/chosen"] == 0).all()
    assert (first_steps["rewards/rejected"] == 0).all()


def test_trl_trains_on_the_pairs_unchanged(finished: Workspace, tiny_model: Path, tmp_path: Path) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = datasets.load_dataset(str(finished.run_dir / "round-001" / "pairs"), cache_dir=str(tmp_path), split="train")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=4,
            max_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693, abs=1e-3)


def test_vllm_and_transformers_load_the_policy(finished: Workspace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = finished.run_dir / "policy"
    assert policy.resolve() == (finished.run_dir / "round-002" / "policy").resolve()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    assert model.config.vocab_size == len(tokenizer)
    program = (
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM({str(policy)!r}, enforce_eager=True, max_model_len=64, dtype='float32')\n"
        "out = llm.generate('Tale 1, of the', SamplingParams(max_tokens=4), use_tqdm=False)\n"
        "print('TOKENS', len(out[0].outputs[0].token_ids))\n"
    )
    environment = {**finished.environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "TOKENS" in result.stdout, result.stderr[-2000:]


def test_the_screen_has_a_line_a_stage_and_the_noise_is_in_the_logs(finished: Workspace) -> None:
    screen = (finished.root / "screen.txt").read_text()
    for stage in ("sample", "judge", "pair", "train", "evaluate", "score"):
        assert any(line.startswith(f"  {stage} ") for line in screen.splitlines()), stage
    for noise in ("INFO", "WARNING", "Loading", "Traceback", "vllm"):
        assert noise not in screen
    for name in ("sampler", "train", "prefect"):
        assert (finished.run_dir / "logs" / f"{name}.log").stat().st_size > 0
    assert (finished.run_dir / "report.html").stat().st_size > 10_000

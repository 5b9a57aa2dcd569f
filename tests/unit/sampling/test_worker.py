"""The vLLM worker without an engine; tests/integration/test_sampling.py has a real one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from iterdpo.config import EngineConfig
from iterdpo.sampling.base import Start, Started
from iterdpo.sampling.worker import Worker, adapts_head, completion_of, cpu_defaults
from iterdpo.types import Completion

START = Start("policy", EngineConfig(), 64, False, lora="auto", adapter_rank=4, scratch="scratch")


class Refusing(Worker):
    """Its engine does not start."""

    def __init__(self, *, native: bool, lora: str) -> None:
        self.native, self.lora = native, lora

    def _start(self, request: Start) -> None:
        raise ValueError("no LoRA yet")


def test_an_engine_that_may_start_without_adapters_says_why_it_did_not_with_them() -> None:
    assert Refusing(native=True, lora="auto").start(START) == Started(no_adapters="ValueError: no LoRA yet")


@pytest.mark.parametrize(("native", "lora"), [(True, "vllm"), (False, "auto"), (False, "merge")])
def test_any_other_engine_that_does_not_start_is_an_error(native: bool, lora: str) -> None:
    with pytest.raises(ValueError, match="no LoRA yet"):
        Refusing(native=native, lora=lora).start(START)


def test_a_completion_has_the_log_probability_of_each_sampled_token() -> None:
    logprobs = Namespace(token_ids=[5, 6, 7], logprobs=[-0.5, -0.1, -2.0], start_indices=[0, 2], end_indices=[2, 3])
    output = Namespace(text="hi", token_ids=(5, 7), logprobs=logprobs, finish_reason="length")
    assert completion_of(output) == Completion("hi", [5, 7], [-0.5, -2.0], "length")
    output.finish_reason = None
    assert completion_of(output).finish_reason == "stop"


def test_a_cpu_engine_prefills_the_longest_prompt_in_one_piece() -> None:
    assert cpu_defaults(64)["max_num_batched_tokens"] == 4096
    assert cpu_defaults(9000)["max_num_batched_tokens"] == 9000


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("base_model.model.lm_head.lora_A.weight", True),
        ("base_model.model.embed_out.lora_B.weight", True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", False),
        ("base_model.model.my_lm_head.lora_A.weight", False),
    ],
)
def test_an_adapter_of_the_output_head_is_told_by_its_tensors_names(tmp_path: Path, name: str, head: bool) -> None:
    save_file({name: np.zeros((1, 1))}, tmp_path / "adapter_model.safetensors")
    assert adapts_head(tmp_path) is head

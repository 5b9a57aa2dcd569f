"""What an adapter changes; tests/integration/test_adapters.py merges real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from iterdpo.sampling.merge import adapts_head


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

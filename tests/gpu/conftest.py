"""A model that is large enough for a GPU's kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iterdpo.testing import build_tiny_checkpoint

# A pool of processes to compile with takes longer to start than the few kernels of these tests take.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 110 million parameters."""
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    return build_tiny_checkpoint(tmp_path_factory.mktemp("model"), num_key_value_heads=16, **size)

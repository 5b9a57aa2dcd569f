"""A model that is large enough for a GPU's kernels, and pairs."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from iterdpo.data.pairs import write_pairs
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import Completion, PreferencePair, Prompt


@pytest.fixture(autouse=True, scope="session")
def no_pool_to_compile_with() -> None:
    """It takes longer to start than the few kernels of these tests take."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 110 million parameters."""
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    return build_tiny_checkpoint(tmp_path_factory.mktemp("model"), num_key_value_heads=16, **size)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 259) for _ in range(rng.randrange(low, high))]

    def completion() -> Completion:
        return Completion("text", ids(16, 200), [], "stop")

    prompts = [ids(8, 100) for _ in range(20)]  # three pairs of each
    rows = [PreferencePair(Prompt(f"p{i % 20}", "x"), prompts[i % 20], completion(), completion()) for i in range(60)]
    directory = tmp_path_factory.mktemp("pairs")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"

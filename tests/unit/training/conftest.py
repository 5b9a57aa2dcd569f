"""Pairs and models of the tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iterdpo.data.pairs import write_pairs
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import PreferencePair, Prompt
from tests.unit.training.rounds import completion, random_ids


@pytest.fixture
def the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "iterdpo.training.step.matmul_peak", lambda device, dtype: 1e12
    )  # measuring it takes longer than a run


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pairs of as many prompts."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        return random_ids(generator, low, high)

    rows = [
        PreferencePair(Prompt(f"p{i}", "x"), ids(2, 8), completion(ids(3, 12)), completion(ids(3, 12)))
        for i in range(22)
    ]
    directory = tmp_path_factory.mktemp("pairs")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"


@pytest.fixture(scope="session")
def rows() -> list[PreferencePair]:
    """Eight pairs of three prompts, some of which have a completion in common."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, sides in enumerate([[(0, 1), (0, 2), (3, 2)], [(0, 1), (2, 1)], [(0, 1), (1, 2), (2, 3)]]):
        prompt = random_ids(generator, 4, 20)
        completions = [completion(random_ids(generator, 2, 14)) for _ in range(4)]
        found += [
            PreferencePair(Prompt(f"p{number}", "x"), prompt, completions[chosen], completions[rejected])
            for chosen, rejected in sides
        ]
    return found


@pytest.fixture(scope="session")
def grouped(rows: list[PreferencePair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rows` as a file."""
    directory = tmp_path_factory.mktemp("grouped")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"


@pytest.fixture(scope="session")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks at its context: with the usual small weights every token is about as likely."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("sharp"), initializer_range=0.15)

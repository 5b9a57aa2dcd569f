"""The directory that a test of stages works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.stages.harness import Room


@pytest.fixture
def room(tmp_path: Path, tiny_model: Path) -> Iterator[Room]:
    with ExitStack() as stack:
        yield Room(tmp_path, tiny_model, stack)

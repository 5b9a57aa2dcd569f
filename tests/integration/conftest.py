"""Fixtures over `harness.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.harness import Workspace


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "workspace", tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workspace:
    """A finished run of two rounds, made by the command line without a Prefect server."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"), tiny_model)
    result = workspace.iterdpo("run", str(workspace.write(rounds=2)), "--no-prefect")
    assert result.returncode == 0, result.stdout + result.stderr
    return workspace

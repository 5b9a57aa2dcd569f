"""Fixtures over `harness.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.integration.harness import Workspace


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "workspace", tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workspace:
    """A finished run of two rounds, made by the command line without a Prefect server, once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "finished.lock"):
        workspace = Workspace(shared / "finished", tiny_model)
        if not (workspace.root / "done").exists():
            result = workspace.iterdpo("run", str(workspace.write(rounds=2)), "--no-prefect")
            assert result.returncode == 0, result.stdout + result.stderr
            (workspace.root / "done").touch()
    return workspace

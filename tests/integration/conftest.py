"""Fixtures over `harness.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.integration.harness import Workspace, train_here


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "workspace", tiny_model)


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    train_here(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workspace:
    """A finished run of two rounds, made by the command line, once for all workers. `screen.txt` is what it printed."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "finished.lock"):
        workspace = Workspace(shared / "finished", tiny_model)
        if not (workspace.root / "done").exists():
            result = workspace.iterdpo("run", str(workspace.write(rounds=2)))
            assert result.returncode == 0, result.stdout + result.stderr
            (workspace.root / "screen.txt").write_text(result.stdout + result.stderr)
            (workspace.root / "done").touch()
    return workspace


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser. Of a module's scope: while it is there, `asyncio.run` fails in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a system Chromium or Chrome (apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()

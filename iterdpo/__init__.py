"""Iterative DPO: sample from the policy, judge, pair, train, evaluate on held-out prompts, promote.

    from iterdpo import load_config, read_run

The loop itself is started from `flows` (`run_rounds`, `train_offline`), which puts judges and stages together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iterdpo.config import Config, OfflineConfig, load_config, load_offline_config
    from iterdpo.report.page import write_report
    from iterdpo.run.read import Run, read_run

__all__ = ["Config", "OfflineConfig", "Run", "load_config", "load_offline_config", "read_run", "write_report"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # pandas and matplotlib load when they are first used
    if name not in __all__:
        raise AttributeError(f"module 'iterdpo' has no attribute {name!r}")
    modules = {"Run": "run.read", "read_run": "run.read", "write_report": "report.page"}
    return getattr(importlib.import_module(f"iterdpo.{modules.get(name, 'config')}"), name)

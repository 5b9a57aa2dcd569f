"""Iterative DPO: sample from the policy, judge, pair, train, evaluate on held-out prompts, promote.

    from iterdpo import load_config, read_run

The loop itself is started from `flows` (`run_rounds`, `train_offline`), which puts judges and stages together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iterdpo.config import Config as Config
    from iterdpo.config import OfflineConfig as OfflineConfig
    from iterdpo.config import load_config as load_config
    from iterdpo.config import load_offline_config as load_offline_config
    from iterdpo.report.page import write_report as write_report
    from iterdpo.run.read import Run as Run
    from iterdpo.run.read import read_run as read_run

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "iterdpo.config",
    "OfflineConfig": "iterdpo.config",
    "load_config": "iterdpo.config",
    "load_offline_config": "iterdpo.config",
    "Run": "iterdpo.run.read",
    "read_run": "iterdpo.run.read",
    "write_report": "iterdpo.report.page",
}


def __getattr__(name: str) -> Any:  # pandas and matplotlib load when they are first used
    if name not in _PUBLIC:
        raise AttributeError(f"module 'iterdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)

"""The composition root: the loop, its Prefect flow, the command line, and the calls for scripts and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.api import run_rounds as run_rounds
    from flows.api import train_offline as train_offline


def __getattr__(name: str) -> Any:
    if name not in ("run_rounds", "train_offline"):
        raise AttributeError(f"module 'flows' has no attribute {name!r}")
    from flows import api

    return getattr(api, name)

"""What the command line prints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import flows.api
from flows.cli import main


def test_train_prints_the_figures_that_the_loss_has_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # sft logs no rewards: metrics.jsonl has null there, and its one row reads back as None
    metrics = pd.DataFrame([{"loss": 4.95, "eval_loss": 4.88, "rewards/margins": None, "eval_rewards/margins": None}])
    finished = SimpleNamespace(metrics=metrics, root=tmp_path)
    monkeypatch.setattr(flows.api, "train_offline", lambda *args, **kwargs: finished)
    overrides = [f"run_dir={tmp_path}", "model.path=model", "data.path=pairs.jsonl", "dpo.loss=sft"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *overrides])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "4.9500" in printed
    assert "4.8800" in printed
    assert "margins" not in printed

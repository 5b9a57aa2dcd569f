from __future__ import annotations

import os
from pathlib import Path

import pytest

from iterdpo.report import page
from iterdpo.report.page import refresh_report


def test_the_page_is_written_again_only_if_it_is_missing_or_older_than_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, metrics, written = tmp_path / "report.html", tmp_path / "metrics.jsonl", []

    def write_report(run_dir: Path) -> Path:
        written.append(run_dir)
        report.write_text("<html>")
        return report

    monkeypatch.setattr(page, "write_report", write_report)
    refresh_report(tmp_path)
    assert written == []  # no round has ended

    metrics.write_text("{}\n")
    refresh_report(tmp_path)
    refresh_report(tmp_path)
    assert written == [tmp_path]

    os.utime(report, ns=(0, metrics.stat().st_mtime_ns - 1))  # the run ended between the two
    refresh_report(tmp_path)
    assert written == [tmp_path] * 2

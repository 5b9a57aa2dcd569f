"""What the command line takes and prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main


def said(*arguments: str, status: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == status
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.slow
def test_train_prints_the_figures_that_the_loss_has_and_no_others(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Tale {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"run_dir={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.path={tmp_path / 'pairs.jsonl'}"]
    # sft logs no rewards: metrics.jsonl has null there
    printed = said("train", *overrides, "dpo.loss=sft", "data.heldout=2", "dpo.precision=fp32", status=0, capsys=capsys)
    assert re.search(r"^  loss +\d\.\d{4}$", printed, re.MULTILINE)
    assert re.search(r"^  eval_loss +\d\.\d{4}$", printed, re.MULTILINE)
    assert "rewards" not in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run",), "CONFIG"),
        (("run", "a.yaml", "--rounds", "3"), "--rounds"),
        (("status",), "RUN_DIR"),
        (("show", "a"), "--round"),
        (("status", "a", "b"), "'b'|b\\b"),
        (("fly",), "fly"),
        (("run", "a.yaml", "--[/red]"), r"--\[/red\]"),
        (("judge", "check", "length"), "--data"),
        (("judge", "check", "length", "--data", "x", "--limit", "0"), "Must be >= 1"),
        (("judge", "check", "length", "--data", "x", "--confidence", "1"), "Must be < 1"),
        (("judge", "check", "length", "--data", "x", "--role", "both"), "--role"),
        (("judge", "try", "length", "2+2?"), "COMPLETIONS"),
    ],
)
def test_a_command_that_cannot_be_read_is_refused_with_the_word_that_is_wrong(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = said(*arguments, status=2, capsys=capsys)
    assert printed.startswith("iterdpo: ")
    assert re.search(complaint, printed)


def test_a_run_directory_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = said("status", str(tmp_path), status=2, capsys=capsys)
    assert str(tmp_path) in printed
    assert len(printed.splitlines()) == 1


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from iterdpo import __version__

    assert said("--version", status=0, capsys=capsys) == f"iterdpo {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flows.cli import app; app(['--help']); "
        "print([m for m in ('numpy', 'pandas', 'torch', 'aiohttp', 'prefect', 'pydantic', 'yaml') if m in sys.modules])"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert {"quickstart", "run", "train", "serve", "judge", "report", "status", "show"} <= set(ended.stdout.split())


@pytest.mark.parametrize(
    "code", ["cli.main(['runs', '.'])", "cli.app = lambda argv: print('word ' * 10_000); cli.main()"]
)
def test_a_command_whose_output_is_no_longer_read_ends_quietly(code: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", f"from flows import cli; {code}"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_broken_pipe_to_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(argv: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("flows.cli.app", asked)
    with pytest.raises(BrokenPipeError):
        main([])


def test_ctrl_c_does_not_wait_for_what_is_queued_in_the_threads_of_a_judge() -> None:
    script = """
import time
from concurrent.futures import ThreadPoolExecutor
from flows import cli

def interrupted(argv):
    raise KeyboardInterrupt

pool = ThreadPoolExecutor(1)
for _ in range(100):
    pool.submit(time.sleep, 10)
cli.app = interrupted
print("said before", end="")
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout == "said before"
    assert "interrupted; the same command continues" in done.stderr

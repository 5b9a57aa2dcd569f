"""`iterdpo show`: completions as a person reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import app
from flows.show import show_completions
from iterdpo.errors import UserError
from iterdpo.run.artifacts import write_completion_shard, write_judgment_shard
from iterdpo.run.rundir import RunDir
from iterdpo.testing import make_group
from iterdpo.types import Judgment


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A round with three prompts, the last with a completion that would clear the screen."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.write_config({"model": {"path": "org/base"}})
    groups = [
        make_group("cats?", ["yes", "no!"]),
        make_group("dogs?", ["a\nb", ""]),
        make_group("fish?", ["\x1b[2J", "x"]),
    ]
    scores = [Judgment(g.prompt.id, [0.9, None], [None, "too\x07 short"]) for g in groups]
    for name in ("completions", "judgments"):
        (run.round_dir(1) / name).mkdir(parents=True)
    write_completion_shard(run.round_dir(1) / "completions" / "shard-000000.parquet", groups)
    write_judgment_shard(run.round_dir(1) / "judgments" / "shard-000000.jsonl", scores)
    return run.root


def shown(run_dir: Path, prompt: str | None = None, limit: int = 5) -> str:
    return "\n".join(show_completions(run_dir, round=1, prompt=prompt, limit=limit))


def test_a_prompt_is_found_by_its_words_or_by_the_beginning_of_its_id(run_dir: Path) -> None:
    dogs = make_group("dogs?", []).prompt.id
    assert shown(run_dir, "dogs") == shown(run_dir, dogs[:8])
    assert "cats?" not in shown(run_dir, "dogs")
    with pytest.raises(UserError, match="round 1 has no prompt 'birds'"):
        shown(run_dir, "birds")


def test_each_completion_has_its_score_or_the_reason_for_none(run_dir: Path) -> None:
    text = shown(run_dir, "cats")
    assert "[0] 3 tokens, stop, score 0.9\n      yes" in text
    assert "[1] 3 tokens, stop, score: abstained (too\\x07 short)\n      no!" in text


def test_lines_stay_lines_and_nothing_reaches_the_terminal_as_control_characters(run_dir: Path) -> None:
    text = shown(run_dir)
    assert "      a\n      b" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_no_more_prompts_than_asked_for_are_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["show", str(run_dir), "--round", "1", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert ("cats?" in out, "dogs?" in out, "fish?" in out) == (True, True, False)

"""The Python calls: what they try before anything heavy begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flows import run_rounds
from flows.api import check_surroundings, open_run
from iterdpo.config import Config, parse_config
from iterdpo.errors import JudgeError, UserError
from iterdpo.run import supervise
from iterdpo.testing import FakeSampler


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(16)))
    (tmp_path / "judge.py").write_text("import no_such_package\n\ndef score(completion):\n    return 1.0\n")
    return {
        "run_dir": str(tmp_path / "run"),
        "rounds": 1,
        "model": {"path": str(tiny_model)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_round": 4, "heldout": 4},
        "judge": {"use": f"{tmp_path / 'judge.py'}:score"},
    }


def test_a_judge_that_cannot_be_imported_is_named_before_the_sampler_is_asked(config: dict[str, Any]) -> None:
    sampler = FakeSampler(lambda ids, k: f"Blue {k}")
    with pytest.raises(JudgeError, match="no_such_package"):
        run_rounds(parse_config(Config, config), sampler=sampler, prefect=False)
    assert sampler.loaded == []
    assert not (Path(config["run_dir"]) / "run.json").exists()


def test_a_judge_that_is_given_as_an_object_is_not_imported(config: dict[str, Any]) -> None:
    check_surroundings(open_run(parse_config(Config, config), judge=len_of), prefect=False)


def len_of(completion: str) -> int:
    return len(completion)


def test_each_judge_sees_the_part_of_completions_that_its_section_says(config: dict[str, Any]) -> None:
    config["judge"]["sees"] = "completion"
    config["evaluation"] = {"judge": {"use": "regex", "args": {"pattern": "x"}}}
    run = open_run(parse_config(Config, config))
    assert [judge.named.sees for judge in run.judges] == ["completion", "answer"]
    assert ["sees" in judge.key for judge in run.judges] == [True, False]


def test_only_the_policies_to_come_have_to_fit_on_the_disk(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("iterdpo.stages.runs.check_space", lambda directory, count: needed.append(count))
    for rounds in (1, 3):
        open_run(parse_config(Config, config | {"rounds": rounds})).check_space()
    policy = (needed[1] - needed[0]) // 2
    assert needed == [3 * policy, 5 * policy]  # a policy a round, and two moments
    (Path(config["run_dir"]) / "round-001" / "policy").mkdir(parents=True)
    open_run(parse_config(Config, config | {"rounds": 3})).check_space()
    assert needed[-1] == 4 * policy
    open_run(parse_config(Config, config)).check_space()
    assert len(needed) == 3  # nothing is to come


def test_the_key_of_a_judge_is_kept_from_children(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_withheld", set())
    monkeypatch.setenv("THE_JUDGES_KEY", "sk-1")
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "THE_JUDGES_KEY"}
    config["judge"] = {"use": "pairwise", "args": {"model": "m", "endpoint": endpoint}}
    run = open_run(parse_config(Config, config))
    assert "THE_JUDGES_KEY" not in supervise.environment(os.environ)
    with pytest.raises(UserError, match="connection refused"):
        check_surroundings(run, prefect=False)

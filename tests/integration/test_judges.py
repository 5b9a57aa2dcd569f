"""Judges as a new user writes them, each in at most ten lines and each driving a real round; a failing endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import run_rounds
from iterdpo.config import Config, parse_config
from iterdpo.errors import JudgingStopped
from iterdpo.run.artifacts import read_judgments
from iterdpo.run.rundir import read_jsonl, read_manifest, write_jsonl
from iterdpo.testing import FakeSampler
from iterdpo.testing_http import FakeEndpoint
from tests.integration.harness import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trained_here")]

GOLD = """
import re

def exact(completion: str, gold: str) -> float:
    numbers = re.findall(r"-?\\d+", completion)
    return float(numbers[-1:] == [gold])
"""

ENDPOINT = """
import os
import aiohttp

class Remote:
    concurrency = 8

    async def score(self, completion: str) -> float:
        body = {"messages": [{"role": "user", "content": completion}]}
        async with aiohttp.request("POST", os.environ["MY_JUDGE"] + "/chat/completions", json=body) as reply:
            return float((await reply.json())["choices"][0]["message"]["content"])
"""


def sampler() -> FakeSampler:
    return FakeSampler(lambda ids, k: f"<think>\nhm\n</think>\n{k}" if k % 2 else "abcdefghij"[: 3 + (k + ids[-1]) % 7])


def round_of(workspace: Workspace, use: str, args: dict[str, Any] | None = None, **judge: Any) -> Path:
    values = {
        **workspace.config,
        "rounds": 1,
        "judge": {"use": use, "args": args or {}, **judge},
        "evaluation": {"max_logp_gap": 1e3},
    }
    run_rounds(parse_config(Config, values), sampler=sampler(), prefect=False)
    return workspace.run_dir


def rewrite(workspace: Workspace, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = Path(workspace.config["prompts"]["path"])
    write_jsonl(path, [change(row) for row in read_jsonl(path)])


@pytest.mark.parametrize("kind", ["gold", "endpoint", "trl"])
def test_a_judge_of_ten_lines_drives_a_round(
    workspace: Workspace, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my_judges.py"
    with FakeEndpoint(lambda body: str(len(body["messages"][-1]["content"]))) as server:
        monkeypatch.setenv("MY_JUDGE", server.base_url)
        match kind:
            case "gold":
                rewrite(workspace, lambda row: {**row, "gold": "1"})
                file.write_text(GOLD)
                run = round_of(workspace, f"{file}:exact")
            case "endpoint":
                file.write_text(ENDPOINT)
                run = round_of(workspace, f"{file}:Remote")
            case "trl":  # TRL's own reads messages
                rewrite(workspace, lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
                run = round_of(workspace, "trl.rewards:think_format_reward")
    for source in (GOLD, ENDPOINT):
        assert len([line for line in source.splitlines() if line.strip()]) <= 10
    [_, last] = read_jsonl(run / "metrics.jsonl")
    assert last["pairs/kept"] > 0
    assert last["judge/abstained"] == 0
    assert last["loss"] is not None


def verdict(body: dict[str, Any]) -> str:
    """Prefers the longer of the two fenced completions, whatever the order."""
    texts = re.findall(r"(?:<think>[^<]*</think>\s*\d|\babc\w*)", body["messages"][-1]["content"])[-2:]
    return (
        "Verdict: A"
        if len(texts[0]) > len(texts[-1])
        else "Verdict: B"
        if len(texts[0]) < len(texts[-1])
        else "Verdict: tie"
    )


def test_a_language_model_judges_a_round_and_the_evaluation_by_comparing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FakeEndpoint(verdict) as server:
        run = round_of(workspace, "pairwise", {"model": "judge", "endpoint": {"base_url": server.base_url}})
    [_, last] = read_jsonl(run / "metrics.jsonl")
    assert last["judge/flip_rate"] == 0.0
    assert last["judge/first_position"] == 0.5
    assert last["judge/calls"] > 0
    assert last["win_rate/vs_initial"] == 0.5  # the fake sampler says the same whatever the policy
    manifest = read_manifest(run / "round-001" / "judgments")
    assert manifest is not None
    assert manifest.seconds["streamed"] > 0  # judged while the sampler went on


def test_with_the_endpoint_down_the_stage_stops_and_goes_on_when_it_is_back(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    up = False

    def verdict_if_up(body: dict[str, Any]) -> Any:
        asked_before_the_run = body["messages"][0]["content"] == "Say yes."
        return "yes" if asked_before_the_run else verdict(body) if up else {"status": 503}

    with FakeEndpoint(verdict_if_up) as server:
        settings = {"base_url": server.base_url, "attempts": 2, "backoff": 0.01, "give_up_after": 4}
        args = {"model": "judge", "endpoint": settings}
        with pytest.raises(
            JudgingStopped, match=r"the judge abstained on \d+ of \d+ completions(?s:.*)the endpoint is down"
        ):
            round_of(workspace, "pairwise", args)
        up = True
        run = round_of(workspace, "pairwise", args)
    judgments = list(read_judgments(run / "round-001" / "judgments"))
    assert judgments
    assert not [s for j in judgments for s in j.scores if s is None]

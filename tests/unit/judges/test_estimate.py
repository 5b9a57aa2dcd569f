"""Calls, tokens and dollars of a judge, counted without asking: against what the same judge then asks a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.judge_cli import app
from iterdpo.judging.judge import checked_judgments
from iterdpo.run.rundir import write_jsonl
from iterdpo.testing import make_group
from iterdpo.testing_http import FakeEndpoint
from judges import load_judge
from judges.audit.attacks import ATTACKS
from judges.estimate import estimate

GROUPS = [
    make_group(f"Question {i}?", ["one", "two", "three", "four", "two"][:k], rubrics=["x", "y", "z"])
    for i, k in enumerate((2, 4, 5))
]


def reply(body: dict[str, Any]) -> dict[str, Any]:
    asked = str(body["messages"][-1]["content"])
    for line in ("Verdict", "Met", "Ranking"):
        if f"{line}: " in asked:
            break
    said = {
        "Verdict": "Verdict: A",
        "Met": "Met: yes",
        "Ranking": "Ranking: " + " > ".join("1234"[: asked.count("<text-") - 1]),
    }
    return {"text": said[line] if "Score: _" not in asked else "Score: 3", "logprobs": {"A": 0.0, "3": 0.0}}


@pytest.mark.parametrize(
    ("use", "args"),
    [
        ("pairwise", {}),
        ("pairwise", {"soft": True}),
        ("pairwise", {"schedule": "random_pairs", "comparisons": 2}),
        ("pairwise", {"schedule": "knockout"}),
        ("pairwise", {"schedule": "knockout", "soft": True}),
        ("pairwise", {"schedule": "knockout", "pattern": r"Verdict: (A)"}),
        ("rubric", {}),
        ("rubric", {"expected": True, "scale": [0, 9]}),
        ("listwise", {"orders": 1}),
        ("listwise", {}),
        ("checklist", {}),
    ],
)
def test_the_calls_that_are_counted_are_those_that_are_made(use: str, args: dict[str, Any]) -> None:
    with FakeEndpoint(reply) as server:
        endpoint = {"base_url": server.base_url, "cache": "off", "price_in": 2.0, "price_out": 3.0}
        full = {"model": "m", "endpoint": endpoint, "constrain": "none", **args}
        found = estimate(use, full, GROUPS)
        assert server.requests == 0
        judge = load_judge(use, full)
        checked_judgments(judge, GROUPS)
        used = judge.usage()
    assert found.calls == used["calls"] - used["cached"] == server.requests
    assert found.tokens_out >= found.calls
    assert found.tokens_in == pytest.approx(used["tokens_in"], rel=0.02)
    assert found.dollars == pytest.approx((2 * found.tokens_in + 3 * found.tokens_out) / 1e6)


def test_a_judge_of_judges_is_the_sum_of_those_within_it(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def score(completion):\n    return 1\n\n\ndef both(a, b):\n    return 'a'\n")
    group = [make_group("q", ["a", "b", "c"])]

    def llm(**prices: float) -> dict[str, Any]:
        endpoint = {"base_url": "http://127.0.0.1:9/v1", **prices}
        return {"use": "rubric", "args": {"model": "m", "endpoint": endpoint, "constrain": "none"}}

    assert estimate(f"{tmp_path}/my.py:score", {}, group).calls == 3
    assert estimate(f"{tmp_path}/my.py:both", {}, group).calls == 6
    assert estimate("exact_match", {}, group).calls == 3
    assert estimate("pair_ranker", {"model": str(tmp_path)}, group).calls == 6
    members = [llm(price_in=1.0), {"use": f"{tmp_path}/my.py:score"}]
    found = estimate("ensemble", {"judges": members}, group)
    assert (found.calls, found.unpriced) == (6, False)
    assert found.dollars == pytest.approx(found.tokens_in / 1e6)
    assert found * 2 == found + found
    found = estimate("clip", {"judge": {"use": "ensemble", "args": {"judges": [*members, llm()]}}, "low": 0}, group)
    assert (found.calls, found.unpriced) == (9, True)
    assert "US dollars; for the cost, set endpoint.price_in" in found.tokens()


def test_a_dry_check_counts_the_data_and_the_attacks_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "id": str(i)} for i in range(5)
    ]
    write_jsonl(tmp_path / "rb2.jsonl", rows)
    with FakeEndpoint(reply) as server:
        endpoint = {"base_url": server.base_url, "price_in": 1.0, "price_out": 1.0}
        judge = {"use": "pairwise", "args": {"model": "m", "endpoint": endpoint, "constrain": "none"}}
        (tmp_path / "judge.yaml").write_text(json.dumps({"judge": judge}))
        arguments = ("--data", "rb2.jsonl", "--repeats", "2", "--attack", "--dry-run")
        assert app(("check", "judge.yaml", *arguments), result_action="return_value") == 0
        assert server.requests == 0
    said = capsys.readouterr().out.splitlines()
    tried = len(ATTACKS) - 1  # without a translation
    assert said[0] == f"measured  15 pairs of 1 prompts; {5 * 12 * 2} calls"
    assert said[1] == f"attacked  {tried} pairs of 1 prompts; {2 * tried} calls"
    assert said[2] == f"calls     {120 + 2 * tried} in all"
    assert "US dollars" in said[3]

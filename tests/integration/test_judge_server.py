"""Language models as judges behind a real vLLM server that iterdpo starts. The model is random, and the metrics say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import run_rounds
from flows.api import open_run
from iterdpo.config import Config, parse_config
from iterdpo.judging.judge import checked_judgments
from iterdpo.run.artifacts import read_judgments
from iterdpo.run.rundir import Manifest, read_jsonl, read_manifest
from iterdpo.stages.judge import judge
from iterdpo.stages.sample import sample
from iterdpo.testing import FakeSampler, build_tiny_checkpoint, make_group
from judges import load_judge
from judges.llm.server import Server, ServerSettings
from tests.integration.harness import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trained_here")]

PROMPTS = {
    "pairwise": "{{ prompt }} A: {{ a }} B: {{ b }}",
    "rubric": "{{ prompt }} {{ completion }} {{ low }} to {{ high }}?",
    "listwise": "{{ prompt }} {% for c in completions %}{{ loop.index }}: {{ c }} {% endfor %}",
}
CONTEXT = 1024
"""Tokens, of which each is a byte."""


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose weights are so large that each text gives it another opinion."""
    directory = tmp_path_factory.mktemp("opinionated")
    return build_tiny_checkpoint(directory, initializer_range=0.5, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def base_url(opinionated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server(str(opinionated), ServerSettings(max_model_len=CONTEXT))
    server.log = tmp_path_factory.mktemp("server") / "server.log"
    yield server.start()
    server.release()


@pytest.fixture
def args(opinionated: Path, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of a judge of the kind that a test is parametrized with: the model, and a prompt that is short."""
    prompt = tmp_path / "prompt.j2"
    prompt.write_text(PROMPTS[request.getfixturevalue("use")])
    return {"model": str(opinionated), "prompt": str(prompt)}


def config(workspace: Workspace, use: str, args: dict[str, Any]) -> Config:
    values = {
        **workspace.config,
        "prompts": {**workspace.config["prompts"], "per_round": 8, "heldout": 4},
        "judge": {"use": use, "args": args},
        "evaluation": {"max_logp_gap": 1e3},  # the sampler is a fake
    }
    return parse_config(Config, values)


def sampler() -> FakeSampler:
    return FakeSampler(lambda ids, k: "the sea is wide"[: 4 + 3 * k + ids[-1] % 2])


def judged(workspace: Workspace, use: str, args: dict[str, Any]) -> Manifest:
    """The first round of a run up to its judgments."""
    with open_run(config(workspace, use, args), sampler=sampler()) as exp:
        completions = sample(exp, 1, exp.initial, exp.prompts.of(1))
        judgments = judge(exp, 1, completions, exp.train_judge)
    manifest = read_manifest(judgments.path)
    assert manifest is not None
    return manifest


def endpoint(base_url: str) -> dict[str, Any]:
    return {"base_url": base_url, "cache": "off"}


def assert_both_orders(run: Path) -> None:
    for judgment in read_judgments(run / "round-001" / "judgments"):
        shown = [(c.first, c.second) for c in judgment.comparisons]
        assert sorted(shown) == [(i, j) for i in range(3) for j in range(3) if i != j]


@pytest.mark.parametrize("use", ["pairwise"])
def test_a_round_by_a_random_judge_says_how_often_it_contradicts_itself(
    workspace: Workspace, use: str, args: dict[str, Any], base_url: str
) -> None:
    run_rounds(config(workspace, use, {**args, "endpoint": endpoint(base_url)}), sampler=sampler(), prefect=False)
    assert_both_orders(workspace.run_dir)
    [_, last] = read_jsonl(workspace.run_dir / "metrics.jsonl")
    assert last["judge/abstained"] == 0  # a random model says "A", "B" or "tie" because it has to
    assert last["judge/calls"] == 8 * 3 * 2
    assert last["judge/flip_rate"] > 0.2
    assert 0 < last["judge/first_position"] < 1
    assert last["win_rate/vs_initial"] == 0.5  # the fake sampler says the same whatever the policy


@pytest.mark.parametrize("use", ["listwise"])
def test_rankings_by_a_random_judge_are_held_to_their_form(
    workspace: Workspace, use: str, args: dict[str, Any], base_url: str
) -> None:
    counts = judged(workspace, use, {**args, "endpoint": endpoint(base_url)}).counts
    assert_both_orders(workspace.run_dir)
    assert counts["unjudged"] == 0
    assert counts["usage"]["calls"] == 8 * 2
    assert counts["metrics"]["flip_rate"] > 0.2
    assert 0 < counts["metrics"]["first_position"] < 1


@pytest.mark.extended
@pytest.mark.parametrize("use", ["rubric"])
def test_a_judge_serves_itself_for_a_stage_and_leaves_nothing_but_its_log(
    workspace: Workspace, use: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITERDPO_TEST_MARK", workspace.mark)
    serve = {"max_model_len": CONTEXT}
    counts = judged(workspace, use, {**args, "serve": serve, "endpoint": {"cache": "off"}}).counts
    assert workspace.survivors() == []
    assert "Application startup complete" in next((workspace.run_dir / "logs").glob("judge-*")).read_text()
    assert counts["unjudged"] == 0
    assert counts["usage"]["calls"] == 8 * 3
    assert (counts["metrics"]["flip_rate"], counts["metrics"]["first_position"]) == (None, None)  # nothing is compared
    scores = {s for j in read_judgments(workspace.run_dir / "round-001" / "judgments") for s in j.scores}
    assert scores <= set(range(1, 11))
    assert len(scores) > 1


@pytest.mark.parametrize(
    ("use", "more"),
    [
        ("pairwise", {"constrain": "json_schema"}),
        ("pairwise", {"constrain": "json_schema", "ties": False}),
        ("rubric", {"constrain": "json_schema", "scale": [-3, 20]}),
        ("rubric", {"criteria": {"clarity": 3, "brevity": 1}}),
        ("listwise", {"constrain": "json_schema"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_vllm_holds_replies_to_a_json_schema(
    use: str, more: dict[str, Any], args: dict[str, Any], base_url: str
) -> None:
    judge = load_judge(use, {**args, **more, "endpoint": endpoint(base_url)})
    groups = [make_group(f"Tale {n}?", ["the sea", "a wide sea", "the sea is wide, blue"]) for n in range(6)]
    judgments = checked_judgments(judge, groups)
    reasons = {reason for j in judgments for reason in j.abstentions}
    assert reasons <= {None, "not every completion ranked once"}  # no schema forbids that a number comes twice
    assert None in reasons

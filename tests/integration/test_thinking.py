"""Rounds of a thinking model with a tiny template: judged on answers, trained both ways, resumed. No engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flows import run_rounds, train_offline
from iterdpo import read_run
from iterdpo.config import Config, OfflineConfig, parse_config
from iterdpo.errors import DataError
from iterdpo.run.rundir import RunDir
from iterdpo.sampling import SamplingParameters
from iterdpo.stages.offline import prepare_pairs
from iterdpo.stages.runs import OfflineRun
from iterdpo.testing import THINKING, FakeSampler, build_tiny_checkpoint
from iterdpo.types import Completion

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trained_here")]

REPLIES = (
    "<think>\nfirst aaa\n</think>\n\nee eee",
    "<think>\nthen\n</think>\n\nxyz",
    "<think>\nit goes on and on, aaaaaaaaaaaaaaaaaaaaaaaaaa",
    "no thought at all",
)


class Interrupted(Exception):
    """The end of a process, in the middle of a stage."""


class Stopping(FakeSampler):
    """Writes `REPLIES` in an order that depends on the prompt, and is interrupted at its `last` request."""

    def __init__(self, tokenizer: Any, last: int | None = None) -> None:
        super().__init__(lambda ids, k: REPLIES[(k + sum(ids)) % len(REPLIES)], tokenizer=tokenizer)
        self.last, self.requests = last, 0

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        self.requests += 1
        if self.requests == self.last:
            raise Interrupted
        return super().sample(prompt_ids, seeds, parameters)


def vowels(prompt: Any, completion: str, finish_reason: str) -> float:
    """A judge of answers: no thought reaches it."""
    assert "think" not in completion
    assert (finish_reason == "thought") == (completion == "")
    return 1.0 if finish_reason == "thought" else completion.count("e") / len(completion)  # it likes what does not end


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tags = ["<think>", "</think>"]
    return build_tiny_checkpoint(tmp_path_factory.mktemp("thinker"), chat_template=THINKING, tokens=tags)


def config_of(root: Path, model: Path, name: str, **dpo: Any) -> Config:
    rows = [{"prompt": [{"role": "user", "content": f"Tale {i}"}]} for i in range(40)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"learning_rate": 1e-3, "pairs_per_step": 2, "checkpoint_every": 2, "precision": "fp32", **dpo}
    values = {
        "run_dir": str(root / name),
        "rounds": 1,
        "model": {"path": str(model)},
        "prompts": {"path": str(root / "prompts.jsonl"), "per_round": 8, "heldout": 6},
        "sampling": {"n": 4, "max_tokens": 40, "shard_size": 4},
        "judge": {"use": "given:below"},
        "evaluation": {"max_logp_gap": 1e3, "n": 2},
        "dpo": settings,
        "gate": {"minimum": 0.0},
    }
    return parse_config(Config, values)


def digests(run_dir: Path) -> dict[str, str]:
    """Of all that a round made, except what says when."""
    names = ["completions", "judgments", "pairs", "reference", "evaluation"]
    files = [path for name in names for path in sorted((run_dir / "round-001" / name).rglob("shard-*"))]
    files += [run_dir / "round-001" / name for name in ("pairs/train.parquet", "policy/model.safetensors")]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("part", ["completion", "answer"])
def test_a_round_is_judged_on_answers_trained_on_either_part_and_resumed(
    tmp_path: Path, thinker: Path, part: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(thinker)

    def go(name: str, last: int | None = None) -> Path:
        config = config_of(tmp_path, thinker, name, train_on=part)
        sampler = Stopping(tokenizer, last)
        run_rounds(config, judge=vowels, sampler=sampler, prefect=False)
        return Path(config.run_dir)

    whole = go("whole")
    for last in (1, 4):  # in the evaluation of the initial policy, in the round's second shard
        with pytest.raises(Interrupted):
            go("resumed", last)
    assert digests(go("resumed")) == digests(whole)

    run = read_run(whole)
    completions = run.completions(1)
    thoughts = completions[completions["finish_reason"] == "thought"]
    assert len(thoughts) == 8
    assert set(thoughts["score"]) == {1.0}  # the best of all for this judge, and yet:
    assert "thought" not in set(run.pairs(1)["chosen_finish_reason"])
    assert all("ee eee" in messages[0]["content"] for messages in run.pairs(1)["chosen"])
    metrics = run.metrics.loc[1]
    assert metrics["completions/unfinished_thoughts"] == 8
    assert 0 < metrics["length/unfinished_thoughts"] < 1
    assert metrics["length/mean_reasoning_tokens"] > 5
    assert metrics["win_rate/vs_initial"] == 0.5  # the fake always writes the same
    first = run.train_log(1).iloc[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    pairs = run.pairs(1)
    assert ("chosen_reasoning_tokens" in pairs.column_names) == (part == "answer")
    trained = (
        [ids[given:] for ids, given in zip(pairs["chosen_token_ids"], pairs["chosen_reasoning_tokens"], strict=True)]
        if part == "answer"
        else pairs["chosen_token_ids"]
    )
    texts = {tokenizer.decode(ids) for ids in trained}
    assert texts == ({"\n\nee eee<|im_end|>"} if part == "answer" else {REPLIES[0] + "<|im_end|>"})
    assert [record.decision for record in RunDir(whole).records()] == ["promote", "promote"]


def test_reasoning_in_offline_data_is_rendered_and_divided_and_the_answers_are_trained_on(
    tmp_path: Path, thinker: Path
) -> None:
    def turn(content: str, thought: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": content, "reasoning_content": thought}]

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i} + {i}?"}],
            "chosen": turn(f"It is {2 * i}.", f"{i} and {i}"),
            "rejected": turn("No." if i else "It is 0.", "hm" if i % 5 else "on and on " * 8),
        }
        for i in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(thinker)},
        "data": {"path": str(tmp_path / "pairs.jsonl"), "heldout": 2, "max_completion_tokens": 50},
        "dpo": {"learning_rate": 1e-3, "pairs_per_step": 2, "precision": "fp32", "train_on": "answer"},
    }
    wholes = {"run_dir": str(tmp_path / "wholes"), "dpo": {**values["dpo"], "train_on": "completion"}}
    config = parse_config(OfflineConfig, values | wholes)
    with OfflineRun(config) as of_wholes:
        counts = prepare_pairs(config, of_wholes).counts
    assert (counts["pairs"], counts["unfinished_thoughts"]) == (12, 3)  # rows 0, 5 and 10 are cut in a thought
    run = train_offline(parse_config(OfflineConfig, values))
    counts = json.loads((run.root / "round-001" / "pairs" / "MANIFEST.json").read_text())["counts"]
    assert (counts["pairs"], counts["unfinished_thoughts"]) == (9, 0)
    assert counts["left_out"] == {
        "have a thought without an answer, and dpo.train_on is answer": {"count": 3, "rows": [1, 6, 11]}
    }
    first = run.train_log(1).iloc[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert run.metrics.loc[1, "eval_rewards/accuracies"] >= 0
    pairs = run.pairs(1)
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    for row in pairs:
        text = tokenizer.decode(row["chosen_token_ids"])
        assert text == row["chosen"][0]["content"] + "<|im_end|>"
        assert text.startswith("<think>\n")
        answer = tokenizer.decode(row["chosen_token_ids"][row["chosen_reasoning_tokens"] :])
        assert answer.startswith("\n\nIt is ")


def test_reasoning_that_a_template_drops_is_named_with_its_row(tmp_path: Path) -> None:
    dropping = THINKING.replace("{{ thought }}", "{{ thought if messages|length < 3 }}")
    model = build_tiny_checkpoint(tmp_path / "model", chat_template=dropping)
    said = {"role": "assistant", "content": "b", "reasoning_content": "because"}
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [said], "rejected": [{**said, "content": "c"}]},
        {
            "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}],
            "chosen": [said],
            "rejected": [{**said, "content": "c"}],
        },
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "data": {"path": str(tmp_path / "pairs.jsonl")},
    }
    with pytest.raises(DataError, match=r"row 2: the chat template .* leaves out a part of 'reasoning_content'"):
        train_offline(parse_config(OfflineConfig, values))

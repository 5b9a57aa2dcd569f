"""Which weights a run keeps: the rule, and a real run that goes on without the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.api import run_rounds
from flows.plan import describe_status
from flows.verify import verify
from iterdpo.config import Config, parse_config
from iterdpo.errors import ConfigError, UserError
from iterdpo.run.read import read_run
from iterdpo.run.rundir import RunDir, removed
from iterdpo.stages.keep import needed, remove_unneeded
from iterdpo.testing import FakeSampler
from iterdpo.types import RoundRecord


def config(**sections: Any) -> Config:
    given = {"run_dir": "x", "model": {"path": "m"}, "prompts": {"path": "p"}, "judge": {"use": "length"}}
    return parse_config(Config, given | sections)


def records(*decisions: str) -> list[RoundRecord]:
    """Rounds that ended with these decisions, each better than the one before."""
    found: list[RoundRecord] = []
    for number, decision in enumerate(decisions):
        standing = number if decision == "promote" else found[-1].policy_round
        metrics = {"round": number, "win_rate/vs_initial": number / 10, "win_rate/vs_previous": number / 10}
        gate = config().gate.model_dump()
        found.append(RoundRecord(number, decision, "", "p", standing, "d", gate, metrics))  # type: ignore[arg-type]
    return found


def kept_of(rounds: list[RoundRecord], settings: Config) -> set[int]:
    every = settings.evaluation.every
    return needed(rounds, settings, evaluates=lambda round: round % every == 0)


@pytest.mark.parametrize(
    ("keep", "decisions", "kept"),
    [
        ("promoted", ["promote", "promote", "keep", "promote", "keep"], {0, 1, 3}),
        ("last 1", ["promote", "promote", "promote", "promote"], {3}),
        ("last 2", ["promote", "promote", "promote", "promote"], {2, 3}),
        ("last 1", ["promote", "promote", "keep", "keep"], {1, 3}),
        ("last 9", ["promote", "keep"], {0, 1}),
        ("all", ["promote", "keep", "keep"], {0, 1, 2}),
    ],
)
def test_what_keep_asks_for_stays_and_what_the_next_round_starts_from(
    keep: str, decisions: list[str], kept: set[int]
) -> None:
    assert kept_of(records(*decisions), config(keep=keep)) == kept


def test_a_policy_that_a_later_round_has_as_its_reference_stays() -> None:
    periodic = config(keep="last 1", dpo={"reference": "periodic", "reference_every": 2})
    rounds = ["promote"] * 6
    # rounds 3 and 4 have policy 2 as their reference, rounds 5 and 6 policy 4
    assert kept_of(records(*rounds[:4]), periodic) == {2, 3}
    assert kept_of(records(*rounds[:5]), periodic) == {4}
    assert kept_of(records(*rounds[:6]), periodic) == {4, 5}
    assert kept_of(records(*rounds[:4]), config(keep="last 1", dpo={"reference": "ema"})) == {2, 3}
    # the gate of round 6 may go back to the policy that stood after round 3
    assert kept_of(records(*rounds), config(keep="last 1", evaluation={"every": 3})) == {3, 5}
    assert kept_of(records(*rounds), config(keep="last 1", pairing={"against": {"round": 1}})) == {1, 5}


def test_rounds_that_are_to_be_repeated_do_not_say_what_is_removed(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    steps = [directory.step(round, "policy", {}) for round in (1, 2, 3)]
    for step in steps:
        (step.begin() / "model.safetensors").write_bytes(b"weights")
        step.finish()
    ended = SimpleNamespace(records=lambda: records(*["promote"] * 4), round_dir=directory.round_dir)
    run: Any = SimpleNamespace(config=config(keep="last 1"), dir=ended, evaluates=lambda round: True)
    remove_unneeded(run, 1)  # round 2 is about to be repeated, from policy 1
    assert [bool(removed(step.path)) for step in steps] == [False, False, False]
    remove_unneeded(run, 3)
    assert [bool(removed(step.path)) for step in steps] == [True, True, False]


@pytest.mark.parametrize("keep", ["none", "last", "last 0", "last -1", "3", "promoted 2"])
def test_another_word_is_refused(keep: str) -> None:
    with pytest.raises(ConfigError, match="keep"):
        config(keep=keep)


@pytest.mark.slow
@pytest.mark.extended
def test_a_run_goes_on_and_verifies_without_the_weights_that_nothing_needs(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(40)))
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "rounds": 2,
        "keep": "last 1",
        "model": {"path": str(tiny_model)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_round": 2, "heldout": 2},
        "sampling": {"n": 2, "max_tokens": 8},
        "judge": {"use": "judge.py:length"},
        "dpo": {"precision": "fp32", "pairs_per_step": 2},
        "evaluation": {"max_logp_gap": 100.0, "bootstrap_samples": 100},
        "gate": {"minimum": 0.0},
    }

    def length(completion: str) -> float:
        return float(len(completion))

    def run(**changes: Any) -> None:
        sampler = FakeSampler(lambda ids, k: f"{ids[-1] % 7}" * (k + 1))
        run_rounds(parse_config(Config, values | changes), judge=length, prefect=False, sampler=sampler)

    run()
    first, second = (tmp_path / "run" / f"round-00{t}" / "policy" for t in (1, 2))
    assert removed(first) == {"model.safetensors"}
    assert not (first / "model.safetensors").exists()
    assert (first / "MANIFEST.json").exists()
    assert (second / "model.safetensors").exists()
    found = verify(tmp_path / "run")
    assert found.problems == []
    assert "weights of 1 policies were removed" in found.summary()
    assert "round 1" in (said := describe_status(tmp_path / "run"))
    assert said.count("(weights removed)") == 1
    with pytest.raises(UserError, match="its weights were removed, as `keep` asked"):
        read_run(tmp_path / "run").policy(1)
    run(rounds=3)
    assert [record.round for record in RunDir(tmp_path / "run").records()] == [0, 1, 2, 3]
    assert removed(second) == {"model.safetensors"}
    (second / "tokenizer.json").unlink()  # which `keep` did not remove
    assert any("tokenizer.json" in problem for problem in verify(tmp_path / "run").problems)

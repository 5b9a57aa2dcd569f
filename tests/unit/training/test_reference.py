"""Reference log-probabilities: of the policy itself, of another model, of an adapter's base, of the sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iterdpo.config import DPOConfig
from iterdpo.data.pairs import TokenPairs, write_pairs
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.collate import RoundPairs
from iterdpo.training.models import load_policy
from iterdpo.types import Completion, PreferencePair
from tests.unit.training.rounds import (
    LOG_2,
    apart,
    log_of,
    log_sigmoid,
    mean,
    run,
    summed,
)

pytestmark = pytest.mark.usefixtures("the_peak_is_known")


def test_without_a_reference_rewards_are_the_policys_own_log_probabilities(
    tmp_path: Path, sharp: Path, grouped: Path
) -> None:
    row = log_of(run(tmp_path, sharp, grouped, reference="none", beta=0.05, pairs_per_step=8))[0]
    pairs = summed(sharp, grouped)
    assert row["rewards/chosen"] == pytest.approx(0.05 * mean([p[0] for p in pairs]), rel=1e-5)
    assert row["loss"] == pytest.approx(-mean([log_sigmoid(0.05 * (p[0] - p[1])) for p in pairs]), rel=1e-5)
    assert row["rewards/accuracies"] == mean([p[0] > p[1] for p in pairs])
    assert not (tmp_path / "reference").exists()


def test_another_reference_gives_rewards_of_the_difference(
    tmp_path: Path, sharp: Path, grouped: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = build_tiny_checkpoint(tmp_path_factory.mktemp("reference"), seed=9, initializer_range=0.15)
    row = log_of(run(tmp_path, sharp, grouped, against=other, pairs_per_step=8))[0]
    margins = [
        (0.1 * (p[0] - r[0]), 0.1 * (p[1] - r[1]))
        for p, r in zip(summed(sharp, grouped), summed(other, grouped), strict=True)
    ]
    assert row["rewards/chosen"] == pytest.approx(mean([w for w, _ in margins]), abs=1e-4)
    assert row["rewards/rejected"] == pytest.approx(mean([r for _, r in margins]), abs=1e-4)
    assert row["rewards/margins"] == pytest.approx(mean([w - r for w, r in margins]), abs=1e-4)
    assert row["rewards/accuracies"] == mean([w > r for w, r in margins])
    assert row["logps/chosen_drop"] == pytest.approx(-10 * mean([w for w, _ in margins]), abs=1e-3)
    assert row["loss"] == pytest.approx(-mean([log_sigmoid(w - r) for w, r in margins]), abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rewards_are_exactly_zero_at_step_0_if_the_reference_is_the_policy(
    tmp_path: Path, tiny_model: Path, pairs: Path, precision: str
) -> None:
    log = log_of(run(tmp_path, tiny_model, pairs, precision=precision))
    assert log[0]["rewards/chosen"] == 0.0
    assert log[0]["rewards/rejected"] == 0.0
    assert log[0]["loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert log[-1]["rewards/margins"] != 0.0
    assert len(log) == 6  # 22 pairs, 4 a step: the last short step too
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(row["mfu"] > 0 for row in log)


def test_an_adapter_goes_on_training_against_its_base_with_itself_turned_off(
    tmp_path: Path, tiny_model: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"adapter": {"r": 4}, "learning_rate": 1e-2, "pairs_per_step": 8}
    first = run(tmp_path / "a", tiny_model, grouped, epochs=3, **settings)
    loaded = []

    def spy(path: str, **options: Any) -> Any:
        loaded.append(str(path))
        return load_policy(path, **options)

    monkeypatch.setattr("iterdpo.training.train.load_policy", spy)
    second = run(tmp_path / "b", first, grouped, against=tiny_model, epochs=2, **settings)
    assert loaded == [str(first)]  # no second model for the reference
    stored = load_file(tmp_path / "b" / "reference" / "logps.safetensors")["logps"]
    for row, (w, r, _, _) in zip(stored.tolist(), summed(tiny_model, grouped), strict=True):
        assert row[:2] == pytest.approx([w, r], abs=1e-4)
    rewards = [0.1 * (p[0] - r[0]) for p, r in zip(summed(first, grouped), summed(tiny_model, grouped), strict=True)]
    log = log_of(second)
    assert log[0]["rewards/chosen"] == pytest.approx(mean(rewards), abs=1e-4)
    assert log[0]["rewards/chosen"] != 0.0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert apart(before, after) > 1e-4  # it is the same adapter, further on
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


def test_an_adapter_that_is_its_own_reference_begins_at_zero_rewards(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    settings = {"adapter": {"r": 4}, "learning_rate": 1e-2}
    first = run(tmp_path / "a", tiny_model, grouped, **settings)
    row = log_of(run(tmp_path / "b", first, grouped, **settings))[0]
    assert row["rewards/chosen"] == row["rewards/rejected"] == 0.0
    assert row["logps/chosen"] != log_of(first)[0]["logps/chosen"]


def sampled(directory: Path, model: Path, rows: list[PreferencePair], grouped: Path, *, off: float) -> Path:
    """The pairs with log-probabilities from their sampler, each token's `off` nats from the policy's."""

    def reported(side: Completion, logp: float) -> Completion:
        n = len(side.token_ids)
        return Completion(side.text, side.token_ids, [logp / n + off] * n, "stop")

    pairs = [
        PreferencePair(row.prompt, row.prompt_ids, reported(row.chosen, w), reported(row.rejected, r))
        for row, (w, r, _, _) in zip(rows, summed(model, grouped), strict=True)
    ]
    write_pairs(directory, pairs, summary="sampled pairs")
    return directory / "train.parquet"


def test_the_samplers_log_probabilities_are_the_references_if_they_are_near_enough(
    tmp_path: Path, sharp: Path, rows: list[PreferencePair], grouped: Path
) -> None:
    pairs = sampled(tmp_path, sharp, rows, grouped, off=0.01)
    tokens = mean([p[2] for p in summed(sharp, grouped)])
    for tolerance, expected in ((0.02, -0.01 * 0.1 * tokens), (0.005, 0.0), (None, 0.0)):
        directory = tmp_path / str(tolerance)
        output = run(directory, sharp, pairs, sampler_logps_tolerance=tolerance, pairs_per_step=8)
        assert log_of(output)[0]["rewards/chosen"] == pytest.approx(expected, abs=1e-5)
        counts = json.loads((directory / "reference" / "MANIFEST.json").read_text())["counts"]
        assert ("sampler" in counts) == (tolerance is not None)
        if tolerance is not None:
            assert counts["sampler"]["used"] == (tolerance == 0.02)
            assert counts["sampler"]["gap"] == pytest.approx(0.01, rel=1e-2)


def test_ktos_stored_reference_has_a_completion_of_another_prompt(tmp_path: Path, sharp: Path, grouped: Path) -> None:
    run(tmp_path, sharp, grouped, loss="kto")
    stored = load_file(tmp_path / "reference" / "logps.safetensors")["logps"]
    source = TokenPairs(grouped, tmp_path / "cache")
    pairs = RoundPairs(source, None, DPOConfig(loss="kto"), seed=3)
    exact = load_policy(sharp, dtype=torch.float64).eval()
    for number, tree in enumerate(pairs.mismatched_trees(np.arange(8))):
        (completion,) = tree.branches
        with torch.no_grad():
            logps = exact(torch.tensor([tree.prompt + completion])).logits[0].log_softmax(dim=-1)
        tokens = range(len(tree.prompt), len(tree.prompt) + len(completion))
        expected = sum(float(logps[at - 1, token]) for at, token in zip(tokens, completion, strict=True))
        assert float(stored[number, 2]) == pytest.approx(expected, abs=1e-4)

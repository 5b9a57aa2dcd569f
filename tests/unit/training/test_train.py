"""The trainer, in this process, on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iterdpo.config import DPOConfig
from iterdpo.data.pairs import ABSENT, TokenPairs, pairs_table, write_pairs, write_tables
from iterdpo.run.rundir import read_jsonl
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.collate import TokenPair
from iterdpo.training.launch import OPTIMIZER_STATE, ReferenceInputs, TrainSpec
from iterdpo.training.losses import PreferenceLoss
from iterdpo.training.models import load_policy
from iterdpo.training.train import learning_rate_factor, summarize, train
from iterdpo.types import Completion, PreferencePair, Prompt

LOG_2 = 0.6931471805599453


@pytest.fixture(autouse=True)
def the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "iterdpo.training.train.matmul_peak", lambda device, dtype: 1e12
    )  # measuring it takes longer than a run


def completion(ids: list[int]) -> Completion:
    return Completion("text", ids, [], "stop")


def random_ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(3, 259, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pairs of as many prompts."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        return random_ids(generator, low, high)

    rows = [
        PreferencePair(Prompt(f"p{i}", "x"), ids(2, 8), completion(ids(3, 12)), completion(ids(3, 12)))
        for i in range(22)
    ]
    directory = tmp_path_factory.mktemp("pairs")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"


@pytest.fixture(scope="module")
def rows() -> list[PreferencePair]:
    """Eight pairs of three prompts, some of which have a completion in common."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, sides in enumerate([[(0, 1), (0, 2), (3, 2)], [(0, 1), (2, 1)], [(0, 1), (1, 2), (2, 3)]]):
        prompt = random_ids(generator, 4, 20)
        completions = [completion(random_ids(generator, 2, 14)) for _ in range(4)]
        found += [
            PreferencePair(Prompt(f"p{number}", "x"), prompt, completions[chosen], completions[rejected])
            for chosen, rejected in sides
        ]
    return found


@pytest.fixture(scope="module")
def grouped(rows: list[PreferencePair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rows` as a file."""
    directory = tmp_path_factory.mktemp("grouped")
    write_pairs(directory, rows, summary="random pairs")
    return directory / "train.parquet"


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks at its context: with the usual small weights every token is about as likely."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("sharp"), initializer_range=0.15)


def run(
    tmp_path: Path,
    model: Path,
    pairs: Path,
    *,
    against: Path | None = None,
    optimizer: Path | None = None,
    eval_pairs: Path | None = None,
    **dpo: Any,
) -> Path:
    output = tmp_path / "policy.partial"
    output.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": 1e-3, "pairs_per_step": 4, "precision": "fp32", "checkpoint_every": 2, **dpo}
    config = DPOConfig(**settings)
    train(
        TrainSpec(
            name="round-001",
            policy=model,
            reference=against,
            pairs=pairs,
            eval_pairs=eval_pairs,
            output=output,
            reference_output=tmp_path / "reference",
            attic=None,
            reference_inputs=ReferenceInputs(
                reference=str(against),
                pairs=str(pairs),
                precision=config.precision,
                adapter=False,
                sampler_logps_tolerance=config.sampler_logps_tolerance,
                mismatched=None,
            ),
            dpo=config,
            seed=3,
            pairs_cache=tmp_path / "cache",
            tracker_dir=tmp_path / "trackers",
            optimizer=optimizer,
        )
    )
    return output


def log_of(output: Path) -> list[dict[str, Any]]:
    return read_jsonl(output / "train_log.jsonl")


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in log_of(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_policy(output).state_dict()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert one.keys() == other.keys()
    return max(float((tensor.float() - other[name].float()).abs().max()) for name, tensor in one.items())


def token_pairs(pairs: Path) -> list[TokenPair]:
    source = TokenPairs(pairs, pairs.parent / "cache")
    return [source[i] for i in range(len(source))]


def terms(model: Path, pairs: Path) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The distributions [V] that a model in float64 gives each token of chosen and rejected, one row at a time."""
    exact = load_policy(model, dtype=torch.float64).eval()

    def side(pair: TokenPair, ids: list[int]) -> list[torch.Tensor]:
        with torch.no_grad():
            logits = exact(torch.tensor([pair.prompt + ids])).logits[0]
        return list(logits[len(pair.prompt) - 1 : -1].softmax(dim=-1))

    return [(side(pair, pair.chosen), side(pair, pair.rejected)) for pair in token_pairs(pairs)]


def summed(model: Path, pairs: Path) -> list[tuple[float, float, int, int]]:
    """Log-probabilities of chosen and rejected, and their numbers of tokens."""
    found = []
    for pair, (chosen, rejected) in zip(token_pairs(pairs), terms(model, pairs), strict=True):
        w = sum(float(p[token].log()) for p, token in zip(chosen, pair.chosen, strict=True))
        r = sum(float(p[token].log()) for p, token in zip(rejected, pair.rejected, strict=True))
        found.append((w, r, len(chosen), len(rejected)))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# The objective

AT_THE_REFERENCE: list[tuple[dict[str, Any], float, float]] = [  # the loss, beta, its value
    ({"type": "sigmoid"}, 0.1, LOG_2),
    ({"type": "sigmoid", "label_smoothing": 0.3}, 0.1, LOG_2),  # 0.7 log 2 + 0.3 log 2
    ({"type": "sigmoid_norm"}, 5.0, LOG_2),
    ({"type": "robust", "label_smoothing": 0.1}, 0.1, LOG_2),  # (0.9 log 2 - 0.1 log 2) / (1 - 0.2)
    ({"type": "ipo"}, 0.1, 25.0),  # (1 / 0.2)^2
    ({"type": "hinge"}, 0.1, 1.0),
    ({"type": "dpop"}, 0.1, LOG_2),
    ({"type": "exo_pair", "label_smoothing": 0.1}, 0.1, math.log(5 / 3)),  # log(0.5 / 0.9) / 2 + log(0.5 / 0.1) / 2
    ({"type": "nca_pair"}, 0.1, 2 * LOG_2),
    ({"type": "apo_zero"}, 0.1, 1.0),
    ({"type": "apo_down"}, 0.1, 1.0),
    ({"type": "sppo_hard"}, 0.1, 50.0),  # 2 (0.5 / 0.1)^2
    ({"type": "kto"}, 0.1, 0.5),
    ({"type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5}, 0.1, 0.5),  # (1.5 / 2 + 0.5 / 2) / 2
    ({"type": "kto", "desirable_weight": 3.0}, 0.1, 1.0),  # (3 / 2 + 1 / 2) / 2
]


@pytest.mark.parametrize(("loss", "beta", "expected"), AT_THE_REFERENCE)
def test_each_loss_begins_where_its_equation_has_the_policy_at_the_reference_and_falls(
    tmp_path: Path, tiny_model: Path, grouped: Path, loss: dict[str, Any], beta: float, expected: float
) -> None:
    log = log_of(run(tmp_path, tiny_model, grouped, loss=loss, beta=beta, pairs_per_step=8, epochs=4))
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == log[0]["logps/chosen_drop"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"]


def test_losses_without_a_reference_begin_where_their_equations_have_the_policy(
    tmp_path: Path, sharp: Path, grouped: Path
) -> None:
    def odds(p: float) -> float:
        return p - math.log(1 - math.exp(p))

    def first(loss: str, settings: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        settings = {"loss": {"type": loss, **keys}, **(settings or {})}
        output = run(tmp_path / loss, sharp, grouped, pairs_per_step=8, epochs=4, **settings)
        log = log_of(output)
        assert log[-1]["loss"] < log[0]["loss"]
        assert not (tmp_path / loss / "reference").exists()
        assert "logps/chosen_drop" not in log[0]
        return log[0]

    pairs = [(w / n, r / m) for w, r, n, m in summed(sharp, grouped)]
    row = first("sft")
    assert row["loss"] == pytest.approx(-mean([w for w, _ in pairs]), rel=1e-5)
    assert not [name for name in row if name.startswith("rewards/") or name == "logps/rejected"]

    row = first("simpo", {"beta": 2.5}, gamma=0.3)
    assert row["loss"] == pytest.approx(-mean([log_sigmoid(2.5 * (w - r) - 0.3) for w, r in pairs]), rel=1e-5)
    assert row["rewards/chosen"] == pytest.approx(2.5 * mean([w for w, _ in pairs]), rel=1e-5)

    row = first("orpo", {"beta": 0.4})
    assert row["loss"] == pytest.approx(mean([-w - 0.4 * log_sigmoid(odds(w) - odds(r)) for w, r in pairs]), rel=1e-5)


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


def test_the_chosen_completions_nll_is_added_with_its_coefficient(tmp_path: Path, sharp: Path, grouped: Path) -> None:
    row = log_of(run(tmp_path, sharp, grouped, nll_coefficient=0.25, pairs_per_step=8))[0]
    nll = mean([-p[0] / p[2] for p in summed(sharp, grouped)])
    assert row["loss"] == pytest.approx(LOG_2 + 0.25 * nll, rel=1e-5)


def test_wpo_weighs_each_pair_by_how_likely_the_policy_is_to_sample_it(
    tmp_path: Path, sharp: Path, grouped: Path
) -> None:
    weighed = []
    for pair, sides in zip(token_pairs(grouped), terms(sharp, grouped), strict=True):
        weight = 1.0
        for ids, distributions in zip((pair.chosen, pair.rejected), sides, strict=True):
            a = [float(p[t].log() - (p * p).sum().log()) for t, p in zip(ids, distributions, strict=True)]
            weight *= math.exp(mean(a))
        weighed.append(weight)
    row = log_of(run(tmp_path, sharp, grouped, wpo=True, pairs_per_step=8))[0]
    assert row["loss"] == pytest.approx(LOG_2 * mean(weighed), rel=1e-4)
    assert max(weighed) > 2 * min(weighed)


def test_kto_takes_unpaired_examples_and_sees_in_a_pair_two_of_them(
    tmp_path: Path, tiny_model: Path, rows: list[PreferencePair], grouped: Path
) -> None:
    singles = [PreferencePair(r.prompt, r.prompt_ids, r.chosen, ABSENT) for r in rows]
    singles += [PreferencePair(r.prompt, r.prompt_ids, ABSENT, r.rejected) for r in rows]
    write_tables(tmp_path / "unpaired.parquet", [pairs_table(singles, "unpaired")])
    settings = {"loss": {"type": "kto", "desirable_weight": 1.5}, "epochs": 3}
    unpaired = log_of(run(tmp_path / "a", tiny_model, tmp_path / "unpaired.parquet", pairs_per_step=16, **settings))
    paired = log_of(run(tmp_path / "b", tiny_model, grouped, pairs_per_step=8, **settings))
    for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm", "rewards/chosen", "rewards/rejected"):
        assert unpaired[0][name] == pytest.approx(paired[0][name], rel=1e-4), name
    assert "rewards/margins" not in unpaired[0]
    assert "rewards/accuracies" not in unpaired[0]
    assert unpaired[-1]["loss"] < unpaired[0]["loss"]


def test_unpaired_examples_of_one_kind_only_train_with_kto(
    tmp_path: Path, tiny_model: Path, rows: list[PreferencePair]
) -> None:
    singles = [PreferencePair(r.prompt, r.prompt_ids, ABSENT, r.rejected) for r in rows]
    write_tables(tmp_path / "unpaired.parquet", [pairs_table(singles, "unpaired")])
    log = log_of(run(tmp_path, tiny_model, tmp_path / "unpaired.parquet", loss="kto"))
    assert log[0]["loss"] == 0.5
    assert "logps/chosen" not in log[0]
    assert all(math.isfinite(row["grad_norm"]) for row in log)


def test_ktos_kl_is_of_completions_behind_another_prompt(
    tmp_path: Path, tiny_model: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iterdpo.training.train import Trainer

    found = []
    original = Trainer._mismatched

    def spy(self: Trainer, indices: Any) -> Any:
        trees = original(self, indices)
        found.extend(zip(indices.tolist(), trees, strict=True))
        return trees

    monkeypatch.setattr(Trainer, "_mismatched", spy)
    run(tmp_path, tiny_model, grouped, loss="kto")
    pairs = token_pairs(grouped)
    assert {index for index, _ in found} == set(range(8))
    for index, tree in found:
        own = [side for pair in pairs if pair.prompt == pairs[index].prompt for side in (pair.chosen, pair.rejected)]
        assert tree.prompt == pairs[index].prompt
        assert tree.branches[0] not in own


# What must not matter


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_implicit_rewards_are_exactly_zero_at_step_0_where_the_reference_is_the_policy(
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


@pytest.mark.parametrize(
    "settings", [{}, {"loss": "kto"}, {"wpo": True, "nll_coefficient": 0.5}, {"adapter": {}, "learning_rate": 1e-2}]
)
def test_one_pair_at_a_time_or_all_at_once_is_the_same_training(
    tmp_path: Path, tiny_model: Path, grouped: Path, settings: dict[str, Any]
) -> None:
    settings = {"pairs_per_step": 8, "epochs": 3, **settings}
    whole = run(tmp_path / "a", tiny_model, grouped, tokens_per_micro_batch=4096, **settings)
    cut = run(tmp_path / "b", tiny_model, grouped, tokens_per_micro_batch=1, **settings)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    assert apart(weights(cut), weights(whole)) < 2e-5 * settings.get("learning_rate", 1e-3) / 1e-3


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("settings", [{}, {"loss": "kto"}, {"adapter": {}}])
def test_sharing_prompts_does_not_change_the_losses(
    tmp_path: Path, tiny_model: Path, grouped: Path, settings: dict[str, Any], precision: str, tolerance: float
) -> None:
    shared = run(tmp_path / "a", tiny_model, grouped, precision=precision, epochs=2, **settings)
    own = run(tmp_path / "b", tiny_model, grouped, precision=precision, epochs=2, shared_prompts=False, **settings)
    assert losses(shared) == pytest.approx(losses(own), abs=tolerance)
    assert losses(shared)[-1] != losses(shared)[0]


@pytest.mark.parametrize("adapter", [None, {}])
def test_gradient_checkpointing_does_not_change_the_policy(
    tmp_path: Path, tiny_model: Path, grouped: Path, adapter: dict[str, Any] | None
) -> None:
    plain = weights(run(tmp_path / "a", tiny_model, grouped, adapter=adapter))
    again = weights(run(tmp_path / "b", tiny_model, grouped, adapter=adapter, gradient_checkpointing=True))
    assert apart(plain, again) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"adapter": {}, "optimizer_state": "carry"}])
def test_training_that_stops_at_a_checkpoint_and_goes_on_ends_bit_identical(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    from iterdpo.training.train import Trainer

    expected = run(tmp_path / "a", tiny_model, pairs, **settings)
    step = Trainer._step

    def fail_at_4(self: Trainer, number: int) -> dict[str, Any]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", fail_at_4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", tiny_model, pairs, **settings)
    monkeypatch.setattr(Trainer, "_step", step)
    kept = load_file(tmp_path / "b" / "policy.partial" / "checkpoint-000004" / "model.safetensors")
    assert all("lora" in name for name in kept) == bool(settings)  # the model under an adapter is not kept with it
    log = tmp_path / "b" / "policy.partial" / "train_log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss"')  # and a line that was cut short
    resumed = run(tmp_path / "b", tiny_model, pairs, **settings)

    name = "adapter_model.safetensors" if settings else "model.safetensors"
    assert (resumed / name).read_bytes() == (expected / name).read_bytes()
    timeless = [{k: v for k, v in row.items() if "per_second" not in k and k != "mfu"} for row in read_jsonl(log)]
    assert timeless == [
        {k: v for k, v in row.items() if "per_second" not in k and k != "mfu"} for row in log_of(expected)
    ]


# Adapters


def test_of_an_adapter_only_the_adapter_is_saved_and_its_base_stays_as_it_is(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    before = (tiny_model / "model.safetensors").read_bytes()
    output = run(tmp_path, tiny_model, grouped, adapter={"r": 4}, learning_rate=1e-2, epochs=2)
    log = log_of(output)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[0]["loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert log[-1]["loss"] < log[0]["loss"]
    tensors = load_file(output / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert len(tensors) == 2 * 7 * 2  # two matrices for each of seven modules in two layers
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert not (output / "model.safetensors").exists()
    assert not (output / "README.md").exists()
    assert (output / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert (tiny_model / "model.safetensors").read_bytes() == before
    policy = load_policy(output)
    with policy.disable_adapter():
        assert (
            apart(
                {
                    n.replace(".base_layer", ""): p
                    for n, p in policy.get_base_model().state_dict().items()
                    if "lora" not in n
                },
                load_policy(tiny_model).state_dict(),
            )
            == 0.0
        )


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


# The optimizer


def test_two_rounds_that_carry_the_optimizer_are_one_round_of_two_epochs(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    # Without a reference, a schedule or more than one step an epoch, nothing else begins anew in a second round.
    constant = {"reference": "none", "lr_scheduler": "constant", "warmup_ratio": 0.0, "pairs_per_step": 8}
    settings = {**constant, "optimizer_state": "carry"}
    whole = weights(run(tmp_path / "whole", tiny_model, grouped, epochs=4, **settings))
    first = run(tmp_path / "first", tiny_model, grouped, epochs=2, **settings)
    state = first / OPTIMIZER_STATE
    carried = weights(run(tmp_path / "carried", first, grouped, epochs=2, optimizer=state, **settings))
    reset = weights(run(tmp_path / "reset", first, grouped, epochs=2, **constant))
    assert apart(carried, whole) < 1e-5
    assert apart(reset, whole) > 1e-3
    assert not (tmp_path / "reset" / "policy.partial" / OPTIMIZER_STATE).exists()


# Alarms


def test_an_alarm_is_noted_in_the_log_and_training_goes_on(
    tmp_path: Path, tiny_model: Path, grouped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(tmp_path, tiny_model, grouped, epochs=3, sentinels={"margin": 1e-4, "window": 1})
    log = log_of(output)
    assert len(log) == 6
    assert "alarms" not in log[0]  # at the reference the margin is 0
    assert log[-1]["alarms"][0].startswith("margin: the reward margin is ")
    assert f"step 6: {log[-1]['alarms'][0]}" in caplog.text


def test_an_alarm_that_is_to_stop_the_round_does_when_its_step_is_in_the_log(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    sentinels = {"margin": 1e-4, "window": 1, "margin_action": "stop"}
    with pytest.raises(RuntimeError, match=r"step \d: the reward margin is .* the round is stopped"):
        run(tmp_path, tiny_model, grouped, epochs=3, sentinels=sentinels)
    output = tmp_path / "policy.partial"
    log = log_of(output)
    assert len(log) < 6
    assert ["alarms" in row for row in log] == [False] * (len(log) - 1) + [True]
    assert not (output / "model.safetensors").exists()


def broken(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """A loss that is not a number in these steps, counted from 0, each of one micro-batch."""
    from iterdpo.training import train as module

    calls = iter(range(1000))
    original = module.preference_loss

    def loss(*arguments: Any, **options: Any) -> PreferenceLoss:
        found = original(*arguments, **options)
        return found._replace(losses=found.losses * math.nan) if next(calls) in steps else found

    monkeypatch.setattr(module, "preference_loss", loss)


def test_a_step_that_is_not_finite_can_be_skipped_and_leaves_the_weights_as_they_were(
    tmp_path: Path, tiny_model: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, {0, 1})
    output = run(tmp_path, tiny_model, grouped, sentinels={"non_finite": "skip"})
    assert apart(weights(output), weights(tiny_model)) == 0.0
    log = log_of(output)
    assert [row["alarms"] for row in log] == [
        [f"non_finite: step {step}: loss nan, gradient norm nan"] for step in (1, 2)
    ]
    assert "loss" not in log[0]  # JSON has no NaN


def test_the_steps_behind_one_that_was_skipped_go_on(
    tmp_path: Path, tiny_model: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, {1})
    log = log_of(run(tmp_path, tiny_model, grouped, epochs=2, sentinels={"non_finite": "skip"}))
    assert ["loss" in row for row in log] == [True, False, True, True]
    assert log[-1]["rewards/margins"] != 0.0
    assert all(math.isfinite(value) for row in log for value in row.values() if isinstance(value, float))


# Beside the policy


def test_trackers_write_under_the_runs_directory(tmp_path: Path, tiny_model: Path, grouped: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run(tmp_path, tiny_model, grouped, trackers=["tensorboard"], tracker_project="a-project")
    (directory,) = {path.parent for path in (tmp_path / "trackers" / "a-project").glob("events*")}
    events = EventAccumulator(str(directory)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in log_of(output)]
    assert found == expected
    assert "step" not in events.Tags()["scalars"]


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", LOG_2), ("kto", 0.5)])
def test_held_out_pairs_are_evaluated_with_the_trained_policy(
    tmp_path: Path, tiny_model: Path, pairs: Path, grouped: Path, loss: str, expected: float
) -> None:
    still = run(tmp_path / "a", tiny_model, pairs, eval_pairs=grouped, loss=loss, learning_rate=1e-30)
    metrics = json.loads((still / "eval_metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["eval_logps/chosen"] == pytest.approx(mean([p[0] for p in summed(tiny_model, grouped)]), rel=1e-5)
    moved = run(tmp_path / "b", tiny_model, pairs, eval_pairs=grouped, loss=loss)
    assert json.loads((moved / "eval_metrics.json").read_text())["eval_rewards/margins"] != 0.0


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


def test_the_samplers_log_probabilities_are_the_references_where_they_are_near_enough(
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


def test_metrics_are_means_over_the_pairs_that_have_them() -> None:
    nan = math.nan
    rows = torch.tensor([[1.0, 0.5, 0.25, -10, -20, -2], [3.0, 0.25, 0.5, -30, -40, -4], [2.0, 1.5, nan, -20, nan, 0]])
    assert summarize(rows) == {
        "loss": 2.0,
        "rewards/chosen": 0.75,
        "rewards/rejected": 0.375,
        "logps/chosen": -20.0,
        "logps/rejected": -30.0,
        "logps/chosen_drop": 2.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
    }


def test_a_loss_that_is_not_finite_ends_training_before_it_is_applied(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    with pytest.raises(RuntimeError, match="not finite, and not applied"):
        run(tmp_path, tiny_model, pairs, learning_rate=1e30, max_grad_norm=1e30, lr_scheduler="constant")


def test_fewer_processes_than_asked_for_is_an_error(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    with pytest.raises(RuntimeError, match="2 training processes were asked for and this one sees 1"):
        run(tmp_path, tiny_model, pairs, processes=2)


def test_the_policy_carries_the_tokenizer_byte_for_byte(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    output = run(tmp_path, tiny_model, pairs)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (tiny_model / name).read_bytes()


def test_save_dtype_is_the_precision_on_disk_and_in_the_configuration(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    output = run(tmp_path, tiny_model, pairs, save_dtype="bfloat16")
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(output / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_the_learning_rate_warms_up_to_its_peak_and_is_never_zero() -> None:
    def factors(schedule: str) -> list[float]:
        return [learning_rate_factor(s, 10, warmup_ratio=0.2, schedule=schedule) for s in range(10)]

    assert factors("constant") == [0.5, *[1.0] * 9]
    assert factors("linear") == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert factors("cosine")[2] == 1.0
    assert min(factors("cosine")) > 0

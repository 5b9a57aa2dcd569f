"""An optimizer step: losses against float64, cutting into micro-batches, steps that are not finite, metrics."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iterdpo.data.pairs import ABSENT, pairs_table, write_pairs, write_tables
from iterdpo.training.collate import Batch, collate
from iterdpo.training.losses import PreferenceLoss
from iterdpo.training.step import Compute, Trainer, learning_rate_factor, summarize
from iterdpo.types import Completion, PreferencePair, Prompt
from tests.unit.training.rounds import (
    LOG_2,
    apart,
    log_of,
    log_sigmoid,
    losses,
    mean,
    run,
    summed,
    terms,
    token_pairs,
    weights,
)

pytestmark = pytest.mark.usefixtures("the_peak_is_known")


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
    ({"type": "bco_pair"}, 0.1, 2 * LOG_2),
    ({"type": "bco"}, 0.1, 2 * LOG_2),  # the rewards are 0, and so is their shift
    ({"type": "aot"}, 0.1, LOG_2),  # the margins are the reference's, in every order
    ({"type": "aot_unpaired", "label_smoothing": 0.2}, 0.1, LOG_2),
    ({"type": "discopop"}, 0.1, (LOG_2 + 1) / 2),
    ({"type": "kto"}, 0.1, 0.5),
    ({"type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5}, 0.1, 0.5),  # (1.5 / 2 + 0.5 / 2) / 2
    ({"type": "kto", "desirable_weight": 3.0}, 0.1, 1.0),  # (3 / 2 + 1 / 2) / 2
]


@pytest.mark.parametrize(("loss", "beta", "expected"), AT_THE_REFERENCE)
def test_each_loss_begins_at_its_equations_value_at_the_reference_and_falls(
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


def test_the_chosen_completions_nll_is_added_with_its_coefficient(tmp_path: Path, sharp: Path, grouped: Path) -> None:
    row = log_of(run(tmp_path, sharp, grouped, nll_coefficient=0.25, pairs_per_step=8))[0]
    nll = mean([-p[0] / p[2] for p in summed(sharp, grouped)])
    assert row["loss"] == pytest.approx(LOG_2 + 0.25 * nll, rel=1e-5)


def test_xpo_adds_the_log_probability_of_the_other_sources_completion_whichever_side_it_is(
    tmp_path: Path, sharp: Path, grouped: Path
) -> None:
    table = pq.read_table(grouped)
    sides = [("chosen", "rejected", None)[i % 3] for i in range(len(table))]
    marked = tmp_path / "marked.parquet"
    pq.write_table(table.append_column("other_side", pa.array(sides, pa.string())), marked)
    row = log_of(run(tmp_path, sharp, marked, xpo_alpha=0.01, pairs_per_step=8))[0]
    of_other = [
        {"chosen": w, "rejected": r, None: 0.0}[side]
        for side, (w, r, _, _) in zip(sides, summed(sharp, grouped), strict=True)
    ]
    assert row["loss"] == pytest.approx(LOG_2 + 0.01 * mean(of_other), rel=1e-5)
    weighted = log_of(run(tmp_path / "ld", sharp, marked, xpo_alpha=0.01, ld_alpha=0.0, pairs_per_step=8))[0]
    assert weighted["loss"] == pytest.approx(row["loss"], rel=1e-5)  # ld_alpha is of the rewards alone
    again = log_of(run(tmp_path / "plain", sharp, grouped, xpo_alpha=0.01, pairs_per_step=8))[0]
    assert again["loss"] == pytest.approx(LOG_2, rel=1e-5)  # no side is another source's


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


@pytest.mark.parametrize(("name", "alpha"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("sigmoid_norm", 0.3)])
def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_completion_under_both_models(
    tmp_path: Path, sharp: Path, tiny_model: Path, grouped: Path, name: str, alpha: float
) -> None:
    expected = []
    for pair, *models in zip(token_pairs(grouped), terms(sharp, grouped), terms(tiny_model, grouped), strict=True):
        common, rewards = min(len(pair.chosen), len(pair.rejected)), []
        for number, ids in enumerate((pair.chosen, pair.rejected)):
            policy, reference = (
                [float(p[t].log()) for t, p in zip(ids, sides[number], strict=True)] for sides in models
            )
            ratios = [p - q for p, q in zip(policy, reference, strict=True)]
            per = len(ids) if name == "sigmoid_norm" else 1
            rewards.append(0.1 * (sum(ratios[:common]) + alpha * sum(ratios[common:])) / per)
        expected.append(-log_sigmoid(rewards[0] - rewards[1]))
    settings = {"loss": name, "ld_alpha": alpha, "pairs_per_step": 8}
    row = log_of(run(tmp_path, sharp, grouped, against=tiny_model, **settings))[0]
    assert row["loss"] == pytest.approx(mean(expected), rel=1e-5)


def test_ld_alpha_1_is_dpo_and_the_nll_term_has_all_tokens_whatever_it_is(
    tmp_path: Path, sharp: Path, grouped: Path
) -> None:
    plain = run(tmp_path / "a", sharp, grouped, epochs=2)
    whole = run(tmp_path / "b", sharp, grouped, epochs=2, ld_alpha=1.0)
    assert losses(whole) == losses(plain)
    row = log_of(run(tmp_path / "c", sharp, grouped, ld_alpha=0.0, nll_coefficient=0.25, pairs_per_step=8))[0]
    nll = mean([-p[0] / p[2] for p in summed(sharp, grouped)])
    assert row["loss"] == pytest.approx(LOG_2 + 0.25 * nll, rel=1e-5)


@pytest.fixture(scope="module")
def thoughtful(tmp_path_factory: pytest.TempPathFactory, rows: list[PreferencePair]) -> Path:
    """`rows`, of whose completions the first token, or none, is reasoning; the answers alone are trained on."""

    def divided(completion: Completion, given: int) -> Completion:
        return replace(completion, reasoning="t", reasoning_tokens=given)

    pairs = [replace(p, chosen=divided(p.chosen, 1), rejected=divided(p.rejected, n % 2)) for n, p in enumerate(rows)]
    directory = tmp_path_factory.mktemp("thoughtful")
    write_pairs(directory, pairs, summary="", answers_alone=True)
    return directory / "train.parquet"


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "kto", "orpo"])
@pytest.mark.parametrize("shared", [True, False])
def test_answers_alone_have_log_probabilities_given_their_reasoning(
    tmp_path: Path, sharp: Path, thoughtful: Path, loss: str, shared: bool
) -> None:
    settings: dict[str, Any] = {"loss": loss, "shared_prompts": shared, "beta": 0.5, "pairs_per_step": 8, "epochs": 4}
    log = log_of(run(tmp_path, sharp, thoughtful, **settings))
    pairs = token_pairs(thoughtful)
    assert [pair.given for pair in pairs] == [(1, n % 2) for n in range(8)]

    def answer(ids: list[int], distributions: list[torch.Tensor], given: int) -> float:
        tokens = list(zip(distributions, ids, strict=True))[given:]
        return sum(float(p[token].log()) for p, token in tokens)

    exact = terms(sharp, thoughtful)
    for side, ids_of in (("chosen", lambda pair: pair.chosen), ("rejected", lambda pair: pair.rejected)):
        number = ("chosen", "rejected").index(side)
        found = [answer(ids_of(p), e[number], p.given[number]) for p, e in zip(pairs, exact, strict=True)]
        assert log[0][f"logps/{side}"] == pytest.approx(mean(found), abs=1e-4)
    if loss != "orpo":
        assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0  # the reference's are of the same tokens
    assert log[-1]["loss"] < log[0]["loss"]


def test_reasoning_that_is_given_is_the_same_training_as_reasoning_in_the_prompt(
    tmp_path: Path, sharp: Path, pairs: Path
) -> None:
    """With one thought for both completions of a pair, which a prompt can have in it."""

    def written(name: str, table: list[PreferencePair], answers_alone: bool) -> Path:
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name, table, summary="", answers_alone=answers_alone)
        return tmp_path / name / "train.parquet"

    given, prompted = [], []
    for n, pair in enumerate(token_pairs(pairs)):
        prompt, thought = Prompt(f"p{n}", "x"), [100 + n, 30]
        chosen, rejected = (
            Completion("y", [*thought, *ids], [], "stop", reasoning="t", reasoning_tokens=2)
            for ids in (pair.chosen, pair.rejected)
        )
        given.append(PreferencePair(prompt, pair.prompt, chosen, rejected))
        answers = (Completion("y", ids, [], "stop") for ids in (pair.chosen, pair.rejected))
        prompted.append(PreferencePair(prompt, [*pair.prompt, *thought], *answers))
    settings: dict[str, Any] = {"reference_decay": 0.5, "nll_coefficient": 0.5, "wpo": True}
    of_given = run(tmp_path / "one", sharp, written("given", given, True), **settings)
    of_prompted = run(tmp_path / "other", sharp, written("prompted", prompted, False), **settings)
    assert losses(of_given) == pytest.approx(losses(of_prompted), rel=1e-4)
    assert apart(weights(of_given), weights(of_prompted)) < 1e-4


def test_bcos_shift_is_the_running_mean_of_the_rewards_with_those_of_the_step(
    tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    log = log_of(run(tmp_path, tiny_model, grouped, loss="bco", epochs=3, learning_rate=1e-2))
    means = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in log]  # four pairs in each step
    assert [row["reward_shift"] for row in log] == pytest.approx(
        [mean(means[: n + 1]) for n in range(len(log))], abs=1e-6
    )
    assert log[-1]["reward_shift"] != 0.0


def test_bco_takes_unpaired_examples(tmp_path: Path, tiny_model: Path, rows: list[PreferencePair]) -> None:
    singles = [PreferencePair(r.prompt, r.prompt_ids, r.chosen, ABSENT) for r in rows]
    singles += [PreferencePair(r.prompt, r.prompt_ids, ABSENT, r.rejected) for r in rows[:4]]
    write_tables(tmp_path / "unpaired.parquet", [pairs_table(singles, "unpaired")])
    log = log_of(run(tmp_path, tiny_model, tmp_path / "unpaired.parquet", loss="bco", epochs=3, pairs_per_step=12))
    assert log[0]["loss"] == pytest.approx(LOG_2, rel=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(math.isfinite(row["grad_norm"]) for row in log)


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "kto"},
        {"loss": "bco"},
        {"loss": "aot"},
        {"loss": "aot_unpaired"},
        {"ld_alpha": 0.3},
        {"wpo": True, "nll_coefficient": 0.5},
        {"adapter": {}, "learning_rate": 1e-2},
    ],
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
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "kto"},
        {"loss": "bco"},
        {"loss": "bco_pair"},
        {"loss": "aot"},
        {"loss": "aot_unpaired"},
        {"loss": "discopop"},
        {"ld_alpha": 0.3},
        {"adapter": {}},
        {"adapter": {"modules_to_save": ["lm_head"]}},
    ],
)
def test_sharing_prompts_does_not_change_the_losses(
    tmp_path: Path, tiny_model: Path, grouped: Path, settings: dict[str, Any], precision: str, tolerance: float
) -> None:
    shared = run(tmp_path / "a", tiny_model, grouped, precision=precision, epochs=2, **settings)
    own = run(tmp_path / "b", tiny_model, grouped, precision=precision, epochs=2, shared_prompts=False, **settings)
    assert losses(shared) == pytest.approx(losses(own), abs=tolerance)
    assert losses(shared)[-1] != losses(shared)[0]


@pytest.mark.parametrize("settings", [{}, {"adapter": {}, "learning_rate": 1e-2}, {"gradient_checkpointing": True}])
def test_over_bfloat16_copies_of_the_weights_rewards_begin_at_zero_and_losses_are_autocasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, grouped: Path, settings: dict[str, Any]
) -> None:
    settings = {"precision": "bf16", "pairs_per_step": 8, "epochs": 3, "tokens_per_micro_batch": 64, **settings}
    cast = log_of(run(tmp_path / "a", tiny_model, grouped, **settings))
    monkeypatch.setattr(Compute, "copies", True)  # as on a GPU
    written = run(tmp_path / "b", tiny_model, grouped, **settings)
    log = log_of(written)
    assert log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in cast], abs=0.02)
    assert log[-1]["loss"] < log[0]["loss"]
    assert {tensor.dtype for tensor in weights(written).values()} == {torch.float32}


def test_batches_that_a_thread_makes_ahead_are_the_same_training_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, grouped: Path
) -> None:
    settings = {"loss": "kto", "pairs_per_step": 3, "epochs": 2, "tokens_per_micro_batch": 32}
    here = run(tmp_path / "a", tiny_model, grouped, **settings)
    monkeypatch.setattr("iterdpo.training.step.collator", lambda device: ThreadPoolExecutor(1, "collate"))
    threads: set[str] = set()

    def noted(trees: Any, *, shared: bool) -> Batch:
        threads.add(threading.current_thread().name)
        return collate(trees, shared=shared)

    monkeypatch.setattr("iterdpo.training.step.collate", noted)
    ahead = run(tmp_path / "b", tiny_model, grouped, **settings)
    assert "collate_0" in threads
    for name in ("loss", "grad_norm", "kl", "logps/chosen"):
        assert [row[name] for row in log_of(ahead)] == [row[name] for row in log_of(here)]
    assert apart(weights(ahead), weights(here)) == 0.0


READING = {"_local_scalar_dense", "is_nonzero", "nonzero", "bincount", "masked_select", "equal"}


class Reading(TorchDispatchMode):
    """Notes what would wait for a GPU to say a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"wpo": True, "nll_coefficient": 0.5}, {"loss": "aot"}, {"xpo_alpha": 0.1}])
def test_the_losses_of_a_batch_need_no_value_that_was_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, grouped: Path, settings: dict[str, Any]
) -> None:
    of_batch, reading = Trainer.losses, Reading()

    def watched(trainer: Trainer, batch: Any, of_step: Any) -> Any:
        if batch.batch.layout is not None:
            assert batch.batch.layout.query_slot.ndim == 1  # of a CPU alone
        with reading:
            return of_batch(trainer, batch, of_step)

    monkeypatch.setattr(Trainer, "losses", watched)
    run(tmp_path, tiny_model, grouped, pairs_per_step=8, precision="bf16", **settings)
    assert reading.found == []


def test_a_loss_that_is_not_finite_ends_training_before_it_is_applied(
    tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    with pytest.raises(RuntimeError, match="not finite, and not applied"):
        run(tmp_path, tiny_model, pairs, learning_rate=1e30, max_grad_norm=1e30, lr_scheduler="constant")


def broken(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """A loss that is not a number in these steps, counted from 0, each of one micro-batch."""
    from iterdpo.training import step

    calls = iter(range(1000))
    original = step.preference_loss

    def loss(*arguments: Any, **options: Any) -> PreferenceLoss:
        found = original(*arguments, **options)
        return found._replace(losses=found.losses * math.nan) if next(calls) in steps else found

    monkeypatch.setattr(step, "preference_loss", loss)


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


def test_the_steps_after_one_that_was_skipped_go_on(
    tmp_path: Path, tiny_model: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, {1})
    log = log_of(run(tmp_path, tiny_model, grouped, epochs=2, sentinels={"non_finite": "skip"}))
    assert ["loss" in row for row in log] == [True, False, True, True]
    assert log[-1]["rewards/margins"] != 0.0
    assert all(math.isfinite(value) for row in log for value in row.values() if isinstance(value, float))


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", LOG_2), ("kto", 0.5), ("aot_unpaired", LOG_2)])
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


def test_the_round_warms_up_over_a_number_of_steps(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    settings = {"lr_scheduler": "constant", "learning_rate": 1e-3}
    log = log_of(run(tmp_path / "a", tiny_model, pairs, warmup_steps=4, **settings))
    assert [row["learning_rate"] for row in log] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    log = log_of(run(tmp_path / "b", tiny_model, pairs, warmup_steps=0, **settings))
    assert [row["learning_rate"] for row in log] == [1e-3] * 6
    log = log_of(run(tmp_path / "c", tiny_model, pairs, warmup_steps=12, **settings))
    assert log[-1]["learning_rate"] == pytest.approx(5e-4)


def test_the_learning_rate_warms_up_to_its_peak_and_is_never_zero() -> None:
    def factors(schedule: str) -> list[float]:
        return [learning_rate_factor(s, 10, warmup=2, schedule=schedule) for s in range(10)]

    assert factors("constant") == [0.5, *[1.0] * 9]
    assert factors("linear") == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert factors("cosine")[2] == 1.0
    assert min(factors("cosine")) > 0

"""The losses against TRL 1.16's own, on a tiny model whose log-probabilities are computed here from its logits."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from iterdpo.config import LOSSES
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.training.losses import (
    PairLogps,
    PreferenceLoss,
    aot_matches,
    exo_pair_loss,
    kl_estimate,
    kto_loss,
    nll_term,
    preference_loss,
    wpo_weights,
)

BETA = 0.3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# `DPOTrainer` has no dpop, orpo, simpo and bco with a shift; its sft has a test of its own.
IN_DPO_TRAINER = [name for name in LOSSES if name not in {"dpop", "kto", "bco", "orpo", "simpo", "sft"}]
SORTING = ["aot", "aot_unpaired"]  # a pair's loss is not its own

PROMPTS = [[5, 17, 99], [42, 7], [200, 201, 202, 203]]
# The middle pair goes on as its prompt ends. The model likes that: embeddings are tied.
CHOSEN = [[30, 31, 32, 33, 34], [7, 7], [9, 8, 7]]
REJECTED = [[40, 41], [7, 7, 7, 50], [9, 8, 6, 5, 4, 3, 2]]
# How far the policy has moved, in nats, by pair and completion: near, far, either way.
MOVED = [(0.7, -1.1), (-2.5, 4.0), (6.0, 3.5)]


class World(NamedTuple):
    trainer: Any  # trl.DPOTrainer
    model: Any  # the same weights, without TRL's patches
    batch: dict[str, Tensor]  # collated by TRL
    logps: PairLogps  # of the same pairs, computed here
    alignments: tuple[Tensor, Tensor]  # [B] each, WPO's


def token_logps(model: Any, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
    """Of each token of the completion: log pi(y_t), and log sum_v pi(v)^2. [|y|] each."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]  # [|y|, V]
    every = logits.log_softmax(-1)
    return every.gather(1, torch.tensor(completion)[:, None])[:, 0], every.exp().square().sum(-1).log()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    datasets, transformers, trl = (pytest.importorskip(name) for name in ("datasets", "transformers", "trl"))
    root: Path = tmp_path_factory.mktemp("trl")
    path = build_tiny_checkpoint(root / "model", initializer_range=0.08)  # probabilities far from uniform

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(root / "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            precompute_ref_log_probs=True,
            use_weighting=True,  # or the weights' terms are not computed; each test says whether they are used
            beta=BETA,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
    )
    trainer.model.train()  # or TRL counts as if it evaluated; the model has no dropout
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        scored = [
            [token_logps(model, prompt, completion) for prompt, completion in zip(PROMPTS, side, strict=True)]
            for side in (CHOSEN, REJECTED)
        ]
    chosen, rejected = (torch.stack([tokens.sum() for tokens, _ in side]) for side in scored)
    moved = torch.tensor(MOVED)
    lengths = [torch.tensor([len(completion) for completion in side]) for side in (CHOSEN, REJECTED)]
    logps = PairLogps(chosen, rejected, chosen - moved[:, 0], rejected - moved[:, 1], *lengths)
    alignments = [torch.stack([(tokens - squares).mean() for tokens, squares in side]) for side in scored]
    batch = trainer.data_collator(rows)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps.reference_chosen, logps.reference_rejected
    return World(trainer, model, batch, logps, (alignments[0], alignments[1]))


def trl_loss(world: World, name: str, *, rows: slice = slice(None), wpo: bool = False, eps: float = 0.0) -> Tensor:
    """TRL's loss on the pairs `rows`: a mean over them, []."""
    trainer = world.trainer
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    trainer.label_smoothing, trainer.use_weighting = eps, wpo
    halves = {key: value.unflatten(0, (-1, len(PROMPTS)))[:, rows].flatten(0, 1) for key, value in world.batch.items()}
    return trainer.compute_loss(trainer.model, halves).detach()


def our_loss(world: World, name: str, **keys: float) -> PreferenceLoss:
    logps = world.logps
    loss: Any = LOSSES[name](type=name, **{key: keys[key] for key in keys if key in LOSSES[name].model_fields})
    if not loss.uses_reference:
        zeros = torch.zeros_like(logps.chosen)
        logps = logps._replace(reference_chosen=zeros, reference_rejected=zeros)
    of_step = aot_matches(logps, paired=name == "aot") if name in SORTING else None
    return preference_loss(loss, logps, beta=BETA, of_step=of_step)


@pytest.mark.parametrize("row", [*range(len(PROMPTS))])
@pytest.mark.parametrize("name", [name for name in IN_DPO_TRAINER if name not in SORTING])
def test_a_loss_is_trls_of_that_name_on_every_pair(world: World, name: str, row: int) -> None:
    eps = 0.15 if name in {"robust", "exo_pair"} else 0.0
    theirs = trl_loss(world, name, rows=slice(row, row + 1), eps=eps)
    torch.testing.assert_close(our_loss(world, name, label_smoothing=eps).losses[row], theirs, **CLOSE)


@pytest.mark.parametrize("name", SORTING)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_aot_of_a_step_is_trls_aot_of_a_batch_and_so_is_its_gradient(world: World, name: str, eps: float) -> None:
    theirs = trl_loss(world, name, eps=eps)
    torch.testing.assert_close(our_loss(world, name, label_smoothing=eps).losses.mean(), theirs, **CLOSE)
    logps = world.logps
    policy = [side.clone().requires_grad_() for side in logps[:2]]
    one, other = (
        [policy[0] - policy[1], logps.reference_chosen - logps.reference_rejected]
        if name == "aot"
        else [policy[0] - logps.reference_chosen, policy[1] - logps.reference_rejected]
    )
    h = BETA * (one.sort().values - other.sort().values)
    whole = (-(1 - eps) * torch.nn.functional.logsigmoid(h) - eps * torch.nn.functional.logsigmoid(-h)).mean()
    torch.testing.assert_close(whole.detach(), theirs, **CLOSE)
    expected = torch.autograd.grad(whole, policy)
    moved = world._replace(logps=logps._replace(chosen=policy[0], rejected=policy[1]))
    found = torch.autograd.grad(our_loss(moved, name, label_smoothing=eps).losses.mean(), policy)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_ld_dpo_is_trls_with_the_same_alpha(world: World, name: str, alpha: float) -> None:
    logps = world.logps
    with torch.no_grad():
        both = [
            [token_logps(world.model, *row)[0] for row in zip(PROMPTS, side, strict=True)]
            for side in (CHOSEN, REJECTED)
        ]
    weighted = [[], []]
    for pair in zip(*both, strict=True):
        common = min(map(len, pair))
        for side, tokens in zip(weighted, pair, strict=True):
            side.append(tokens[:common].sum() + alpha * tokens[common:].sum())
    world.trainer.ld_alpha = alpha
    theirs = trl_loss(world, name)
    world.trainer.ld_alpha = None
    ours = world._replace(logps=logps._replace(chosen=torch.stack(weighted[0]), rejected=torch.stack(weighted[1])))
    torch.testing.assert_close(our_loss(ours, name).losses.mean(), theirs, **CLOSE)


def test_the_mean_over_pairs_is_trls_batch_loss(world: World) -> None:
    torch.testing.assert_close(our_loss(world, "sigmoid").losses.mean(), trl_loss(world, "sigmoid"), **CLOSE)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_that_trl_ignores_is_applied_here(world: World, name: str) -> None:
    torch.testing.assert_close(trl_loss(world, name, eps=0.2), trl_loss(world, name), rtol=0, atol=0)
    plain, smoothed = our_loss(world, name), our_loss(world, name, label_smoothing=0.2)
    # -log sigmoid(-h) = h - log sigmoid(h): smoothing adds eps * h
    margins = plain.chosen_rewards - plain.rejected_rewards
    torch.testing.assert_close(smoothed.losses, plain.losses + 0.2 * margins, **CLOSE)


@pytest.mark.parametrize("row", [*range(len(PROMPTS))])
def test_conservative_dpo_is_trls_aot_of_a_single_pair(world: World, row: int) -> None:
    # aot sorts the log ratios of a batch, and smooths labels: of one pair, there is nothing to sort
    theirs = trl_loss(world, "aot", rows=slice(row, row + 1), eps=0.2)
    torch.testing.assert_close(our_loss(world, "sigmoid", label_smoothing=0.2).losses[row], theirs, **CLOSE)


def test_trls_sft_is_the_mean_of_ours_weighted_by_length(world: World) -> None:
    lengths = world.logps.chosen_tokens
    ours = our_loss(world, "sft").losses
    torch.testing.assert_close((ours * lengths).sum() / lengths.sum(), trl_loss(world, "sft"), **CLOSE)
    assert not math.isclose(ours.mean().item(), trl_loss(world, "sft").item(), rel_tol=1e-3)


def test_iterative_rpo_is_trls_sum_of_sigmoid_and_sft_on_a_pair(world: World) -> None:
    term = nll_term(world.logps.chosen, world.logps.chosen_tokens)
    for row in range(len(PROMPTS)):
        one = slice(row, row + 1)
        theirs = trl_loss(world, "sigmoid", rows=one) + 0.5 * trl_loss(world, "sft", rows=one)
        torch.testing.assert_close(our_loss(world, "sigmoid").losses[row] + 0.5 * term[row], theirs, **CLOSE)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "sppo_hard"])
def test_wpo_is_the_loss_times_the_weights_as_in_trl(world: World, name: str) -> None:
    weights = wpo_weights(*world.alignments)
    assert weights.min() < 1 < weights.max()  # TRL 1.16 does not cap them either
    theirs = trl_loss(world, name, wpo=True)
    torch.testing.assert_close((weights * our_loss(world, name).losses).mean(), theirs, **CLOSE)


@pytest.mark.parametrize("name", IN_DPO_TRAINER)
def test_rewards_are_trls_or_where_the_loss_is_length_normalised_trls_over_length(world: World, name: str) -> None:
    eps = 0.1 if name in {"robust", "exo_pair"} else 0.0
    trl_loss(world, name, eps=eps)
    logged = {side: world.trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")}
    ours = our_loss(world, name, label_smoothing=eps)
    normalised = name in {"ipo", "sigmoid_norm"}
    chosen = ours.chosen_rewards * (world.logps.chosen_tokens if normalised else 1)
    rejected = ours.rejected_rewards * (world.logps.rejected_tokens if normalised else 1)
    assert [chosen.mean().item(), rejected.mean().item()] == pytest.approx([*logged.values()], abs=1e-5)


def test_exo_without_label_smoothing_is_infinite_in_trl_and_refused_here(world: World) -> None:
    assert trl_loss(world, "exo_pair", eps=0.0).isinf()  # TRL's constructor refuses it, its loss does not
    with pytest.raises(ValueError, match="above 0"):
        exo_pair_loss(world.logps, beta=BETA, label_smoothing=0.0)


def means(world: World) -> tuple[Tensor, Tensor]:
    return world.logps.chosen / world.logps.chosen_tokens, world.logps.rejected / world.logps.rejected_tokens


def test_orpo_is_trls_odds_ratio_loss_and_the_nll_of_the_completion(world: World) -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=BETA, accelerator=world.trainer.accelerator)
    # TRL returns beta * log sigmoid, and takes it from the NLL
    theirs, chosen_rewards, rejected_rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *means(world))
    ours = our_loss(world, "orpo")
    torch.testing.assert_close(ours.losses, our_loss(world, "sft").losses - theirs, **CLOSE)
    torch.testing.assert_close(ours.chosen_rewards, chosen_rewards, **CLOSE)
    torch.testing.assert_close(ours.rejected_rewards, rejected_rewards, **CLOSE)


def test_trls_orpo_takes_its_nll_over_the_prompt_too(world: World) -> None:
    from trl.experimental.orpo import ORPOTrainer

    prompt, chosen, rejected = PROMPTS[0], CHOSEN[0], REJECTED[0]
    sides = {"chosen": chosen, "rejected": rejected}
    batch = {}
    for side, completion in sides.items():
        batch[f"{side}_input_ids"] = torch.tensor([prompt + completion])
        batch[f"{side}_attention_mask"] = torch.ones(1, len(prompt + completion), dtype=torch.long)
        batch[f"{side}_labels"] = torch.tensor([[-100] * len(prompt) + completion])
    trainer = SimpleNamespace(
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        padding_value=0,
        accelerator=world.trainer.accelerator,
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    with torch.no_grad():
        chosen_logps, rejected_logps, _, _, nll = ORPOTrainer.concatenated_forward(trainer, world.model, batch)
        whole = token_logps(world.model, prompt[:1], prompt[1:] + chosen)[0]
    torch.testing.assert_close(torch.cat([chosen_logps, rejected_logps]), torch.stack(means(world))[:, 0], **CLOSE)
    torch.testing.assert_close(nll, -whole.mean(), **CLOSE)  # the prompt's first token is predicted by nothing
    assert not math.isclose(nll.item(), our_loss(world, "sft").losses[0].item(), rel_tol=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.4])
def test_simpo_is_trls_with_the_same_gamma(world: World, gamma: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        loss_type="simpo",
        simpo_gamma=gamma,
        beta=BETA,
        alpha=0.0,
        label_smoothing=0.0,
        accelerator=world.trainer.accelerator,
    )
    theirs = PreferenceLoss(*CPOTrainer.cpo_loss(trainer, *means(world)))
    torch.testing.assert_close(our_loss(world, "simpo", gamma=gamma), theirs, **CLOSE)


def trl_kto(world: World, desirable: Tensor, batch: dict[str, Tensor], weights: tuple[float, float]) -> tuple[Any, Any]:
    """TRL's KTO loss [], a mean over the batch's completions, and the metrics that it logs."""
    from trl import KTOTrainer

    dpo = world.trainer
    trainer = SimpleNamespace(
        model=dpo.model,
        accelerator=dpo.accelerator,
        loss_type="kto",
        beta=BETA,
        calculate_KL=True,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    trainer._compute_kl_logps = KTOTrainer._compute_kl_logps.__get__(trainer)
    loss = KTOTrainer._compute_loss(trainer, dpo.model, {**batch, "label": desirable}, return_outputs=False)
    return loss.detach(), trainer._metrics["train"]


@pytest.mark.parametrize("kl_sign", [1, -1])
@pytest.mark.parametrize("desirable", [(True, True, True), (True, False, True), (False, False, False)])
def test_kto_is_trls_where_the_kl_is_above_0_and_below(world: World, desirable: tuple[bool, ...], kl_sign: int) -> None:
    labels = torch.tensor(desirable)
    b = len(PROMPTS)
    # The three chosen completions; mismatched, the prompts followed by each other's.
    mismatched = [[*PROMPTS[i], *CHOSEN[i - 1]] for i in range(b)]
    width = max(len(ids) for ids in mismatched)
    with torch.no_grad():
        kl_policy = torch.stack([token_logps(world.model, PROMPTS[i], CHOSEN[i - 1])[0].sum() for i in range(b)])
    kl_reference = kl_policy - kl_sign * torch.tensor([0.5, 2.0, -1.0])
    batch = {
        **{key: world.batch[key][:b] for key in ("input_ids", "attention_mask", "completion_mask")},
        "KL_input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in mismatched]),
        "KL_attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in mismatched]),
        "KL_completion_mask": torch.tensor(
            [
                [0] * len(PROMPTS[i]) + [1] * len(CHOSEN[i - 1]) + [0] * (width - len(ids))
                for i, ids in enumerate(mismatched)
            ]
        ),
        "ref_logps": world.logps.reference_chosen,
        "ref_KL_logps": kl_reference,
    }
    loss, metrics = trl_kto(world, labels, batch, weights=(1.3, 0.8))
    kl = kl_estimate(kl_policy, kl_reference)
    assert kl.item() == pytest.approx(0.5 if kl_sign > 0 else 0.0, abs=1e-5)
    assert metrics["kl"] == [pytest.approx(kl.item(), abs=1e-5)]
    losses, rewards = kto_loss(
        world.logps.chosen,
        world.logps.reference_chosen,
        labels,
        kl,
        beta=BETA,
        desirable_weight=1.3,
        undesirable_weight=0.8,
    )
    torch.testing.assert_close(losses.mean(), loss, **CLOSE)
    for side, mask in (("chosen", labels), ("rejected", ~labels)):
        expected = [pytest.approx(rewards[mask].mean().item(), abs=1e-5)] if mask.any() else []
        assert metrics[f"rewards/{side}"] == expected

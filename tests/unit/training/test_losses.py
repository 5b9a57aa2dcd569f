"""The losses against plain Python in float64: values, rewards, gradients, limits, and what overflows in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from iterdpo.config import LOSSES
from iterdpo.training.losses import (
    PairLogps,
    PreferenceLoss,
    RewardShift,
    aot_matches,
    bco_loss,
    dpo_loss,
    exo_pair_loss,
    kl_estimate,
    kto_loss,
    kto_pair_loss,
    nll_term,
    preference_loss,
    robust_loss,
    wpo_weights,
)

PAIRED = [name for name in LOSSES if name != "kto"]
WITHOUT_REFERENCE = {"orpo", "simpo", "sft"}

# log-probabilities of whole completions: policy chosen, policy rejected, reference chosen, reference rejected
ROWS = [
    (-10.0, -12.0, -11.0, -11.0),
    (-83.25, -40.5, -80.0, -44.125),
    (-7.0, -7.0, -7.0, -7.0),
    (-301.5, -12.75, -250.0, -90.25),
    (-0.5, -64.0, -30.0, -2.0),
]
SETTINGS = [(0.1, 0.0), (0.5, 0.0), (0.1, 0.2), (2.0, 0.45)]


def by_hand(row: tuple[float, float, float, float], beta: float, eps: float) -> dict[str, float]:
    """The loss, the rewards and dL/dlogp, from softplus(x) = log(1 + e^x): -log sigmoid(h) = softplus(-h)."""

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    chosen, rejected = beta * (row[0] - row[2]), beta * (row[1] - row[3])
    h = chosen - rejected
    slope = 1 / (1 + math.exp(-h)) - (1 - eps)  # dL/dh = eps sigmoid(h) - (1 - eps) sigmoid(-h)
    return {
        "loss": (1 - eps) * softplus(-h) + eps * softplus(h),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "d_chosen": beta * slope,
        "d_rejected": -beta * slope,
    }


def tensors(dtype: torch.dtype = torch.float64, *, grad: bool = False) -> list[torch.Tensor]:
    columns = [torch.tensor(column, dtype=dtype) for column in zip(*ROWS, strict=True)]
    for policy in columns[:2]:
        policy.requires_grad_(grad)
    return columns


@pytest.mark.parametrize(("beta", "eps"), SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_losses_rewards_and_gradients_agree_with_float64_arithmetic(
    beta: float, eps: float, dtype: torch.dtype, tolerance: float
) -> None:
    columns = tensors(dtype, grad=True)
    out = dpo_loss(*columns, beta=beta, label_smoothing=eps)
    out.losses.sum().backward()
    expected = [by_hand(row, beta, eps) for row in ROWS]

    def close(got: torch.Tensor | None, name: str) -> None:
        assert got is not None
        assert got.tolist() == pytest.approx([e[name] for e in expected], rel=tolerance, abs=tolerance)

    close(out.losses, "loss")
    close(out.chosen_rewards, "chosen_reward")
    close(out.rejected_rewards, "rejected_reward")
    close(columns[0].grad, "d_chosen")
    close(columns[1].grad, "d_rejected")


@pytest.mark.parametrize(("beta", "eps"), SETTINGS)
def test_autograd_agrees_with_finite_differences(beta: float, eps: float) -> None:
    def losses(*logps: torch.Tensor) -> torch.Tensor:
        return dpo_loss(*logps, beta=beta, label_smoothing=eps).losses

    assert torch.autograd.gradcheck(losses, tensors(grad=True))


def test_one_row_worked_out_with_a_pocket_calculator() -> None:
    # 0.5 * ((-10 + 11) - (-12 + 11)) = 1, and -log sigmoid(1) = log(1 + 1/e) = 0.3132616875
    out = dpo_loss(*(column[:1] for column in tensors()), beta=0.5)
    assert out.losses.item() == pytest.approx(0.3132616875, abs=1e-10)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (0.5, -0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_where_the_policy_is_the_reference_rewards_are_exactly_0_and_the_loss_is_log_2(dtype: torch.dtype) -> None:
    chosen, rejected, _, _ = tensors(dtype)
    out = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), beta=0.1)
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0] * len(ROWS)
    assert out.losses.tolist() == [torch.tensor(math.log(2), dtype=dtype).item()] * len(ROWS)


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    chosen, rejected, ref_chosen, ref_rejected = tensors()
    one = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    other = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.3)
    margins = one.chosen_rewards - one.rejected_rewards
    assert torch.equal(other.chosen_rewards - other.rejected_rewards, -margins)
    # -log sigmoid(-h) = h - log sigmoid(h)
    torch.testing.assert_close(other.losses, one.losses + margins, rtol=0, atol=1e-12)


def test_label_smoothing_has_its_minimum_where_the_policy_is_as_sure_as_the_labels() -> None:
    # dL/dh = 0 at sigmoid(h) = 1 - eps: with eps = 0.2, h = log 4. Without smoothing the loss falls for ever.
    margin = torch.tensor([math.log(4)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    smoothed = dpo_loss(margin, zero, zero, zero, beta=1.0, label_smoothing=0.2).losses
    assert torch.autograd.grad(smoothed, margin)[0].item() == pytest.approx(0, abs=1e-12)
    # the entropy of the labels, in nats: -(0.8 log 0.8 + 0.2 log 0.2)
    assert smoothed.item() == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)), abs=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_a_margin_of_thousands_of_nats_stays_finite(eps: float) -> None:
    policy = torch.tensor([5000.0, -5000.0], requires_grad=True)
    zero = torch.zeros(2)
    losses = dpo_loss(policy, zero, zero, zero, beta=1.0, label_smoothing=eps).losses
    losses.sum().backward()
    # softplus(5000) = 5000: the loss is linear out there
    assert losses.tolist() == pytest.approx([eps * 5000, (1 - eps) * 5000])
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([eps, -(1 - eps)])


def test_losses_come_one_a_pair_and_rewards_carry_no_gradient() -> None:
    out: Any = dpo_loss(*tensors(grad=True), beta=0.1)
    assert out.losses.shape == out.chosen_rewards.shape == out.rejected_rewards.shape == (len(ROWS),)
    assert out.losses.requires_grad
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


# One pair for the pocket calculator, at beta = 0.5. Chosen: 4 tokens, log pi = -8, log ref = -12, so r = 0.5 * 4 = 2,
# a mean of -2 (reference -3) a token. Rejected: 2 tokens, -6 and -5, so r = -0.5, a mean of -3 (-2.5). h = 2.5.
PAIR = (-8.0, -6.0, -12.0, -5.0, 4, 2)
SWAPPED = (-6.0, -8.0, -5.0, -12.0, 2, 4)  # r = -0.5 and 2, h = -2.5
SMOOTHING = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.1}}
LENGTH_NORMALISED = {"sigmoid_norm", "ipo", "orpo", "simpo", "sft"}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nll(x: float) -> float:
    """-log sigmoid(x)"""
    return math.log(1 + math.exp(-x))


def odds(p: float) -> float:
    return math.exp(p) / (1 - math.exp(p))


def kl_of_coins(q: float, p: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def pairs(*rows: tuple[float, float, float, float, int, int], dtype: torch.dtype = torch.float64) -> PairLogps:
    columns = list(zip(*rows, strict=True))
    logps = [torch.tensor(column, dtype=dtype) for column in columns[:4]]
    for policy in logps[:2]:
        policy.requires_grad_()
    return PairLogps(*logps, *(torch.tensor(column) for column in columns[4:]))


SHIFT = 0.25


def loss_of(name: str, logps: PairLogps, *, beta: float = 0.5, **keys: float) -> PreferenceLoss:
    """The loss of pairs that are a whole step."""
    loss: Any = LOSSES[name](type=name, **SMOOTHING.get(name, {}) | keys)
    of_step = {
        "aot": aot_matches(logps, paired=True),
        "aot_unpaired": aot_matches(logps, paired=False),
        "bco": torch.tensor(SHIFT, dtype=torch.float64),
    }
    return preference_loss(loss, logps, beta=beta, of_step=of_step.get(name))


SUMMED, AVERAGED, NO_REFERENCE, NONE = (2.0, -0.5), (0.5, -0.25), (-1.0, -1.5), (0.0, 0.0)  # rewards of PAIR


@pytest.mark.parametrize(
    ("name", "options", "loss", "loss_when_swapped", "rewards"),
    [
        ("sigmoid", {}, nll(2.5), nll(-2.5), SUMMED),
        (
            "sigmoid",
            {"label_smoothing": 0.2},
            0.8 * nll(2.5) + 0.2 * nll(-2.5),
            0.8 * nll(-2.5) + 0.2 * nll(2.5),
            SUMMED,
        ),
        ("sigmoid_norm", {}, nll(0.5 + 0.25), nll(-0.75), AVERAGED),
        ("sigmoid_norm", {"label_smoothing": 0.2}, 0.8 * nll(0.75) + 0.2 * nll(-0.75), None, AVERAGED),
        ("robust", {"label_smoothing": 0.1}, (0.9 * nll(2.5) - 0.1 * nll(-2.5)) / 0.8, None, SUMMED),
        # per token (-2 + 3) - (-3 + 2.5) = 1.5, and the target is 1 / (2 * 0.5) = 1
        ("ipo", {}, 0.5**2, 2.5**2, AVERAGED),
        ("hinge", {}, 0.0, 1 + 2.5, SUMMED),
        # the penalty 3 * max(0, -r_w) is 0, and 3 * 0.5 when swapped
        ("dpop", {"penalty_weight": 3.0}, nll(2.5), nll(-2.5 - 1.5), SUMMED),
        ("exo_pair", {"label_smoothing": 0.1}, kl_of_coins(sigmoid(2.5), 0.9), kl_of_coins(sigmoid(-2.5), 0.9), SUMMED),
        ("nca_pair", {}, nll(2) + nll(-2) / 2 + nll(0.5) / 2, nll(-0.5) + nll(0.5) / 2 + nll(-2) / 2, SUMMED),
        ("apo_zero", {}, (1 - sigmoid(2)) + sigmoid(-0.5), (1 - sigmoid(-0.5)) + sigmoid(2), SUMMED),
        ("apo_down", {}, sigmoid(2) + (1 - sigmoid(2.5)), sigmoid(-0.5) + (1 - sigmoid(-2.5)), SUMMED),
        # eta = 2: the log ratios 4 and -1 are to be eta / 2 = 1 and -1
        ("sppo_hard", {}, 3.0**2 + 0.0**2, 2.0**2 + 5.0**2, SUMMED),
        # -log sigmoid(log(a / b)) = log(1 + b / a)
        (
            "orpo",
            {},
            2 + 0.5 * math.log(1 + odds(-3) / odds(-2)),
            3 + 0.5 * math.log(1 + odds(-2) / odds(-3)),
            NO_REFERENCE,
        ),
        ("bco_pair", {}, nll(2) + nll(0.5), nll(-0.5) + nll(-2), SUMMED),
        # rewards less SHIFT: 1.75 and -0.75
        ("bco", {}, nll(1.75) + nll(0.75), nll(-0.75) + nll(-1.75), SUMMED),
        # the weight of the exponential: sigmoid(2.5 / 0.5), and sigmoid(-5) when swapped
        (
            "discopop",
            {"tau": 0.5},
            sigmoid(-5) * nll(2.5) + sigmoid(5) * math.exp(-2.5),
            sigmoid(5) * nll(-2.5) + sigmoid(-5) * math.exp(2.5),
            SUMMED,
        ),
        # differences of log pi -2 and 2, of log ref -7 and 7: sorted, 0.5 * (-2 + 7) and 0.5 * (2 - 7)
        ("aot", {}, nll(2.5), nll(-2.5), SUMMED),
        # log ratios 4 and -1 chosen, -1 and 4 rejected: sorted, both differ by 0
        ("aot_unpaired", {}, nll(0), nll(0), SUMMED),
        ("simpo", {"gamma": 0.2}, nll(0.5 * (-2 + 3) - 0.2), nll(-0.5 - 0.2), NO_REFERENCE),
        ("sft", {}, 2.0, 3.0, NONE),
    ],
)
def test_a_pair_worked_out_with_a_pocket_calculator(
    name: str, options: dict[str, float], loss: float, loss_when_swapped: float | None, rewards: tuple[float, float]
) -> None:
    out = loss_of(name, pairs(PAIR, SWAPPED), **options)
    assert out.losses[0].item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    if loss_when_swapped is not None:
        assert out.losses[1].item() == pytest.approx(loss_when_swapped, rel=1e-12)
    assert out.chosen_rewards.tolist() == pytest.approx([*rewards], rel=1e-12)
    assert out.rejected_rewards.tolist() == pytest.approx([*rewards[::-1]], rel=1e-12)


# No reward is 0 and no margin 1: dpop and the hinge have their kinks there.
VARIED = [
    (*PAIR[:4], 4, 2),
    (*SWAPPED[:4], 2, 4),
    (-20.5, -31.0, -21.0, -28.25, 7, 11),
    (-3.0, -0.75, -2.5, -1.0, 3, 1),
]


@pytest.mark.parametrize("name", [name for name in PAIRED if name != "aot_unpaired"])  # has another pair's gradient
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_gradient_of_every_loss_agrees_with_finite_differences(name: str, beta: float) -> None:
    logps = pairs(*VARIED)

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss_of(name, logps._replace(chosen=chosen, rejected=rejected), beta=beta).losses

    assert torch.autograd.gradcheck(losses, logps[:2])


@pytest.mark.parametrize("name", PAIRED)
def test_every_loss_gives_one_value_a_pair_and_rewards_without_gradient(name: str) -> None:
    out = loss_of(name, pairs(*VARIED))
    assert out.losses.shape == out.chosen_rewards.shape == out.rejected_rewards.shape == (len(VARIED),)
    assert out.losses.requires_grad
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", [name for name in PAIRED if name not in WITHOUT_REFERENCE])
def test_rewards_are_exactly_0_where_the_policy_is_the_reference(name: str) -> None:
    logps = pairs(*((c, r, c, r, m, n) for c, r, _, _, m, n in VARIED), dtype=torch.float32)
    out = loss_of(name, logps, beta=0.1)
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0] * len(VARIED)


@pytest.mark.parametrize("name", PAIRED)
def test_the_reference_matters_to_the_losses_that_have_one_alone(name: str) -> None:
    logps = pairs(*VARIED)
    moved = logps._replace(reference_chosen=logps.reference_chosen - 1)
    changed = loss_of(name, logps).losses != loss_of(name, moved).losses
    assert changed.any().item() is (name not in WITHOUT_REFERENCE)


@pytest.mark.parametrize("name", PAIRED)
def test_doubling_sums_and_lengths_leaves_the_length_normalised_losses_alone(name: str) -> None:
    logps = pairs(*VARIED)
    same = torch.isclose(loss_of(name, logps).losses, loss_of(name, PairLogps(*(2 * t for t in logps))).losses)
    assert same.all().item() is (name in LENGTH_NORMALISED)


@pytest.mark.parametrize(("name", "options"), [("robust", {"label_smoothing": 0.0}), ("dpop", {"penalty_weight": 0.0})])
def test_robust_without_noise_and_dpop_without_its_penalty_are_dpo(name: str, options: dict[str, float]) -> None:
    logps = pairs(*VARIED)
    torch.testing.assert_close(loss_of(name, logps, **options), dpo_loss(*logps[:4], beta=0.5), rtol=0, atol=1e-12)


def test_length_normalised_dpo_on_completions_of_one_token_is_dpo() -> None:
    logps = pairs(*((*row[:4], 1, 1) for row in VARIED))
    torch.testing.assert_close(loss_of("sigmoid_norm", logps), dpo_loss(*logps[:4], beta=0.5), rtol=0, atol=0)


def test_robust_on_flipped_labels_is_in_expectation_dpo_on_true_ones() -> None:
    logps = pairs(*VARIED)
    flipped = PairLogps(*(logps[i] for i in (1, 0, 3, 2, 5, 4)))
    seen = 0.7 * loss_of("robust", logps, label_smoothing=0.3).losses
    seen = seen + 0.3 * loss_of("robust", flipped, label_smoothing=0.3).losses
    torch.testing.assert_close(seen, dpo_loss(*logps[:4], beta=0.5).losses, rtol=0, atol=1e-12)


def test_simpos_gamma_is_taken_off_the_margin_of_rewards() -> None:
    # beta = 4: a mean of -2 + 0.75 / 4 a token gives away what gamma = 0.75 demands
    demanded = loss_of("simpo", pairs((-8.0 + 4 * 0.75 / 4, -6.0, 0.0, 0.0, 4, 2)), beta=4.0, gamma=0.75)
    plain = loss_of("simpo", pairs((-8.0, -6.0, 0.0, 0.0, 4, 2)), beta=4.0, gamma=0.0)
    assert demanded.losses.item() == pytest.approx(plain.losses.item(), abs=1e-12)
    assert plain.chosen_rewards.item() == -8.0  # 4 * -2: gamma is in no reward


@pytest.mark.parametrize(
    ("name", "row", "minimum"),
    [
        ("exo_pair", (math.log(9), 0.0, 0.0, 0.0, 1, 1), 0.0),  # sigmoid(log 9) = 0.9 = 1 - eps
        ("ipo", (-3.0, -8.0, -7.0, -8.0, 8, 2), 0.0),  # 4 / 8 = 1 / (2 beta) nats a token, at beta = 1
        ("sppo_hard", (-2.5, -3.5, -3.0, -3.0, 5, 5), 0.0),  # rewards of 1/2 and -1/2
        ("hinge", (-2.0, -7.0, -3.0, -6.0, 5, 5), 0.0),  # a margin of 2 is above 1
    ],
)
def test_a_loss_with_a_target_is_0_and_flat_at_its_target(
    name: str, row: tuple[float, float, float, float, int, int], minimum: float
) -> None:
    logps = pairs(row)
    losses = loss_of(name, logps, beta=1.0).losses
    assert losses.item() == pytest.approx(minimum, abs=1e-12)
    for gradient in torch.autograd.grad(losses.sum(), logps[:2]):
        assert gradient.item() == pytest.approx(0, abs=1e-12)


def test_dpop_penalises_a_chosen_completion_that_lost_probability_and_only_it() -> None:
    # Moving both completions of a pair down by 1 leaves DPO as it is; here r_w falls from 2 to 1.5, and from -0.5 to -1.
    lower = pairs(*((c - 1, r - 1, *rest) for c, r, *rest in (PAIR, SWAPPED)))
    before = loss_of("dpop", pairs(PAIR, SWAPPED), penalty_weight=5.0).losses
    after = loss_of("dpop", lower, penalty_weight=5.0).losses
    assert after[0].item() == pytest.approx(before[0].item(), abs=1e-12)
    assert after[1].item() == pytest.approx(nll(-2.5 - 5 * 1.0), rel=1e-12)


def test_sft_never_reads_the_rejected_completion() -> None:
    logps = pairs(PAIR)._replace(rejected=torch.tensor([float("nan")]), rejected_tokens=torch.tensor([0]))
    out = loss_of("sft", logps)
    assert out.losses.item() == 2.0
    assert out.chosen_rewards.item() == out.rejected_rewards.item() == 0.0


FAR = [(a, b, c, d, 1, 1) for a, c in ((0.0, -1e4), (-1e4, 0.0)) for b, d in ((0.0, -1e4), (-1e4, 0.0))]
EXTREME = [(c, r, 0.0, 0.0, 1, 1) for c in (0.0, -1e-9, -1e-3, -1e4) for r in (0.0, -1e-9, -1e-3, -1e4)]


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_ten_thousand_nats_and_certain_completions_stay_finite(name: str, dtype: torch.dtype) -> None:
    logps = pairs(*FAR, *EXTREME, dtype=dtype)
    losses = loss_of(name, logps, beta=1.0).losses
    gradients = torch.autograd.grad(losses.sum(), logps[:2], allow_unused=True)
    assert losses.isfinite().all()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_the_odds_of_a_nearly_certain_completion_keep_their_digits() -> None:
    # p_w = log 1/2 has odds 1. p_l = -1e-12: e^p / (1 - e^p) = 1e12 but for one part in 1e12. 1 - exp(p), in one
    # step, has four digits left.
    losses = loss_of("orpo", pairs((math.log(0.5), -1e-12, 0.0, 0.0, 1, 1)), beta=1.0).losses
    assert losses.item() == pytest.approx(math.log(2) + math.log(1e12), abs=1e-10)


@pytest.mark.parametrize(
    ("loss", "label_smoothing", "message"),
    [
        (exo_pair_loss, 0.0, "exo_pair needs a label_smoothing above 0 .* 0.001"),
        (exo_pair_loss, 0.5, "exo_pair needs .* below 0.5: 0.5 is not"),
        (robust_loss, 0.5, "robust needs .* below 0.5"),
        (robust_loss, -0.1, "robust needs .* -0.1 is not"),
    ],
)
def test_settings_under_which_a_loss_is_not_defined_are_refused(
    loss: Callable[..., PreferenceLoss], label_smoothing: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(pairs(PAIR), beta=0.1, label_smoothing=label_smoothing)


def kto(kl: float = 0.5, **weights: float) -> tuple[list[float], list[float]]:
    """Log ratios 3 and -1, each once desirable and once not, at beta = 0.5."""
    logps = torch.tensor([-9.0, -6.0, -9.0, -6.0], dtype=torch.float64)
    reference = torch.tensor([-12.0, -5.0, -12.0, -5.0], dtype=torch.float64)
    desirable = torch.tensor([True, True, False, False])
    losses, rewards = kto_loss(logps, reference, desirable, torch.tensor(kl).double(), beta=0.5, **weights)
    return losses.tolist(), rewards.tolist()


def test_kto_worked_out_with_a_pocket_calculator() -> None:
    losses, rewards = kto(desirable_weight=1.25, undesirable_weight=0.75)
    # beta (log ratio - kl) = 0.5 * (3 - 0.5) = 1.25, and 0.5 * (-1 - 0.5) = -0.75
    assert losses == pytest.approx(
        [
            1.25 * (1 - sigmoid(1.25)),
            1.25 * (1 - sigmoid(-0.75)),
            0.75 * (1 - sigmoid(-1.25)),
            0.75 * (1 - sigmoid(0.75)),
        ],
        rel=1e-12,
    )
    assert rewards == [1.5, -0.5, 1.5, -0.5]


def test_an_undesirable_completion_has_one_minus_the_loss_of_a_desirable_one() -> None:
    losses, _ = kto()
    assert [losses[0] + losses[2], losses[1] + losses[3]] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_ktos_gradient_agrees_with_finite_differences_and_leaves_the_kl_alone() -> None:
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    logps = torch.tensor([-9.0, -6.0], dtype=torch.float64, requires_grad=True)

    def losses(logps: torch.Tensor) -> torch.Tensor:
        reference = torch.tensor([-12.0, -5.0]).double()
        return kto_loss(logps, reference, torch.tensor([True, False]), kl, beta=0.5, undesirable_weight=2.0)[0]

    assert torch.autograd.gradcheck(losses, [logps])
    losses(logps).sum().backward()
    assert kl.grad is None


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_kto_is_bounded_by_its_weights_however_far_the_policy_went(log_ratio: float) -> None:
    logps = torch.full((2,), log_ratio, requires_grad=True)
    losses, _ = kto_loss(logps, torch.zeros(2), torch.tensor([True, False]), torch.tensor(0.0), beta=1.0)
    losses.sum().backward()
    assert losses.tolist() == ([0.0, 1.0] if log_ratio > 0 else [1.0, 0.0])
    assert logps.grad is not None
    assert logps.grad.tolist() == [0.0, 0.0]


def test_the_kl_estimate_is_the_mean_log_ratio_and_never_below_0() -> None:
    policy = torch.tensor([-5.0, -9.0], requires_grad=True)
    kl = kl_estimate(policy, torch.tensor([-8.0, -8.0]))
    assert (kl.item(), kl.shape, kl.requires_grad) == (1.0, (), False)  # (3 - 1) / 2
    assert kl_estimate(policy, torch.tensor([-8.0, -4.0])).item() == 0.0  # (3 - 5) / 2 = -1


def test_the_nll_term_is_a_mean_over_the_chosen_completions_tokens() -> None:
    assert nll_term(torch.tensor([-8.0, -6.0]), torch.tensor([4, 2])).tolist() == [2.0, 3.0]


def test_wpo_weighs_a_pair_by_the_product_of_its_completions_weights() -> None:
    # Two words, probabilities 3/4 and 1/4: sum_v pi(v)^2 = 10/16. Completions "the likely word" and "the other, twice".
    likely, other = math.log(0.75 / 0.625), 2 * math.log(0.25 / 0.625) / 2
    alignment = torch.tensor([likely, 0.0], dtype=torch.float64, requires_grad=True)
    weights = wpo_weights(alignment, torch.tensor([other, 0.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0.75 / 0.625 * 0.25 / 0.625, 1.0], rel=1e-12)
    assert not weights.requires_grad


def test_a_pairs_kto_loss_is_the_mean_over_the_completions_that_it_has() -> None:
    # PAIR's r are 2 and -0.5; beta * kl = 0.25
    chosen, rejected = 1.25 * (1 - sigmoid(1.75)), 0.75 * (1 - sigmoid(0.75))
    nan = math.nan
    logps = pairs(PAIR, (*PAIR[:1], nan, *PAIR[2:4], 4, 0), (nan, *PAIR[1:4], 0, 2))
    kl = torch.tensor(0.5, dtype=torch.float64)
    out = kto_pair_loss(logps, kl, beta=0.5, desirable_weight=1.25, undesirable_weight=0.75)
    assert out.losses.tolist() == pytest.approx([(chosen + rejected) / 2, chosen, rejected], rel=1e-12)
    assert out.chosen_rewards.tolist()[:2] == [2.0, 2.0]


# Three pairs whose sums over a step cross. log pi: chosen - rejected is 1, -2, 4; log ref: 3, 0, -1.
# Log ratios: chosen 3, -1, 0; rejected 5, 1, -5.
CROSSING = [
    (-9.0, -10.0, -12.0, -15.0, 3, 3),
    (-7.0, -5.0, -6.0, -6.0, 4, 4),
    (-8.0, -12.0, -8.0, -7.0, 5, 5),
]


def test_aot_compares_margins_with_those_of_the_reference_by_rank() -> None:
    # -2, 1, 4 against -1, 0, 3: by pairs 1 - 0, -2 + 1, 4 - 3, each times 0.5
    assert aot_matches(pairs(*CROSSING), paired=True).tolist() == [0.0, -1.0, 3.0]
    losses = loss_of("aot", pairs(*CROSSING)).losses
    assert losses.tolist() == pytest.approx([nll(0.5), nll(-0.5), nll(0.5)], rel=1e-12)
    smoothed = loss_of("aot", pairs(*CROSSING), label_smoothing=0.2).losses
    assert smoothed[0].item() == pytest.approx(0.8 * nll(0.5) + 0.2 * nll(-0.5), rel=1e-12)


def test_unpaired_aot_compares_chosen_with_rejected_rewards_by_rank() -> None:
    # chosen -1, 0, 3 against rejected -5, 1, 5: by pairs 3 - 5, -1 + 5, 0 - 1, each times 0.5
    logps = pairs(*CROSSING)
    assert aot_matches(logps, paired=False).tolist() == [[5.0, 3.0], [-5.0, 0.0], [1.0, -1.0]]
    losses = loss_of("aot_unpaired", logps).losses
    assert losses.tolist() == pytest.approx([nll(-1), nll(2), nll(-0.5)], rel=1e-12)
    chosen, rejected = torch.autograd.grad(losses.sum(), logps[:2])
    # dL/dh = -sigmoid(-h); h of a rejected completion is that of the chosen one with its rank
    assert chosen.tolist() == pytest.approx([-0.5 * sigmoid(1), -0.5 * sigmoid(-2), -0.5 * sigmoid(0.5)], rel=1e-12)
    assert rejected.tolist() == pytest.approx([0.5 * sigmoid(1), 0.5 * sigmoid(0.5), 0.5 * sigmoid(-2)], rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_does_not_depend_on_the_order_of_a_steps_pairs_or_on_how_it_is_cut(name: str) -> None:
    loss: Any = LOSSES[name](type=name)
    matches = aot_matches(pairs(*CROSSING), paired=name == "aot")
    whole = preference_loss(loss, pairs(*CROSSING), beta=0.5, of_step=matches).losses
    parts = [preference_loss(loss, pairs(row), beta=0.5, of_step=matches[i : i + 1]) for i, row in enumerate(CROSSING)]
    torch.testing.assert_close(torch.cat([part.losses for part in parts]), whole, rtol=0, atol=1e-15)
    torch.testing.assert_close(loss_of(name, pairs(*CROSSING[::-1])).losses, whole.flip(0), rtol=0, atol=1e-15)


def test_aot_on_a_single_pair_is_dpo() -> None:
    for row in VARIED:
        expected = dpo_loss(*pairs(row)[:4], beta=0.5).losses
        torch.testing.assert_close(loss_of("aot", pairs(row)).losses, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(loss_of("aot_unpaired", pairs(row)).losses, expected, rtol=0, atol=1e-12)


def test_discopop_is_flat_between_its_logistic_and_its_exponential_side() -> None:
    # At h = 0 both have weight 1/2. With t = 1 / tau: L' = t / 4 (1 - log 2) - 3/4
    margin = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1)
    losses = loss_of("discopop", PairLogps(margin, zero, zero, zero, one, one), beta=1.0, tau=0.05).losses
    assert losses.item() == pytest.approx((math.log(2) + 1) / 2, rel=1e-12)
    slope = torch.autograd.grad(losses, margin)[0].item()
    assert slope == pytest.approx(5 * (1 - math.log(2)) - 0.75, rel=1e-12)


def test_bco_without_a_shift_is_bco_on_pairs_and_each_completion_has_its_own_term() -> None:
    nan = math.nan
    logps = pairs(PAIR, (*PAIR[:1], nan, *PAIR[2:4], 4, 0), (nan, *PAIR[1:4], 0, 2))
    out = bco_loss(logps, torch.tensor(0.0), beta=0.5)
    assert out.losses.tolist() == pytest.approx([nll(2) + nll(0.5), nll(2), nll(0.5)], rel=1e-12)
    chosen, rejected = torch.autograd.grad(out.losses.sum(), logps[:2])
    assert chosen.tolist()[:2] == pytest.approx([-0.5 * sigmoid(-2)] * 2, rel=1e-12)
    assert rejected.tolist()[::2] == pytest.approx([0.5 * sigmoid(-0.5)] * 2, rel=1e-12)


def test_the_reward_shift_is_the_middle_of_the_running_means_of_both_kinds() -> None:
    nan, shift = math.nan, RewardShift()
    assert shift.value.item() == 0.0
    shift.update(torch.tensor([[1.0, nan], [3.0, nan], [math.inf, -math.inf]]))
    assert shift.value.item() == 2.0  # of one kind only: its mean
    shift.update(torch.tensor([[nan, -2.0]], requires_grad=True))
    assert (shift.value.item(), shift.value.requires_grad) == (0.0, False)  # (2 - 2) / 2
    shift.update(torch.tensor([[5.0, 4.0]]))
    assert shift.value.item() == 2.0  # (9 / 3 + 2 / 2) / 2
    again = RewardShift()
    again.load_state_dict(shift.state_dict())
    assert again.value.item() == 2.0


def test_the_losses_with_label_smoothing_are_these_six() -> None:
    assert {name for name, keys in LOSSES.items() if "label_smoothing" in keys.model_fields} == {
        "sigmoid",
        "sigmoid_norm",
        "robust",
        "exo_pair",
        "aot",
        "aot_unpaired",
    }


def test_the_losses_without_a_reference_are_these_three() -> None:
    assert {name for name, keys in LOSSES.items() if not keys.uses_reference} == WITHOUT_REFERENCE

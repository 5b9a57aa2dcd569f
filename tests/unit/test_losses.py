"""Eq. 7 of arXiv:2305.18290 against plain Python in float64: values, rewards and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from iterdpo.losses import dpo_loss

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

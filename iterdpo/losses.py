"""Preference losses. Tensors in, per-example tensors out; the training loop owns the reduction."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    losses: Tensor  # [B], the caller reduces
    chosen_rewards: Tensor  # [B], detached
    rejected_rewards: Tensor  # [B], detached


def dpo_loss(
    policy_chosen_logps: Tensor,  # [B]
    policy_rejected_logps: Tensor,  # [B]
    reference_chosen_logps: Tensor,  # [B]
    reference_rejected_logps: Tensor,  # [B]
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Sigmoid DPO, Eq. 7 of arXiv:2305.18290, on log-probabilities summed over a completion's tokens.

        h = beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))]
        L = -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)

    `label_smoothing` is eps: with eps > 0 this is conservative DPO (Mitchell, 2023), for labels of which a share eps
    is flipped. The rewards are the implicit ones, beta * (log pi - log ref): 0 where the policy is the reference.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    h = chosen_rewards - rejected_rewards
    losses = -F.logsigmoid(h) * (1 - label_smoothing) - F.logsigmoid(-h) * label_smoothing
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())

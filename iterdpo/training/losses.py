"""Preference losses. Tensors in, per-example tensors out; the training loop owns the reduction.

By hand because TRL's are methods of its trainers, bound to their batches; each is held against TRL's by a test.

    preference_loss(loss, logps, beta=...)    any loss of `iterdpo.config.Loss` on pairs; each has its function below
    kto_loss(...), bco_loss(...)              single completions, each desirable or undesirable
    kl_estimate, RewardShift, aot_matches     what a loss needs of all pairs of a step; the loop computes it first
    nll_term(...)                             added to any loss with a coefficient: iterative RPO
    wpo_weights(...)                          multiplied with any loss of pairs: WPO

In the equations w is the chosen completion, l the rejected one, |y| a completion's tokens, and

    log pi(y|x) = sum_t log pi(y_t | x, y_<t)                 summed, never averaged, unless divided by |y|
    r(y) = beta * (log pi(y|x) - log ref(y|x))                the implicit reward: 0 if the policy is the reference

`chosen_rewards` and `rejected_rewards` are the numbers that a loss compares: r(y), unless its docstring says otherwise.
TRL is version 1.16 throughout, and its `DPOTrainer` unless another trainer is named. Unless a docstring says otherwise,
the losses are equal to TRL's; `tests/unit/training/test_losses_trl.py` holds that, and each difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iterdpo.config import Loss


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs, in nats, summed over each completion's tokens.

    A pair of 21 and 17 tokens: chosen -30.2, rejected -28.9, under the reference -31.0 and -27.5.
    """

    chosen: Tensor  # [B], with gradient
    rejected: Tensor  # [B], with gradient
    reference_chosen: Tensor  # [B]; zeros if the loss has no reference
    reference_rejected: Tensor  # [B]
    chosen_tokens: Tensor  # [B], int64, tokens in the chosen completion
    rejected_tokens: Tensor  # [B]


class PreferenceLoss(NamedTuple):
    losses: Tensor  # [B], the caller reduces
    chosen_rewards: Tensor  # [B], detached
    rejected_rewards: Tensor  # [B], detached


def preference_loss(loss: Loss, logps: PairLogps, *, beta: float, of_step: Tensor | None = None) -> PreferenceLoss:
    """`dpo.loss` on B pairs, which may be some of a step's.

    `of_step` is what a loss needs of the whole step: KTO's `kl_estimate` [], BCO's `RewardShift.value` [], AOT's
    `aot_matches` [B, 2]. The other losses do not use it.
    """
    keys = loss.model_dump(exclude={"type"})
    match loss.type:
        case "sigmoid":
            return dpo_loss(*logps[:4], beta=beta, **keys)
        case "sft":
            return sft_loss(logps)
        case "kto" | "bco" | "aot" | "aot_unpaired":
            assert of_step is not None
            return WITH_THE_STEP[loss.type](logps, of_step, beta=beta, **keys)
        case _:
            return OTHERS[loss.type](logps, beta=beta, **keys)


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

        h = r(y_w) - r(y_l)
        L = -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)

    `label_smoothing` is eps: with eps > 0 this is conservative DPO (Mitchell, 2023), for labels of which a share eps
    is flipped. TRL's "sigmoid" ignores its label_smoothing.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = _smoothed(chosen_rewards - rejected_rewards, label_smoothing)
    return _detached(losses, chosen_rewards, rejected_rewards)


def sigmoid_norm_loss(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """Length-normalised DPO, of Tülu 3 (arXiv:2411.15124): `dpo_loss` with r(y) / |y| in place of r(y).

    A mean over tokens is small, so beta is large: 5 in the paper. The rewards are the normalised ones; TRL logs the
    summed ones, and ignores its label_smoothing.
    """
    return dpo_loss(*_per_token(logps)[:4], beta=beta, label_smoothing=label_smoothing)


def robust_loss(logps: PairLogps, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """Robust DPO, of arXiv:2403.00409: an unbiased estimate of DPO's loss from labels of which a share eps is flipped.

        L = [-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)] / (1 - 2 eps),    h = r(y_w) - r(y_l), summed

    It has no lower bound: it falls as h grows, below 0 and on.

    Raises:
        ValueError: eps = label_smoothing is not in [0, 0.5): at 0.5 the labels say nothing.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust needs a label_smoothing of at least 0 and below 0.5, the share of flipped labels: "
            f"{label_smoothing} is not; 0.1 is usual"
        )
    chosen, rejected = _rewards(logps, beta)
    h = chosen - rejected
    flipped = label_smoothing * F.logsigmoid(-h)
    losses = (flipped - (1 - label_smoothing) * F.logsigmoid(h)) / (1 - 2 * label_smoothing)
    return _detached(losses, chosen, rejected)


def ipo_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """IPO, Eq. 17 of arXiv:2310.12036, with log ratios averaged over a completion's tokens. beta is the paper's tau.

        L = (h - 1 / (2 beta))^2,    h = (r(y_w) / |y_w| - r(y_l) / |y_l|) / beta

    The paper's equation has the sums. We take the means, as TRL does and as its source says the authors ran it: the
    target 1 / (2 beta) is then the same for every length, in nats a token. The rewards are the averaged ones,
    r(y) / |y|; TRL logs the summed ones.
    """
    chosen, rejected = _rewards(_per_token(logps), beta)
    losses = ((chosen - rejected) / beta - 1 / (2 * beta)) ** 2
    return _detached(losses, chosen, rejected)


def hinge_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """SLiC's hinge (arXiv:2305.10425) on the implicit reward, as in RSO (arXiv:2309.06657), whose gamma is beta.

    L = max(0, 1 - (r(y_w) - r(y_l))), summed
    """
    chosen, rejected = _rewards(logps, beta)
    return _detached(F.relu(1 - (chosen - rejected)), chosen, rejected)


def dpop_loss(logps: PairLogps, *, beta: float, penalty_weight: float = 50.0) -> PreferenceLoss:
    """DPO-positive, Eq. 3 of arXiv:2402.13228: DPO that does not let the chosen completion lose probability.

        L = -log sigmoid(r(y_w) - r(y_l) - lambda * max(0, -r(y_w))), summed

    lambda stands within beta, as in the paper, which has lambda = 50 and beta = 0.3. TRL has no such loss.
    """
    chosen, rejected = _rewards(logps, beta)
    penalty = penalty_weight * F.relu(-chosen)
    return _detached(-F.logsigmoid(chosen - rejected - penalty), chosen, rejected)


def exo_pair_loss(logps: PairLogps, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """EXO on pairs, Eq. 16 of arXiv:2402.00856: the reverse KL from the policy's preference to the smoothed label.

        L = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps),    q = sigmoid(r(y_w) - r(y_l)), summed

    beta is the paper's beta_pi, and eps = label_smoothing; it recommends 1e-3.

    Raises:
        ValueError: eps is not in (0, 0.5): at 0 the divergence is infinite.
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(
            f"exo_pair needs a label_smoothing above 0 and below 0.5: {label_smoothing} is not; its paper recommends "
            "0.001"
        )
    chosen, rejected = _rewards(logps, beta)
    h = chosen - rejected
    agree = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-label_smoothing))
    disagree = torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))
    return _detached(agree + disagree, chosen, rejected)


def nca_pair_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """NCA on pairs, of arXiv:2402.05369: raises the chosen completion's reward itself; DPO raises the margin.

    L = -log sigmoid(r(y_w)) - 1/2 log sigmoid(-r(y_w)) - 1/2 log sigmoid(-r(y_l)), summed
    """
    chosen, rejected = _rewards(logps, beta)
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return _detached(losses, chosen, rejected)


def bco_pair_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """BCO (arXiv:2404.04656) without its reward shift: a binary classifier, whose logit is the reward.

        L = -log sigmoid(r(y_w)) - log sigmoid(-r(y_l)), summed

    It is an upper bound of DPO's loss. `bco_loss` has the shift.
    """
    chosen, rejected = _rewards(logps, beta)
    return _detached(-F.logsigmoid(chosen) - F.logsigmoid(-rejected), chosen, rejected)


def discopop_loss(logps: PairLogps, *, beta: float, tau: float = 0.05) -> PreferenceLoss:
    """DiscoPOP, Eq. 5 of arXiv:2406.08414: the log-ratio modulated loss, which a language model proposed.

        L = -(1 - m) log sigmoid(h) + m exp(-h),    m = sigmoid(h / tau),    h = r(y_w) - r(y_l), summed

    The logistic loss if the pair is in the wrong order, an exponential one if not; the paper has tau = 0.05. It is not
    convex: with that tau it has a maximum above h = 0, where training begins, and falls to both sides.
    """
    chosen, rejected = _rewards(logps, beta)
    h = chosen - rejected
    logistic = torch.sigmoid(-h / tau) * -F.logsigmoid(h)
    exponential = torch.exp(F.logsigmoid(h / tau) - h)  # in one exponent: exp(-h) alone overflows for h = -100
    return _detached(logistic + exponential, chosen, rejected)


def aot_loss(
    logps: PairLogps,
    matches: Tensor,  # [B], of `aot_matches`
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT on pairs, of arXiv:2406.05882: the policy's margins as a distribution are to be above the reference's.

        L = -(1 - eps) log sigmoid(h) - eps log sigmoid(-h),    h = beta * (u_(k) - v_(k)), summed
        u = log pi(y_w|x) - log pi(y_l|x),    v = log ref(y_w|x) - log ref(y_l|x)

    u_(k) is the k-th smallest u of a step, and v_(k) the k-th smallest v. A pair's loss is that of its own u; the v
    is mostly another pair's, `matches`. A step of one pair is `dpo_loss`. The logistic loss is one of the paper's
    choices. TRL sorts within a micro-batch of one process; here a step is sorted, however it is cut.
    """
    chosen, rejected = _rewards(logps, beta)
    h = beta * (logps.chosen - logps.rejected - matches)
    return _detached(_smoothed(h, label_smoothing), chosen, rejected)


def aot_unpaired_loss(
    logps: PairLogps,
    matches: Tensor,  # [B, 2], of `aot_matches`
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT on chosen and rejected completions as two sets, of arXiv:2406.05882; otherwise as `aot_loss`.

        L = -(1 - eps) log sigmoid(h) - eps log sigmoid(-h),    h = r_w(k) - r_l(k), summed

    r_w(k) is the k-th smallest r(y_w) of a step, and r_l(k) the k-th smallest r(y_l). A pair's loss is that of its own
    y_w. Its y_l is in the loss of another pair, whose gradient for y_l is added here, to a term that is 0.
    """
    chosen, rejected = _rewards(logps, beta)
    own = _smoothed(chosen - beta * matches[:, 0], label_smoothing)
    others = _smoothed(beta * matches[:, 1] - rejected, label_smoothing)
    return _detached(own + (others - others.detach()), chosen, rejected)


def aot_matches(logps: PairLogps, *, paired: bool) -> Tensor:
    """What AOT compares each of a step's B pairs with, detached, in nats.

    Paired, [B]: the v with the rank of the pair's u (see `aot_loss`). Unpaired, [B, 2]: of the log ratios
    log pi(y|x) - log ref(y|x), the rejected one with the rank of the pair's chosen one, and the other way round.
    """
    if paired:
        return _ranked_like(logps.chosen - logps.rejected, logps.reference_chosen - logps.reference_rejected).detach()
    chosen, rejected = logps.chosen - logps.reference_chosen, logps.rejected - logps.reference_rejected
    return torch.stack((_ranked_like(chosen, rejected), _ranked_like(rejected, chosen)), dim=1).detach()


def _ranked_like(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [B], the one of `others` [B] with the same rank."""
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]


def apo_zero_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """APO-zero, Eq. 7 of arXiv:2408.06266: chosen up, rejected down; for completions better than the policy's own.

        L = sigmoid(-r(y_w)) + sigmoid(r(y_l)), summed

    The paper's loss plus 1, as in TRL, so that 0 is its lower bound.
    """
    chosen, rejected = _rewards(logps, beta)
    return _detached(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


def apo_down_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """APO-down, Eq. 8 of arXiv:2408.06266: both down, rejected further; for completions worse than the policy's own.

        L = sigmoid(r(y_w)) + sigmoid(-(r(y_w) - r(y_l))), summed

    The paper's loss plus 1, as in TRL, so that 0 is its lower bound.
    """
    chosen, rejected = _rewards(logps, beta)
    return _detached(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), chosen, rejected)


def sppo_hard_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """SPPO, Eq. 4.7 of arXiv:2405.00675, with win probability 1 for the chosen completion and 0 for the rejected one.

        L = ((r(y_w) - 1/2) / beta)^2 + ((r(y_l) + 1/2) / beta)^2, summed

    beta is 1 / eta; the paper has eta = 1000 and estimates the probabilities with a model of preferences.
    """
    chosen, rejected = _rewards(logps, beta)
    return _detached(((chosen - 0.5) / beta) ** 2 + ((rejected + 0.5) / beta) ** 2, chosen, rejected)


def orpo_loss(logps: PairLogps, *, beta: float) -> PreferenceLoss:
    """ORPO, Eqs. 3 to 7 of arXiv:2403.07691, without a reference. beta is the paper's lambda; 0.1 is usual.

        L = -p_w - beta * log sigmoid(log odds(p_w) - log odds(p_l))
        p = log pi(y|x) / |y|,    log odds(p) = p - log(1 - e^p)

    Everything is a mean over tokens. The rewards are beta * p. TRL's `ORPOTrainer` has the same odds, and takes the
    first term over the prompt's tokens too, as one mean over the batch.
    """
    mean = _per_token(logps)
    odds_ratio = _log_odds(mean.chosen) - _log_odds(mean.rejected)
    return _detached(-mean.chosen - beta * F.logsigmoid(odds_ratio), beta * mean.chosen, beta * mean.rejected)


def simpo_loss(logps: PairLogps, *, beta: float, gamma: float = 0.5) -> PreferenceLoss:
    """SimPO, Eq. 6 of arXiv:2405.14734, without a reference, on log-probabilities averaged over a completion's tokens.

        L = -log sigmoid(beta * log pi(y_w|x) / |y_w| - beta * log pi(y_l|x) / |y_l| - gamma)

    gamma is the paper's target reward margin, not the ratio gamma / beta. A mean over tokens is small, so beta is
    large: the authors use 2 to 10, and for gamma a tenth to eight tenths of it. The rewards are
    beta * log pi(y|x) / |y|. TRL's `CPOTrainer` has the same loss, and adds the NLL of the chosen completion unless
    its cpo_alpha is 0.
    """
    mean = _per_token(logps)
    chosen, rejected = beta * mean.chosen, beta * mean.rejected
    return _detached(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected)


def sft_loss(logps: PairLogps) -> PreferenceLoss:
    """The chosen completion's NLL, a mean over its tokens: preferred and rejection-sampling fine-tuning.

    Uses neither beta nor the rejected completion, and has no rewards: they are 0. Each pair counts the same; TRL's
    "sft" is one mean over all tokens of a batch, so long completions count for more.
    """
    rewards = torch.zeros_like(logps.chosen)
    return _detached(nll_term(logps.chosen, logps.chosen_tokens), rewards, rewards)


def kto_loss(
    logps: Tensor,  # [B]
    reference_logps: Tensor,  # [B]
    desirable: Tensor,  # [B], bool
    kl: Tensor,  # [], at least 0
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """KTO, Eq. 8 of arXiv:2402.01306, on B single completions; a pair is a desirable and an undesirable one.

        L = lambda_D * (1 - sigmoid(r(y) - beta * kl))    if desirable
        L = lambda_U * (1 - sigmoid(beta * kl - r(y)))    if not

    `kl` is the paper's z_0, the same for all of a batch, and gets no gradient; see `kl_estimate`. The paper keeps
    lambda_D * n_D / (lambda_U * n_U), n the numbers of completions, between 1 and 1.5.

    Returns:
        losses [B], and rewards r(y) [B], detached. Both in nats, summed over a completion's tokens.
    """
    rewards = beta * (logps - reference_logps)
    surplus = rewards - beta * kl.detach()
    gained, avoided = desirable_weight * torch.sigmoid(-surplus), undesirable_weight * torch.sigmoid(surplus)
    return torch.where(desirable, gained, avoided), rewards.detach()


def kto_pair_loss(logps: PairLogps, kl: Tensor, *, beta: float, **weights: float) -> PreferenceLoss:
    """`kto_loss` of pairs, `weights` too: each completion is an example, a pair's loss the mean over those it has."""
    desirable = torch.ones_like(logps.chosen, dtype=torch.bool)
    chosen, chosen_rewards = kto_loss(logps.chosen, logps.reference_chosen, desirable, kl, beta=beta, **weights)
    rejected, rejected_rewards = kto_loss(
        logps.rejected, logps.reference_rejected, ~desirable, kl, beta=beta, **weights
    )
    losses, present = _of_both(chosen, rejected, logps)
    return PreferenceLoss(losses / present, chosen_rewards, rejected_rewards)


def bco_loss(logps: PairLogps, shift: Tensor, *, beta: float) -> PreferenceLoss:
    """BCO (arXiv:2404.04656) on pairs or single completions: a binary classifier, whose logit is the shifted reward.

        L = -log sigmoid(r(y_w) - delta) - log sigmoid(-(r(y_l) - delta)), summed

    The loss of a single completion is the term that it has. `shift` is delta [], see `RewardShift`; at delta = 0 this is
    `bco_pair_loss`. The density ratio that the paper weights undesirable completions by is left out. TRL 1.16 has the
    loss without the shift only.
    """
    chosen, rejected = _rewards(logps, beta)
    losses, _ = _of_both(-F.logsigmoid(chosen - shift), -F.logsigmoid(shift - rejected), logps)
    return _detached(losses, chosen, rejected)


class RewardShift:
    """BCO's delta (arXiv:2404.04656): half the sum of the mean rewards of chosen and of rejected completions.

        delta = (E r(y_w) + E r(y_l)) / 2

    The means run over all steps of the round up to the present one, each completion as it was rewarded in its step. They
    are in the checkpoints of a round. If a round has completions of one kind only, delta is that kind's mean.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.counts = torch.zeros(2, dtype=torch.float64)

    def update(self, rewards: Tensor) -> None:
        """Add a step's rewards [n, 2], chosen and rejected; those that are not finite are left out."""
        rewards = rewards.detach().double().cpu()
        finite = rewards.isfinite()
        self.sums += rewards.where(finite, 0.0).sum(dim=0)
        self.counts += finite.sum(dim=0)

    @property
    def value(self) -> Tensor:
        """Delta, []; 0 before the first step."""
        seen = self.counts > 0
        return (self.sums[seen] / self.counts[seen]).mean() if seen.any() else self.sums.sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums, self.counts = state["sums"].double(), state["counts"].double()


def kl_estimate(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """KTO's z_0 (arXiv:2402.01306): max(0, mean of log pi(y'|x) - log ref(y'|x)), [] from [B], detached.

    y' is a completion of another prompt in the batch. Log ratios are summed over tokens. If processes share a
    batch, pass the log-probabilities of all of them: the mean comes before the clamp, as in TRL's `KTOTrainer`.
    """
    return (policy_logps - reference_logps).mean().clamp(min=0).detach()


def exploration_term(logps: Tensor, others: Tensor) -> Tensor:
    """XPO's term of each pair, [B]: log pi(y~|x) of the completion y~ that is another source's, 0 without one.

    Algorithm 1 of arXiv:2405.21046 minimizes alpha times it, with y~ of the initial policy, beside DPO: the policy moves
    away from what it would say anyway. `logps` [B, 2] of chosen and rejected in nats, `others` [B, 2] which are y~.
    """
    return torch.where(others, logps, torch.zeros_like(logps)).sum(dim=1)


def nll_term(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Iterative RPO's second term (arXiv:2404.19733): -log pi(y_w|x) / |y_w|, [B], a mean over tokens.

    Added to a loss with a coefficient, alpha; 1 in the paper.
    """
    return -chosen_logps / chosen_tokens


def wpo_weights(chosen_alignment: Tensor, rejected_alignment: Tensor) -> Tensor:
    """WPO's weight of a pair, Eq. 2 of arXiv:2406.11827: w(y_w) w(y_l), [B], detached.

        w(y) = exp(a(y)),    a(y) = 1/|y| sum_t [log pi(y_t) - log sum_v pi(v)^2]

    The arguments are a(y_w) and a(y_l), [B]. E_{v ~ pi} pi(v) = sum_v pi(v)^2: a completion as likely as the policy's
    own has about weight 1, a greedy one more. The weight is not capped, as in TRL; earlier versions of TRL
    cap it at 1.
    """
    return torch.exp(chosen_alignment + rejected_alignment).detach()


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    """The logistic loss of margins, of which a share is assumed to be the wrong way round."""
    return -F.logsigmoid(h) * (1 - label_smoothing) - F.logsigmoid(-h) * label_smoothing


def _of_both(chosen: Tensor, rejected: Tensor, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Sums [B] of the losses of chosen and rejected, over those that a pair has, and their numbers [B]."""
    both = torch.stack((chosen, rejected))  # [2, B]
    present = torch.stack((logps.chosen_tokens > 0, logps.rejected_tokens > 0))
    return torch.where(present, both, torch.zeros_like(both)).sum(dim=0), present.sum(dim=0)


def _rewards(logps: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Chosen and rejected r(y), [B] each, with gradient."""
    return beta * (logps.chosen - logps.reference_chosen), beta * (logps.rejected - logps.reference_rejected)


def _per_token(logps: PairLogps) -> PairLogps:
    chosen, rejected = logps.chosen_tokens, logps.rejected_tokens
    return logps._replace(
        chosen=logps.chosen / chosen,
        rejected=logps.rejected / rejected,
        reference_chosen=logps.reference_chosen / chosen,
        reference_rejected=logps.reference_rejected / rejected,
    )


def _log_odds(p: Tensor) -> Tensor:
    """Log e^p / (1 - e^p), [B]. A completion that is certain, p = 0, has the odds of the next number below it."""
    p = p.clamp(max=-torch.finfo(p.dtype).eps)  # at 0 the odds are infinite, and two of them differ by NaN
    return p - torch.log(-torch.expm1(p))  # expm1: 1 - e^p keeps its digits for p near 0


def _detached(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PreferenceLoss:
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


OTHERS: dict[str, Callable[..., PreferenceLoss]] = {
    "sigmoid_norm": sigmoid_norm_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "dpop": dpop_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sppo_hard": sppo_hard_loss,
    "bco_pair": bco_pair_loss,
    "discopop": discopop_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
}
"""The losses that take `PairLogps` and beta, with what the configuration has for them."""

WITH_THE_STEP: dict[str, Callable[..., PreferenceLoss]] = {
    "kto": kto_pair_loss,
    "bco": bco_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
}
"""The losses that also take what `preference_loss` calls `of_step`."""

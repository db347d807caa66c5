"""The losses and rewards of the paper as pure functions of tensors.

Nothing here knows a model, a tokenizer or a config: the methods (`gdso.py`, `risd.py`, …) bring tensors and add the
results up. Everything is computed in the dtype of its input, which the methods make float32.

Shape suffixes: p same-prompt pairs, j the two sides of a pair, g sampled outputs of a side (a group), k score bins,
n sequences, t tokens.

A sample whose trace never reached a score is failed: it has no distribution. `valid_pjg` is False there and the sample
adds nothing to a direct loss, is nobody's partner in a pairwise term, and gets the lowest reward (`rewards`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bin_targets(scores: Tensor, bins_k: Tensor) -> Tensor:
    """Distributions over the bins whose expectation is the score.

    A score on a bin is all on it, which makes −Σ t·log q the −log q(ŝ) of equation (8). A score between two bins is
    shared between them.

    Args:
        scores: [...], from the first bin to the last.
        bins_k: [K], strictly increasing.

    Returns:
        [..., K].

    Raises:
        ValueError: a score is off the scale or not finite.
    """
    if not bool(((scores >= bins_k[0]) & (scores <= bins_k[-1])).all()):
        raise ValueError(f"scores must lie from {bins_k[0]:g} to {bins_k[-1]:g}")
    upper = torch.searchsorted(bins_k, scores.contiguous()).clamp(1, len(bins_k) - 1)
    low, high = bins_k[upper - 1], bins_k[upper]
    share = (scores - low) / (high - low)
    one_hot = [F.one_hot(index, len(bins_k)).to(scores.dtype) for index in (upper - 1, upper)]
    return one_hot[0] * (1 - share)[..., None] + one_hot[1] * share[..., None]


def expectation(log_probs_k: Tensor, bins_k: Tensor) -> Tensor:
    """μ = Σ s·q(s), equations (2) and (16): [..., K] to [...]."""
    return log_probs_k.exp() @ bins_k


def score_cross_entropy(log_probs_k: Tensor, targets_k: Tensor) -> Tensor:
    """Mean over everything but the bins of −Σ t·log q: SFT on annotated scores, targets as in `bin_targets`."""
    return -(targets_k * log_probs_k).sum(-1).mean()


def pointwise_reward(means_pjg: Tensor, scores_pj: Tensor, span: float) -> Tensor:
    """Equation (7): 1 − |μ − ŝ| / R, at most 1 and at least 0.

    Args:
        means_pjg: expectations of the sampled outputs.
        scores_pj: labels ŝ.
        span: R, the last bin minus the first.
    """
    return 1 - (means_pjg - scores_pj[..., None]).abs() / span


def pairwise_reward(
    means_pjg: Tensor, scores_pj: Tensor, span: float, valid_pjg: Tensor | None = None
) -> Tensor:
    """Equation (10): one minus the mean error of the sample's difference to each sample of the other side, over R.

    Without a valid sample on the other side there is no difference to judge, and the reward is 0, the
    value of an error of R.

    Returns:
        [P, J, G], at most 1 and at least −1.
    """
    errors_pjgg, weights_pjgg = _cross_errors(means_pjg, scores_pj, valid_pjg)
    partners = weights_pjgg.sum(-1)
    return 1 - torch.where(
        partners > 0, (errors_pjgg * weights_pjgg).sum(-1) / (partners.clamp(min=1) * span), 1.0
    )


def pointwise_loss(log_probs_pjgk: Tensor, targets_pjk: Tensor, valid_pjg: Tensor | None = None) -> Tensor:
    """Equation (8): −log q(ŝ), averaged over the samples of both sides, then over the pairs.

    Failed samples add nothing, and the divisor stays 2G, so that a pair with few valid samples weighs less.

    Args:
        log_probs_pjgk: of the bins; values at failed samples are ignored, NaN included.
        targets_pjk: from `bin_targets`, or any distribution over the bins.
    """
    valid = _all_valid(log_probs_pjgk[..., 0], valid_pjg)
    log_probs = torch.where(valid[..., None], log_probs_pjgk, 0.0)
    return -(targets_pjk[:, :, None] * log_probs).sum(-1).mean()


def pairwise_loss(
    means_pjg: Tensor, scores_pj: Tensor, span: float, valid_pjg: Tensor | None = None
) -> Tensor:
    """Equation (11): the mean error of all G × G differences across the sides, over R.

    The paper sums both sides and divides by 2; each side's sum is the other's.
    """
    errors_pjgg, weights_pjgg = _cross_errors(means_pjg, scores_pj, valid_pjg)
    return (errors_pjgg * weights_pjgg).mean() / span


def rewards(
    means_pjg: Tensor,
    scores_pj: Tensor,
    span: float,
    *,
    pointwise: float,
    pairwise: float,
    valid_pjg: Tensor | None = None,
) -> Tensor:
    """Equation (13): λ_pt·r_pt + λ_pw·r_pw; a failed sample gets the least that the sum can be, −λ_pw.

    Args:
        pointwise, pairwise: λ_pt and λ_pw, not negative.

    Returns:
        [P, J, G], without gradient.
    """
    means_pjg = means_pjg.detach()
    valid = _all_valid(means_pjg, valid_pjg)
    means = torch.where(valid, means_pjg, 0.0)
    total = pointwise * pointwise_reward(means, scores_pj, span)
    total = total + pairwise * pairwise_reward(means, scores_pj, span, valid)
    return torch.where(valid, total, -pairwise)


def group_advantages(rewards_pjg: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Equation (3): (r − mean) / (std + ε) inside each group of G.

    The deviation is the population's, so that G = 1 and a group of equal rewards both give 0. The paper names no ε;
    1e-4 is the usual one.
    """
    centered = rewards_pjg - rewards_pjg.mean(-1, keepdim=True)
    deviation = centered.square().mean(-1, keepdim=True).sqrt()
    return centered / (deviation + epsilon)


def policy_loss(
    log_probs_nt: Tensor,
    sampled_log_probs_nt: Tensor,
    advantages_n: Tensor,
    mask_nt: Tensor,
    *,
    reference_log_probs_nt: Tensor | None = None,
    beta: float = 0.0,
    clip: float | None = 0.2,
) -> Tensor:
    """Equation (4) as a loss: −A times the likelihood ratio, summed over an output's tokens, averaged over outputs.

    At the first of the K_gdso updates the ratio is 1 and its gradient that of log π. Later ones clip it, as PPO does.

    Args:
        log_probs_nt: log π_θ of the sampled tokens.
        sampled_log_probs_nt: log π_old of the same tokens, as they were sampled.
        advantages_n: one for each output.
        mask_nt: 1 where the output has a token.
        reference_log_probs_nt: log π_ref; needed where `beta` is not 0.
        beta: weight of KL(π_θ ‖ π_ref), by the estimator e^d − d − 1 with d = log π_ref − log π_θ, which is never
            negative and has no bias.
        clip: the ratio counts between 1 − clip and 1 + clip; None leaves it.
    """
    mask = mask_nt.bool()
    change = torch.where(mask, log_probs_nt - sampled_log_probs_nt.detach(), 0.0)
    ratio = change.exp()
    gain = ratio * advantages_n[:, None]
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantages_n[:, None])
    if beta:
        if reference_log_probs_nt is None:
            raise ValueError("a KL term needs the log-probabilities of the reference policy")
        gain = gain - beta * _kl_estimate(log_probs_nt, reference_log_probs_nt, mask)
    return -torch.where(mask, gain, 0.0).sum(-1).mean()


def distillation_loss(teacher_log_probs_nk: Tensor, student_log_probs_nk: Tensor) -> Tensor:
    """Equation (15), RISD: KL(q_T ‖ q_φ) over the bins, averaged over the items.

    A bin to which the teacher gives no mass (log-probability −inf) adds nothing.
    """
    teacher = teacher_log_probs_nk.detach()
    probs = teacher.exp()
    gap = torch.where(probs > 0, teacher - student_log_probs_nk, 0.0)
    return (probs * gap).sum(-1).mean()


def on_policy_distillation_loss(
    log_probs_nt: Tensor, sampled_log_probs_nt: Tensor, teacher_log_probs_nt: Tensor, mask_nt: Tensor
) -> Tensor:
    """OPD: −(1/T) Σ_t A_t·log π_φ(y_t) with A_t = log π_T(y_t) − log π_old(y_t), averaged over outputs.

    Args:
        log_probs_nt: of the student, for the tokens that it sampled itself.
        sampled_log_probs_nt: log π_old, of the student when it sampled them.
        teacher_log_probs_nt: of the teacher for the same tokens.
        mask_nt: 1 where the output has a token.
    """
    mask = mask_nt.bool()
    advantages = (teacher_log_probs_nt - sampled_log_probs_nt).detach()
    gain = torch.where(mask, advantages * log_probs_nt, 0.0).sum(-1)
    return -(gain / mask.sum(-1).clamp(min=1)).mean()


def sequence_cross_entropy(log_probs_nt: Tensor, mask_nt: Tensor) -> Tensor:
    """Mean −log π over all tokens under the mask: SFT on written text, as RewardDance's chains are."""
    mask = mask_nt.bool()
    return -torch.where(mask, log_probs_nt, 0.0).sum() / mask.sum().clamp(min=1)


def preference_loss(yes_no_logits_n2: Tensor, preferred_n: Tensor) -> Tensor:
    """RewardDance's own form: cross-entropy of P("yes") for "the first image is the better one".

    Args:
        yes_no_logits_n2: logits of the two answers, "yes" first.
        preferred_n: 1 where the first image is better, 0 where the second is.
    """
    return F.binary_cross_entropy_with_logits(
        yes_no_logits_n2[:, 0] - yes_no_logits_n2[:, 1], preferred_n.to(yes_no_logits_n2.dtype)
    )


def _all_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool) if valid is None else valid.bool()


def _cross_errors(means_pjg: Tensor, scores_pj: Tensor, valid_pjg: Tensor | None) -> tuple[Tensor, Tensor]:
    """|(μ_{j,i} − μ_{j̄,k}) − Δŝ| as [P, J, G, G], and 1 where both samples have a distribution."""
    valid = _all_valid(means_pjg, valid_pjg)
    means = torch.where(valid, means_pjg, 0.0)
    differences = means[..., :, None] - means.flip(1)[..., None, :]
    labelled = scores_pj - scores_pj.flip(1)
    both = valid[..., :, None] & valid.flip(1)[..., None, :]
    return (differences - labelled[..., None, None]).abs(), both.to(means_pjg.dtype)


def _kl_estimate(log_probs_nt: Tensor, reference_nt: Tensor, mask_nt: Tensor) -> Tensor:
    """e^d − d − 1 at every token, 0 outside of the mask."""
    gap = torch.where(mask_nt, reference_nt.detach() - log_probs_nt, 0.0)
    return gap.exp() - gap - 1

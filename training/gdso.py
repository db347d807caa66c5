"""GDSO, the paper's teacher: GRPO's policy gradient and direct losses on the score distributions of the samples.

Algorithm 1: for each batch of same-prompt pairs, sample G outputs a side, read their score distributions, and descend
equation (14), L_GRPO + α_pt·L_pt + α_pw·L_pw. The policy gradient chooses traces that lead to better scores; the direct
losses make the score that follows a trace better, through the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zreward.errors import UsageError
from zreward.progress import Progress
from zreward.training import losses
from zreward.training.config import TrainConfig
from zreward.training.passes import RowOutputs
from zreward.training.policy import (
    PolicyOptions,
    Reference,
    Samples,
    reasoned_answers,
    sample_pairs,
    training_pairs,
)
from zreward.training.run import Run, check_inputs


@dataclass(frozen=True)
class Options(PolicyOptions):
    """[method] of GDSO: GRPO's, and

    Attributes:
        policy_weight: of L_GRPO. 1 is the paper's; smaller where a trace has few tokens and its sum stays large.
        pointwise_loss, pairwise_loss: α_pt and α_pw of equation (14), which the paper leaves open. L_pt starts near
            log 9 = 2.2 and L_pw near 0.2, so 1 and 5 let both push about as hard at first.
    """

    policy_weight: float = 1.0
    pointwise_loss: float = 1.0
    pairwise_loss: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("policy_weight", "pointwise_loss", "pairwise_loss"):
            if getattr(self, name) < 0:
                raise UsageError(f"method.{name} must not be negative, not {getattr(self, name):g}")


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`).
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    inputs = check_inputs(config, "gdso")
    pairs = training_pairs(inputs)
    run = Run(inputs, progress)
    reference = Reference(run, options)
    answers = reasoned_answers(run, options.sampling, options.validation_traces)
    bins = run.core.bins
    span = run.core.contract.bins[-1] - run.core.contract.bins[0]

    for step in run.steps():
        reference.renew(run, step)
        samples = sample_pairs(run, run.batch(pairs, step), options, step, reference)
        targets_pjk = losses.bin_targets(samples.labels_pj, bins)
        parts: dict[str, float] = {}

        def loss_of(
            out: RowOutputs, samples: Samples = samples, targets: Tensor = targets_pjk, parts: Any = parts
        ) -> Tensor:
            log_probs_pjgk = out.log_probs_nk.view(*samples.shape, -1)
            valid_pjg = out.valid_n.view(samples.shape)
            judgement = samples.judgement(out)
            policy = losses.policy_loss(
                out.token_log_probs_nt,
                judgement.token_log_probs_nt,
                judgement.advantages_n,
                out.mask_nt,
                reference_log_probs_nt=samples.reference_nt,
                beta=options.beta,
                clip=options.clip,
            )
            pointwise = losses.pointwise_loss(log_probs_pjgk, targets, valid_pjg)
            means_pjg = losses.expectation(log_probs_pjgk, bins)
            pairwise = losses.pairwise_loss(means_pjg, samples.labels_pj, span, valid_pjg)
            parts.update(policy=policy.item(), pointwise=pointwise.item(), pairwise=pairwise.item())
            weighted = options.pointwise_loss * pointwise + options.pairwise_loss * pairwise
            return options.policy_weight * policy + weighted

        for _ in range(options.updates):
            loss = run.backward(samples.rows, loss_of)
            norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm, **parts, **samples.figures)
        run.validate(step, answers)
    return run.finish(answers)

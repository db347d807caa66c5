"""GRPO: the policy gradient alone, with rewards from the expectation of the score distribution.

Sampled traces are made likelier or less likely by the reward of the score that they lead to; nothing pushes on the
score distribution itself. What it lacks beside GDSO is the direct losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
    """[method] of GRPO."""


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`).
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    inputs = check_inputs(config, "grpo")
    pairs = training_pairs(inputs)
    run = Run(inputs, progress)
    reference = Reference(run, options)
    answers = reasoned_answers(run, options.sampling, options.validation_traces)

    for step in run.steps():
        reference.renew(run, step)
        samples = sample_pairs(run, run.batch(pairs, step), options, step, reference)

        def loss_of(out: RowOutputs, samples: Samples = samples) -> Tensor:
            judgement = samples.judgement(out)
            return losses.policy_loss(
                out.token_log_probs_nt,
                judgement.token_log_probs_nt,
                judgement.advantages_n,
                out.mask_nt,
                reference_log_probs_nt=samples.reference_nt,
                beta=options.beta,
                clip=options.clip,
            )

        for _ in range(options.updates):
            loss = run.backward(samples.rows, loss_of)
            norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm, **samples.figures)
        run.validate(step, answers)
    return run.finish(answers)

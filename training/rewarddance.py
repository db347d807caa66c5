"""RewardDance as a baseline: SFT on post-hoc reasoning chains that end in the annotated score.

The chains are written by a model that was told the score (`zreward data chains`), so they explain a score rather than
lead to it. A second form of the same paper, P("yes") for "the first image is better", is `losses.preference_loss`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zreward.errors import UsageError
from zreward.progress import Progress
from zreward.training import losses
from zreward.training.chains import Chain, load_chains
from zreward.training.config import TrainConfig
from zreward.training.passes import RowOutputs
from zreward.training.policy import reasoned_answers
from zreward.training.rollout import Sampling
from zreward.training.run import Run, check_inputs
from zreward.training.sequences import Row


@dataclass(frozen=True)
class Options:
    """[method] of RewardDance.

    Attributes:
        chains: JSONL of reasoning chains (`zreward.training.chains`).
        score_weight: of the score's cross-entropy beside that of a chain's tokens; a chain has many tokens and one
            score, and the mean over tokens would hardly see it.
        max_new_tokens, temperature: of the reasoning at validation.
        validation_traces: outputs whose distributions are averaged for a validation score.
    """

    chains: str
    score_weight: float = 1.0
    max_new_tokens: int = 1024
    temperature: float = 1.0
    validation_traces: int = 1

    def __post_init__(self) -> None:
        if self.score_weight < 0:
            raise UsageError(f"method.score_weight must not be negative, not {self.score_weight:g}")


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`), or the chains do not fit the data.
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    inputs = check_inputs(config, "rewarddance", labels="optional")
    chains = load_chains(Path(options.chains), inputs.data)
    run = Run(inputs, progress)
    of_item: dict[int, list[Chain]] = defaultdict(list)
    for chain in chains:
        of_item[chain.question.item].append(chain)
    items = sorted(of_item)
    sampling = Sampling(options.validation_traces, options.max_new_tokens, options.temperature)
    answers = reasoned_answers(run, sampling, options.validation_traces)

    for step in run.steps():
        batch = [chain for item in run.batch(items, step) for chain in of_item[item]]
        labels = [float(run.data.scores[chain.question]) for chain in batch]
        labelled_n = torch.tensor([not math.isnan(label) for label in labels], device=run.device)
        known = torch.tensor([label for label in labels if not math.isnan(label)])
        targets_nk = losses.bin_targets(known, run.core.bins.cpu()).to(run.device)

        def loss_of(
            out: RowOutputs, targets_nk: Tensor = targets_nk, labelled_n: Tensor = labelled_n
        ) -> Tensor:
            text = losses.sequence_cross_entropy(out.token_log_probs_nt, out.mask_nt)
            if not labelled_n.any():
                return text
            return text + options.score_weight * losses.score_cross_entropy(
                out.log_probs_nk[labelled_n], targets_nk
            )

        loss = run.backward([chain_row(run, chain) for chain in batch], loss_of)
        norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm)
        run.validate(step, answers)
    return run.finish(answers)


def chain_row(run: Run, chain: Chain) -> Row:
    """The chain and its end, and where there is a label the code of the nearest bin."""
    encoder, bins = run.core.collator.encoder, run.core.contract.bins
    output = encoder.trace_ids(chain.text).tolist()
    label = float(run.data.scores[chain.question])
    if not math.isnan(label):
        output.append(encoder.code_ids[min(range(len(bins)), key=lambda index: abs(bins[index] - label))])
    item = run.data.items[chain.question.item]
    return Row(item.prompt, item.image, chain.question.dimension, tuple(output))

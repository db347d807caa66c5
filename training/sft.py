"""SFT: annotated scores, no reasoning. The student form learns the labels directly.

The paper's weakest trained baseline, and the cold start of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zreward.progress import Progress
from zreward.training import losses
from zreward.training.config import TrainConfig
from zreward.training.model import scores_of
from zreward.training.run import Run
from zreward.training.sequences import Row


@dataclass(frozen=True)
class Options:
    """[method] of SFT.

    Attributes:
        soft_targets: learn the annotators' histogram where a data set has it, rather than all mass on the label.
    """

    soft_targets: bool = True


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`).
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    run = Run.start(config, "sft", progress=progress)
    items = range(len(run.data))

    def answers(rows: Sequence[Row]) -> list[float]:
        return scores_of(run.outputs(rows).log_probs_nk, run.core.contract.bins)

    for step in run.steps():
        batch = run.data.asked_of(run.batch(items, step), labelled=True)
        if options.soft_targets:
            targets = torch.from_numpy(np.stack([run.data.target(q) for q in batch])).float().to(run.device)
        else:
            labels = torch.tensor([run.data.scores[q] for q in batch], dtype=torch.float32, device=run.device)
            targets = losses.bin_targets(labels, run.core.bins)
        loss = run.backward(
            [run.row(question) for question in batch],
            lambda out, targets=targets: losses.score_cross_entropy(out.log_probs_nk, targets),  # type: ignore[misc]
        )
        norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm)
        run.validate(step, answers)
    return run.finish(answers)

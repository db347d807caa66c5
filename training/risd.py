"""RISD, the paper's student: the teacher's reasoning-conditioned score distributions, answered directly.

Equation (15). No labels are needed: the teacher answers every question of the data set once, before training, and the
student learns the whole distribution with no reasoning tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zreward.checkpoint import Checkpoint
from zreward.errors import UsageError
from zreward.progress import Progress
from zreward.training import losses
from zreward.training.config import TrainConfig
from zreward.training.model import check_same_contract, scores_of
from zreward.training.rollout import Sampling
from zreward.training.rollout_server import Server
from zreward.training.run import Run, check_inputs
from zreward.training.sequences import Row
from zreward.training.teacher import cached_distributions


@dataclass(frozen=True)
class Options:
    """[method] of RISD.

    Attributes:
        teacher: its checkpoint.
        reasoning: whether the teacher reasons before it answers.
        sampling: of its traces; `group_size` of them are averaged.
        cache: folder of its answers; by default `teacher` in the run's output.
        server: address of a vLLM server that samples its traces, such as "http://localhost:8000".
        served_model: the teacher's name there; by default `teacher`.
    """

    teacher: str
    reasoning: bool = True
    sampling: Sampling = field(default_factory=lambda: Sampling(group_size=1))
    cache: str | None = None
    server: str | None = None
    served_model: str | None = None

    def __post_init__(self) -> None:
        if self.server is None and self.served_model is not None:
            raise UsageError("method.served_model is a name on a server; method.server is missing")
        if self.server is not None and not self.reasoning:
            raise UsageError(
                "method.server samples traces, of which there are none with method.reasoning = false"
            )

    def serving(self) -> Server | None:
        """Where the traces are sampled, if not here."""
        return None if self.server is None else Server(self.server, self.served_model or self.teacher)


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Ask the teacher, train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`), or the teacher has another contract.
        BackendError: the server cannot be used.
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    server = options.serving()
    inputs = check_inputs(config, "risd", labels="optional")
    teacher = Checkpoint.open(options.teacher)
    check_same_contract(inputs.data.contract, teacher.contract(), options.teacher)
    questions = inputs.data.questions(labelled=False)
    log_probs = cached_distributions(
        Path(options.cache) if options.cache else Path(config.run.output) / "teacher",
        options.teacher,
        config.model,
        inputs.data,
        questions,
        options.sampling if options.reasoning else None,
        seed=config.run.seed,
        micro_batch=config.run.micro_batch,
        progress=progress,
        server=server,
    )
    answered = {
        question: row for question, row in zip(questions, log_probs, strict=True) if not row.isnan().any()
    }
    if not answered:
        raise UsageError(
            f"{options.teacher}: none of its traces led to a score; raise method.sampling.max_new_tokens, or check "
            "that this is a model that reasons"
        )

    run = Run(inputs, progress)
    items = sorted({question.item for question in answered})

    def answers(rows: Sequence[Row]) -> list[float]:
        return scores_of(run.outputs(rows).log_probs_nk, run.core.contract.bins)

    for step in run.steps():
        asked = run.data.asked_of(run.batch(items, step), labelled=False)
        batch = [question for question in asked if question in answered]
        targets = torch.stack([answered[question] for question in batch]).to(run.device)
        loss = run.backward(
            [run.row(question) for question in batch],
            lambda out, targets=targets: losses.distillation_loss(targets, out.log_probs_nk),  # type: ignore[misc]
        )
        norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm)
        run.validate(step, answers)
    return run.finish(answers)

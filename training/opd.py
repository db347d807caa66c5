"""OPD, on-policy distillation: the student writes its own reasoning, and the teacher says how likely each token was.

The baseline that RISD is compared with. The student learns to reason as the teacher does and pays for the reasoning
tokens whenever it scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zreward.checkpoint import Checkpoint
from zreward.errors import UsageError
from zreward.progress import Progress
from zreward.prompt import TOKENIZER_FILE
from zreward.training import losses
from zreward.training.config import TrainConfig
from zreward.training.model import check_same_contract
from zreward.training.passes import RowOutputs, run_rows
from zreward.training.policy import reasoned_answers
from zreward.training.rollout import Sampling
from zreward.training.run import Run
from zreward.training.teacher import load_teacher


@dataclass(frozen=True)
class Options:
    """[method] of OPD.

    Attributes:
        teacher: its checkpoint, of the same tokenizer as the student.
        sampling: of the student's outputs.
        updates: optimizer steps on each batch of outputs.
        validation_traces: outputs whose distributions are averaged for a validation score.
    """

    teacher: str
    sampling: Sampling = field(default_factory=lambda: Sampling(group_size=1))
    updates: int = 1
    validation_traces: int = 1

    def __post_init__(self) -> None:
        for name in ("updates", "validation_traces"):
            if getattr(self, name) < 1:
                raise UsageError(f"method.{name} must be at least 1, not {getattr(self, name)}")


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`); the teacher's contract or tokenizer differs.
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    _check_teacher(config, options)
    run = Run.start(config, "opd", labels="optional", progress=progress)
    teacher = load_teacher(options.teacher, config.model, run.device)
    questions = run.data.questions(labelled=False)
    answers = reasoned_answers(run, options.sampling, options.validation_traces)
    micro = run.config.run.micro_batch

    for step in run.steps():
        asked = [run.row(question) for question in run.batch(questions, step)]
        groups = run.sample(asked, options.sampling, run.sampling_seed(step))
        rows = [row for group in groups for row in group]
        judged_nt = run_rows(teacher, teacher, rows, micro).token_log_probs_nt
        sampled: list[Tensor] = []
        figures: dict[str, float] = {}

        def loss_of(
            out: RowOutputs, sampled: Any = sampled, judged_nt: Tensor = judged_nt, figures: Any = figures
        ) -> Tensor:
            if not sampled:  # the first update, whose policy is the one that sampled
                sampled.append(out.token_log_probs_nt.detach())
                figures.update(gap_to_teacher(out, judged_nt))
            return losses.on_policy_distillation_loss(
                out.token_log_probs_nt, sampled[0], judged_nt, out.mask_nt
            )

        for _ in range(options.updates):
            loss = run.backward(rows, loss_of)
            norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm, **figures)
        run.validate(step, answers)
    return run.finish(answers)


@torch.no_grad()
def gap_to_teacher(out: RowOutputs, judged_nt: Tensor) -> dict[str, float]:
    """For the log: how far the student's outputs are from what the teacher would write.

    Args:
        judged_nt: log-probabilities of the outputs' tokens under the teacher.
    """
    return {
        "reverse_kl": ((out.token_log_probs_nt - judged_nt).sum() / out.mask_nt.sum()).item(),
        "failed": 1 - out.valid_n.float().mean().item(),
        "tokens": out.mask_nt.sum(-1).float().mean().item(),
    }


def _check_teacher(config: TrainConfig, options: Options) -> None:
    """Same questions and same tokens, before a model is loaded."""
    student, teacher = Checkpoint.open(config.model.checkpoint), Checkpoint.open(options.teacher)
    if config.model.contract is None:
        check_same_contract(student.contract(), teacher.contract(), options.teacher)
    tokenizers = [(checkpoint.path / TOKENIZER_FILE).read_bytes() for checkpoint in (student, teacher)]
    if tokenizers[0] != tokenizers[1]:
        raise UsageError(
            f"{options.teacher} has another tokenizer than {config.model.checkpoint}; OPD compares token by token, so "
            "take a teacher of the same family, or train with risd"
        )

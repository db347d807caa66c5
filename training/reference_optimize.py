"""The optimization loop that every stage of the reference student shares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zreward.errors import ZrewardError
from zreward.training.reference_evaluate import RunLog
from zreward.training.reference_learner import Student
from zreward.training.reference_recipe import Stage


def run_stage(
    name: str,
    stage: Stage,
    student: Student,
    step_loss: Callable[[float], Tensor],
    validate: Callable[[], dict[str, Any]] | None,
    log: RunLog,
    validate_minutes: float,
) -> None:
    """Optimize `step_loss(progress)` until the stage's steps or minutes are used up.

    Raises:
        ZrewardError: the loss is not finite.
    """
    vision = list(student.model.model.visual.parameters())
    of_vision = {id(parameter) for parameter in vision}
    others = [p for m in (student.model, student.heads) for p in m.parameters() if id(p) not in of_vision]
    for parameter in vision:
        parameter.requires_grad_(stage.vision_rate > 0)
    groups = [
        g for p, rate in ((others, stage.rate), (vision, stage.vision_rate)) for g in decay_groups(p, rate)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    student.model.train()
    started = last_validation = time.monotonic()
    losses: list[float] = []
    for step in range(stage.steps):
        now = time.monotonic()
        progress = max(step / stage.steps, (now - started) / (60 * stage.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, progress)
        loss = step_loss(progress)
        if not math.isfinite(loss.item()):
            raise ZrewardError(f"the loss of stage {name} is {loss.item()} at step {step}; lower its rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            log.curve(name, step + 1, (now - started) / 60, float(np.mean(losses[-100:])))
        if validate is not None and now - last_validation > 60 * validate_minutes:
            student.model.eval()
            log.validation(name, step + 1, (now - started) / 60, validate())
            student.model.train()
            last_validation = time.monotonic()
    student.model.eval()
    log.curve(
        name, len(losses), (time.monotonic() - started) / 60, float(np.mean(losses[-100:] or [math.nan]))
    )
    if validate is not None:
        log.validation(name, len(losses), (time.monotonic() - started) / 60, validate())


def decay_groups(parameters: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    if rate == 0:
        return []
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": matrices, "peak": rate, "weight_decay": 0.05},
        {"params": vectors, "peak": rate, "weight_decay": 0.0},
    ]


def rate_factor(step: int, progress: float) -> float:
    """Warm-up over 100 steps, flat to half of the stage, then a cosine to nothing."""
    late = max(0.0, progress - 0.5) / 0.5
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, late)))

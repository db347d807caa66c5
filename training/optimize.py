"""The optimizer of a run and its learning rate, both functions of the config."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from zreward.errors import UsageError
from zreward.training.config import OptimizerConfig
from zreward.training.model import trainable


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of a step: linear warm-up, then constant, linear or cosine down to 0 after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    factor = 1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * factor


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over what learns, with weight decay on matrices only.

    Raises:
        UsageError: nothing learns, or 8-bit state is asked for where there is no GPU.
    """
    parameters = [p for _, p in trainable(model)]
    if not parameters:
        raise UsageError("no weight of the model learns; set model.lora_rank or train all weights")
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)
    if not torch.cuda.is_available():
        raise UsageError('optimizer.name "adamw8bit" needs a GPU; take "adamw"')
    import bitsandbytes.optim

    adamw: Any = bitsandbytes.optim
    optimizer: torch.optim.Optimizer = adamw.AdamW8bit(groups, lr=config.learning_rate, betas=betas)
    return optimizer

"""A model split over processes by torch's FSDP: each keeps a part of every weight and gathers a layer when it runs."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from zreward.training.model import RewardModel


def shard(model: RewardModel) -> None:
    """Split the model over all processes, in place; the optimizer must be made afterwards."""
    for layer in [*model.net.model.language_model.layers, *model.net.model.visual.blocks]:
        fully_shard(layer)
    fully_shard(model)
    model.shares_prefixes = False
    register_fsdp_forward_method(model, "generate")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)

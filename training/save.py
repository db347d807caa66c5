"""From what a run learned to a checkpoint that others read."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zreward.prompt import TOKENIZER_FILE
from zreward.training.config import ModelConfig
from zreward.training.model import load_model, trainable

_TOKENIZER_EXTRAS = ("tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


def save_checkpoint(
    config: ModelConfig, source: Path, weights: Mapping[str, Tensor], directory: Path
) -> None:
    """Write what was trained as a checkpoint that `zreward export` reads, in bfloat16.

    The starting checkpoint is read again and takes the trained weights; low-rank additions are merged into the original
    weights, not into their quantized copies. Needs memory for one copy of the model.

    Args:
        config: of the run.
        source: the checkpoint that the run started from, for what is not weights.
        weights: the parameters that learned, by their names in `RewardModel`.
    """
    plain = dataclasses.replace(config, quantize=None, gradient_checkpointing=False, precision="fp32")
    model = load_model(plain, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in trainable(model):
            parameter.copy_(weights[name])
    net: Any = _merged(model.net)
    net.to(torch.bfloat16).save_pretrained(directory)
    for name in (TOKENIZER_FILE, *_TOKENIZER_EXTRAS):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    model.contract.save(directory)


def _merged(net: Any) -> Any:
    """The model with its low-rank additions in the weights, or as it is where it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())
    return net

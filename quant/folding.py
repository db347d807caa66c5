"""Scales per channel, folded into whatever makes a layer's input.

Where a norm or a product stands in front of a layer, its output can be divided by s and the layer's columns
multiplied by s without changing the model. With 8-bit activations that takes outlier channels out of the rows
that are rounded (SmoothQuant); `zreward.quant.scaling` searches s, and no scaling where none helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zreward.quant.inputs import linear_of, watched_input
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.scaling import (
    OutlierStatistics,
    ScaleChoice,
    outlier_statistics,
    output_error,
    search_scales,
)
from zreward.quant.tensor import WeightFormat
from zreward.quant.units import Unit

_SAMPLES = 4096


@dataclass(frozen=True)
class Smoothing:
    """What was done to the input of a unit.

    Attributes:
        alpha: migration strength that was chosen; 0 where scaling does not help or cannot be folded.
        before, after: how unevenly the input is spread.
        changed: names, within the block, of the float tensors that were changed.
    """

    alpha: float
    before: OutlierStatistics
    after: OutlierStatistics
    changed: tuple[str, ...]


def smooth(
    network: BlockNetwork,
    block: Block,
    module: nn.Module,
    unit: Unit,
    formats: Mapping[str, WeightFormat],
    states: Sequence[Activations],
) -> Smoothing:
    """Search and fold the scales of one unit; `module` is changed in place."""
    rows = input_rows(network, block, module, unit.layers[0], states)
    before = outlier_statistics(rows)
    if unit.fold is None:
        return Smoothing(0.0, before, before, ())
    choice = _searched(rows, module, unit, formats)
    if choice.alpha == 0:
        return Smoothing(0.0, before, before, ())
    changed = fold(module, unit, choice.scales)
    return Smoothing(choice.alpha, before, outlier_statistics(rows / choice.scales), changed)


def input_rows(
    network: BlockNetwork, block: Block, module: nn.Module, layer: str, states: Sequence[Activations]
) -> Tensor:
    """Up to about 4,096 input rows of a layer, spread evenly over the batches, [rows, in]."""
    kept: list[Tensor] = []
    each = max(1, _SAMPLES // len(states))
    for state in states:
        with watched_input(linear_of(module, layer), partial(_keep, kept, state.valid, each)):
            network.step(block, module, state)
    return torch.cat(kept)


def fold(module: nn.Module, unit: Unit, scales: Tensor) -> tuple[str, ...]:
    """Divide what makes the unit's input by `scales` [in] and multiply the columns that read it.

    Returns:
        Names within the block of the tensors that were changed and are not quantized by this unit.
    """
    assert unit.fold is not None
    maker = module.get_submodule(unit.fold)
    divisor = scales[: len(scales) // repeats(module, unit)]
    weight, bias = maker.get_parameter("weight"), getattr(maker, "bias", None)
    changed = [f"{unit.fold}.weight"]
    if unit.fold_kind == "rmsnorm":
        weight.data = (1 + weight.data) / divisor - 1
    else:
        weight.data = weight.data / (divisor[:, None] if unit.fold_kind == "rows" else divisor)
    if bias is not None:
        bias.data = bias.data / divisor
        changed.append(f"{unit.fold}.bias")
    for layer in (*unit.layers, *unit.others):
        linear = linear_of(module, layer)
        linear.weight.data = linear.weight.data * scales
    return (*changed, *(f"{layer}.weight" for layer in unit.others))


def repeats(module: nn.Module, unit: Unit) -> int:
    """How often the channels of the unit's maker repeat along its input: heads, or the patches of a token."""
    assert unit.fold is not None
    weight = module.get_submodule(unit.fold).get_parameter("weight")
    return int(linear_of(module, unit.layers[0]).in_features // weight.shape[0])


def _searched(
    rows: Tensor, module: nn.Module, unit: Unit, formats: Mapping[str, WeightFormat]
) -> ScaleChoice:
    """The best scales that repeat along the input as the maker's channels do."""
    times = repeats(module, unit)
    weights = [linear_of(module, layer).weight for layer in unit.layers]
    channels = rows.shape[1] // times
    absmax = rows.abs().amax(0).view(times, channels).amax(0)
    columns = [weight.abs().amax(0).view(times, channels).amax(0)[None] for weight in weights]
    evaluate = output_error(rows, weights, [formats[layer] for layer in unit.layers])
    choice = search_scales(absmax, columns, lambda scales: evaluate(scales.repeat(times)))
    return ScaleChoice(choice.alpha, choice.scales.repeat(times), choice.errors)


def _keep(kept: list[Tensor], valid: Tensor | None, each: int, x: Tensor) -> None:
    rows = x.reshape(-1, x.shape[-1]) if valid is None else x[valid]
    kept.append(rows[:: max(1, len(rows) // each)].clone())

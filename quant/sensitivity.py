"""How much each unit's quantization moves the scores: the measurement behind mixed formats.

Each unit is quantized in each candidate format, and what its outputs then change in the scores is read off the
gradients of one sweep back through the network (`zreward.quant.gradients`): the KL divergence of the score
distributions that this unit alone would cause, to second order. Inputs are rounded as the runtime rounds them,
because that moves the scores too, and less so where groups are small.

One half of the items makes the statistics that candidates are quantized with, the other half is measured on: on data
that a layer was fitted to, it would look better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zreward.errors import QuantizationError
from zreward.progress import Progress
from zreward.quant.allocate import allocate
from zreward.quant.calibrate import Batch
from zreward.quant.gptq import quantize_gptq
from zreward.quant.gradients import PROBES, See, Trace, sweep_back
from zreward.quant.inputs import TokenWeights, input_hessians, linear_of, rounded
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.scheme import DEFAULT_GROUPS, Table, block_formats
from zreward.quant.tensor import QuantizedWeight, WeightFormat
from zreward.quant.units import Unit, units_of

_FINER = (32, 16)


@dataclass(frozen=True)
class Sensitivity:
    """What one unit costs in each format.

    Attributes:
        layers: full tensor names of the unit.
        n_bits: stored bits of the unit in each candidate format.
        kl: mean KL of the scores in nats, in each candidate format, if all else were exact.
    """

    layers: tuple[str, ...]
    n_bits: Mapping[WeightFormat, float]
    kl: Mapping[WeightFormat, float]


def mixed_table(
    table: Table, units: Sequence[Sensitivity], budget: float, shapes: Mapping[str, tuple[int, ...]]
) -> Table:
    """`table` with the format of each unit that gives the least drift within `budget` bits per weight.

    Raises:
        QuantizationError: no mixture is that small.
    """
    n_weights = sum(math.prod(shapes[name]) for unit in units for name in unit.layers)
    mixture = allocate(units, budget, n_weights)
    formats = {
        name: chosen.fitted(shapes[name][1])
        for unit, chosen in zip(units, mixture.formats, strict=True)
        for name in unit.layers
    }
    return Table(f"{table.scheme}, {budget:g}bpw", {n: formats[n] for n in table.formats}, table.kept)


def alternatives(chosen: WeightFormat) -> tuple[WeightFormat, ...]:
    """What a unit may have under a budget instead of 4 bits: smaller groups, and 8 bits."""
    if chosen.bits != 4:
        return (chosen,)
    size = chosen.group_size or DEFAULT_GROUPS["int4"]
    sizes = [size, *(finer for finer in _FINER if finer < size)]
    return tuple(replace(chosen, bits=bits, group_size=size) for bits in (4, 8) for size in sizes)


def measure(
    network: BlockNetwork,
    batches: Sequence[Batch],
    table: Table,
    candidates: Callable[[WeightFormat], Sequence[WeightFormat]],
    weights: TokenWeights,
    folder: Path,
    report: Progress,
) -> list[Sensitivity]:
    """The sensitivity of every unit of `table`.

    Args:
        network: the unquantized model.
        batches: inputs; each row asks one question.
        table: which layers are quantized.
        candidates: formats to try in place of the one in the table.
        weights: of the tokens, for the statistics that candidates are quantized with.
        folder: for temporary files.
        report: progress.

    Raises:
        QuantizationError: fewer than two items.
    """
    n_rows = sum(int(_is_measured(batch.indices).sum()) for batch in batches)
    if not n_rows:
        raise QuantizationError("a budget needs at least two calibration items")
    fitted = weights.of_items(batches, lambda items: ~_is_measured(items))
    trials: dict[Block, list[_Trial]] = {}

    def prepare(
        block: Block, module: nn.Module, states: Sequence[Activations]
    ) -> Mapping[tuple[str, ...], See]:
        formats = block_formats(table, block.prefix)
        units = units_of(block.kind, formats)
        first = [unit.layers[0] for unit in units]
        hessians = input_hessians(network, block, module, first, states, fitted)
        trials[block] = [
            _trial(module, unit, hessians[layer], candidates(formats[layer]))
            for unit, layer in zip(units, first, strict=True)
        ]
        return {trial.unit.layers: trial.see for trial in trials[block]}

    sweep_back(network, batches, prepare, folder, report)
    n_shifts = PROBES * n_rows
    return [trial.sensitivity(block.prefix, n_shifts) for block in network.blocks for trial in trials[block]]


def _is_measured(items: NDArray[np.int64]) -> NDArray[np.bool_]:
    measured: NDArray[np.bool_] = items % 2 == 1
    return measured


class _Trial:
    """One unit in each candidate format, and the squared shifts of the scores that it causes.

    Args:
        unit: layers of a block.
        original: their weights float32 [out, in].
        quantized: the same in each format.
    """

    def __init__(
        self,
        unit: Unit,
        original: Mapping[str, Tensor],
        quantized: Mapping[WeightFormat, Mapping[str, QuantizedWeight]],
    ) -> None:
        self.unit, self._original, self._quantized = unit, original, quantized
        self._squares = dict.fromkeys(quantized, 0.0)

    def see(self, trace: Trace) -> None:
        measured = torch.from_numpy(_is_measured(trace.items))
        exact = {layer: trace.x @ weight.T for layer, weight in self._original.items()}
        for chosen, weights in self._quantized.items():
            changes = {}
            for layer, weight in weights.items():
                x = rounded(trace.x, weight.format)
                values = torch.from_numpy(weight.dequantized()).to(x.device)
                changes[layer] = x @ values.T - exact[layer]
            self._squares[chosen] += float(trace.shifts(changes)[:, measured].double().square().sum())

    def sensitivity(self, prefix: str, n_shifts: int) -> Sensitivity:
        names = tuple(f"{prefix}{layer}.weight" for layer in self.unit.layers)
        n_bits = {
            chosen: sum(w.format.bits_per_weight(w.shape[1]) * w.codes.size for w in weights.values())
            for chosen, weights in self._quantized.items()
        }
        kl = {chosen: square / (2 * n_shifts) for chosen, square in self._squares.items()}
        return Sensitivity(names, n_bits, kl)


def _trial(module: nn.Module, unit: Unit, hessian: Tensor, candidates: Sequence[WeightFormat]) -> _Trial:
    original = {layer: linear_of(module, layer).weight for layer in unit.layers}
    quantized = {
        chosen: {
            layer: quantize_gptq(weight, hessian, chosen.fitted(weight.shape[1]), refine_passes=0)
            for layer, weight in original.items()
        }
        for chosen in candidates
    }
    return _Trial(unit, original, quantized)

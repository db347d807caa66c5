"""How much each unit's quantization moves the scores: the measurement behind mixed formats.

For every unit and candidate format, the unit alone is quantized, the rest of the network runs as it is, and the
mean KL divergence of the score distributions from the unquantized ones is what the format costs there. Blocks
in front of the unit are not run again; those behind it are, so the whole measurement costs about half as many
forward passes as there are blocks times units times formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from zreward.quant.allocate import allocate
from zreward.quant.calibrate import Batch
from zreward.quant.gptq import quantize_gptq
from zreward.quant.inputs import input_hessian, linear_of, quantize_inputs
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.scheme import DEFAULT_GROUP, Table, block_formats
from zreward.quant.tensor import WeightFormat
from zreward.quant.units import Unit, units_of

EIGHT_BITS = WeightFormat(8, DEFAULT_GROUP)

_FINER = (32, 16)


@dataclass(frozen=True)
class Sensitivity:
    """What one unit costs in each format.

    Attributes:
        layers: full tensor names of the unit.
        n_bits: stored bits of the unit in each candidate format.
        kl: mean KL(unquantized ‖ quantized) of the scores in nats, in each candidate format.
    """

    layers: tuple[str, ...]
    n_bits: Mapping[WeightFormat, float]
    kl: Mapping[WeightFormat, float]


def mean_kl(before: Tensor, after: Tensor) -> float:
    """Mean over rows of Σ_k p_k ln(p_k / q_k), for float64 probabilities [rows, bins]."""
    tiny = torch.finfo(torch.float64).tiny
    ratio = torch.log(before.clamp_min(tiny)) - torch.log(after.clamp_min(tiny))
    return float((before * ratio).sum(-1).mean())


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
    """What a unit may have under a budget instead of 4 bits: smaller groups, or 8 bits."""
    if chosen.bits != 4:
        return (chosen,)
    finer = (
        replace(chosen, group_size=size) for size in _FINER if size < (chosen.group_size or DEFAULT_GROUP)
    )
    return (chosen, *finer, EIGHT_BITS)


def measure(
    network: BlockNetwork,
    batches: Sequence[Batch],
    table: Table,
    candidates: Callable[[WeightFormat], Sequence[WeightFormat]],
    report: Callable[[str, int, int], None],
) -> list[Sensitivity]:
    """The sensitivity of every unit of `table`.

    Args:
        network: the unquantized model.
        batches: inputs; each row asks one question.
        table: which layers are quantized.
        candidates: formats to try in place of the one in the table.
        report: progress.
    """
    load = lru_cache(maxsize=None)(network.load)
    n_units = sum(len(_units(network, block, table)) for block in network.blocks)
    states = [network.begin(batch) for batch in batches]
    baseline = _answers(network, load, network.blocks, states)
    found: list[Sensitivity] = []
    report("measuring sensitivity", 0, n_units)
    for index, block in enumerate(network.blocks):
        module, formats = load(block), block_formats(table, block.prefix)
        for unit in _units(network, block, table):
            trial = _Trial(network, load, index, module, unit, states, baseline)
            kl = {chosen: trial.kl(chosen) for chosen in candidates(formats[unit.layers[0]])}
            names = tuple(f"{block.prefix}{layer}.weight" for layer in unit.layers)
            found.append(Sensitivity(names, {f: trial.n_bits(f) for f in kl}, kl))
            report("measuring sensitivity", len(found), n_units)
        states = [network.step(block, module, state) for state in states]
    return found


@dataclass(frozen=True)
class _Trial:
    """One unit quantized alone, in a network that is otherwise as it was."""

    network: BlockNetwork
    load: Callable[[Block], nn.Module]
    index: int
    module: nn.Module
    unit: Unit
    states: Sequence[Activations]
    baseline: Sequence[Tensor]

    def kl(self, chosen: WeightFormat) -> float:
        block = self.network.blocks[self.index]
        layers = [linear_of(self.module, layer) for layer in self.unit.layers]
        original = [layer.weight.data for layer in layers]
        hessian = self._hessian
        handles = []
        try:
            for layer in layers:
                fitted = chosen.fitted(layer.in_features)
                weight = quantize_gptq(layer.weight.data, hessian, fitted, refine_passes=0)
                layer.weight.data = torch.from_numpy(weight.dequantized()).to(layer.weight.device)
                if fitted.activations == "int8":
                    handles.append(layer.register_forward_pre_hook(quantize_inputs))
            states = [self.network.step(block, self.module, state) for state in self.states]
            after = _answers(self.network, self.load, self.network.blocks[self.index + 1 :], states)
        finally:
            for layer, weight_before in zip(layers, original, strict=True):
                layer.weight.data = weight_before
            for handle in handles:
                handle.remove()
        return mean_kl(torch.cat(list(self.baseline)), torch.cat(after))

    def n_bits(self, chosen: WeightFormat) -> float:
        layers = [linear_of(self.module, layer) for layer in self.unit.layers]
        return sum(
            chosen.fitted(layer.in_features).bits_per_weight(layer.in_features) * layer.weight.numel()
            for layer in layers
        )

    @cached_property
    def _hessian(self) -> Tensor:
        block = self.network.blocks[self.index]
        return input_hessian(self.network, block, self.module, self.unit.layers[0], self.states)


def _units(network: BlockNetwork, block: Block, table: Table) -> list[Unit]:
    return units_of(block.kind, block_formats(table, block.prefix))


def _answers(
    network: BlockNetwork,
    load: Callable[[Block], nn.Module],
    blocks: Sequence[Block],
    states: Sequence[Activations],
) -> list[Tensor]:
    """Probabilities of each batch after `blocks`."""
    for block in blocks:
        module = load(block)
        states = [network.step(block, module, state) for state in states]
    return [network.answers(state) for state in states]

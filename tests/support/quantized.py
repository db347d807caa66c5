"""Quantized weights in memory, in any format: random ones, and checkpoints rounded to nearest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from zreward.checkpoint import Checkpoint
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import CodebookFormat, CodebookWeight, QuantizedWeight, WeightFormat

Format = WeightFormat | CodebookFormat
Weight = QuantizedWeight | CodebookWeight

# Values as bitsandbytes prints them (functional.py, create_normal_map and get_4bit_type), to seven digits.
TABLES = {
    "nf4": [
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ],
    "fp4": [
        *(0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25),
        *(0.0, -0.0052083, -0.6666667, -1.0, -0.3333333, -0.5, -0.1666667, -0.25),
    ],
}


class WeightsInMemory:
    """A `QuantizedWeights` of given matrices that counts how often each is read.

    Attributes:
        scales: of inputs that are rounded with a static scale, by the name of their matrix.
    """

    def __init__(self, matrices: Mapping[str, Weight]) -> None:
        self.matrices = dict(matrices)
        self.scales: dict[str, float] = {}
        self.reads: Counter[str] = Counter()

    @property
    def formats(self) -> Mapping[str, Format]:
        return {name: weight.format for name, weight in self.matrices.items()}

    def shape(self, name: str) -> tuple[int, int]:
        return self.matrices[name].shape

    def input_scale(self, name: str) -> float | None:
        return self.scales.get(name)

    def weight(self, name: str) -> Weight:
        self.reads[name] += 1
        return self.matrices[name]

    def summary(self) -> dict[str, Any]:
        return {"method": "rtn"}


def quantized_checkpoint(
    checkpoint: Checkpoint, formats: Mapping[str, Format]
) -> tuple[QuantizedCheckpoint, WeightsInMemory]:
    """`checkpoint` with the matrices that `formats` names rounded to nearest."""
    weights = WeightsInMemory({name: rounded(checkpoint.read(name), f) for name, f in formats.items()})
    return QuantizedCheckpoint(checkpoint.path, checkpoint.config, checkpoint.tensors, weights), weights


def rounded(values: NDArray[np.float32], chosen: Format) -> Weight:
    """A matrix [out, in] in any format, each value at its nearest code."""
    if isinstance(chosen, CodebookFormat):
        return _looked_up(values, chosen)
    if chosen.is_float8:
        return _floats(values, chosen)
    order = None
    if chosen.act_order:
        order = np.random.default_rng(values.size).permutation(values.shape[1])
        values = values[:, order]
    grouped = values.reshape(values.shape[0], chosen.n_groups(values.shape[1]), -1)
    if chosen.symmetric:
        scales = np.abs(grouped).max(-1) / (chosen.middle - 1)
        zeros = np.full(scales.shape, chosen.middle, np.uint8)
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = (high - low) / chosen.max_code
        zeros = np.clip(np.rint(-low / scales), 0, chosen.max_code).astype(np.uint8)
    scales = scales.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, chosen.max_code)
    return QuantizedWeight(chosen, codes.astype(np.uint8).reshape(values.shape), scales, zeros, order)


def _floats(values: NDArray[np.float32], chosen: WeightFormat) -> QuantizedWeight:
    scales = (np.abs(values).max(-1, keepdims=True) / 448).astype(np.float16).astype(np.float32)
    codes = (values / scales).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return QuantizedWeight(chosen, codes, scales, np.zeros(scales.shape, np.uint8))


def _looked_up(values: NDArray[np.float32], chosen: CodebookFormat) -> CodebookWeight:
    table = np.array(TABLES[chosen.name], np.float32)
    flat = values.reshape(-1)
    padded = np.pad(flat, (0, -flat.size % chosen.block_size)).reshape(-1, chosen.block_size)
    scales = np.abs(padded).max(-1)
    nearest = np.abs(padded[:, :, None] / scales[:, None, None] - table).argmin(-1)
    codes = nearest.reshape(-1)[: flat.size].reshape(values.shape).astype(np.uint8)
    return CodebookWeight(chosen, codes, scales, table)


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, int],
    form: WeightFormat,
    order: NDArray[np.int64] | None = None,
) -> QuantizedWeight:
    """A matrix of random codes, scales and, where asymmetric, zero points."""
    groups = (shape[0], form.n_groups(shape[1]))
    codes = rng.integers(0, form.max_code + 1, size=shape, dtype=np.uint8)
    scales = rng.uniform(0.001, 0.1, size=groups).astype(np.float16).astype(np.float32)
    zeros = np.full(groups, form.middle, dtype=np.uint8)
    if not form.symmetric:
        zeros = rng.integers(0, form.max_code + 1, size=groups, dtype=np.uint8)
    return QuantizedWeight(form, codes, scales, zeros, order)

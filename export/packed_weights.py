"""The parts of quantized weights as initializers: packed for one operator each, when they are written.

A quantized matrix becomes two to four initializers (codes, scales, zero points, a codebook's scales). Each is a
`PackedTensor` that reads the matrix when it is written. `WeightReader` holds the matrix that was read last, so
one that is written part after part is read once, and never more than one is in memory.

Layouts, for a matrix of N outputs and K inputs in groups of g; nibbles are packed with the earlier element in
the low half of a byte unless said otherwise:

    MatMulNBits         codes uint8 [N, K/g, g·bits/8], scales [N, K/g], zero points uint8 [N, ⌈K/g·bits/8⌉]
                        https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    MatMulIntegerToFloat  codes int8 [K, N], scales [N]
    DequantizeLinear    codes (u)int4 or (u)int8 [K, N], scales and zero points [K/g, N], or [N] for whole rows
                        https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
    MatMulBnb4          codes uint8 [⌈N·K/2⌉], the earlier element in the high half; scales float32 [⌈N·K/block⌉]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from zreward.errors import ExportError
from zreward.export.weights import StreamedTensor
from zreward.quant.source import QuantizedWeights
from zreward.quant.tensor import CodebookWeight, QuantizedWeight

Weight = QuantizedWeight | CodebookWeight
Pack = Callable[[Any], NDArray[Any]]
"""From the weight to an array in storage order; elements of 4 bits packed."""

MIN_BLOCK, MAX_BLOCK = 16, 256
"""Inputs that may share a scale in MatMulNBits: a power of two between these."""

_NUMPY_DTYPES: dict[ir.DataType, Any] = {
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT8: np.int8,
    ir.DataType.INT64: np.int64,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.FLOAT: np.float32,
    ir.DataType.INT4: np.uint8,
    ir.DataType.UINT4: np.uint8,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
}
_PACKED = (ir.DataType.INT4, ir.DataType.UINT4)


class WeightReader:
    """Reads quantized matrices and holds the last one."""

    def __init__(self, weights: QuantizedWeights) -> None:
        self.weights = weights
        self._name: str | None = None
        self._weight: Weight | None = None

    def read(self, name: str) -> Weight:
        if self._weight is None or self._name != name:
            self._weight = None  # the last one goes before the next one comes
            self._weight, self._name = self.weights.weight(name), name
        return self._weight


class PackedTensor(StreamedTensor):
    """One part of a quantized matrix, laid out for an operator by `pack`."""

    def __init__(
        self,
        reader: WeightReader,
        source: str,
        pack: Pack,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        name: str,
    ) -> None:
        self.reader, self.source, self.pack = reader, source, pack
        super().__init__(dtype, shape, name)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The part as one block.

        Raises:
            ExportError: the weight is not what its format announced, or float16 does not hold its scales.
            QuantizationError: the weight is damaged.
        """
        values = np.ascontiguousarray(self._packed(), dtype=_NUMPY_DTYPES[self.dtype])
        if values.nbytes != self.nbytes:
            raise ExportError(
                f"weight {self.source!r}: {self.name!r} has {values.nbytes} bytes, but its format announced "
                f"{self.nbytes}; the quantized checkpoint contradicts itself"
            )
        yield values

    def _packed(self) -> NDArray[Any]:
        try:
            return self.pack(self.reader.read(self.source))
        except ExportError as error:
            raise ExportError(f"weight {self.source!r}: {error}") from None

    def in_memory(self) -> ir.TensorProtocol:
        (values,) = self.blocks()
        if self.dtype in _PACKED:
            return ir.PackedTensor(values.reshape(-1), self.dtype, shape=self.shape, name=self.name)
        return ir.Tensor(
            values.reshape(self.shape.numpy()).view(self.dtype.numpy()), dtype=self.dtype, name=self.name
        )


def block_size(group_size: int, in_features: int) -> int:
    """Inputs of a MatMulNBits block: the group or, where a whole row shares a scale, the largest that divides.

    A row that no block divides ends in a part of one, which the operator allows.
    """
    return group_size or max(MIN_BLOCK, math.gcd(MAX_BLOCK, in_features))


def nibbles(values: NDArray[np.uint8], *, high_first: bool = False) -> NDArray[np.uint8]:
    """Values below 16 [..., n] as uint8 [..., ⌈n/2⌉]; an odd end is filled with zero."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    first, second = values[..., 0::2], values[..., 1::2]
    low, high = (second, first) if high_first else (first, second)
    return low | (high << np.uint8(4))


def block_codes(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Codes for MatMulNBits."""
    bits, (out, inputs) = weight.format.bits, weight.shape
    size = block_size(weight.format.group_size, inputs)
    codes = _grouped_codes(weight)
    tail = -inputs % size
    if tail:
        codes = np.pad(codes, ((0, 0), (0, tail)), constant_values=weight.format.middle)
    blocks = codes.reshape(out, -1, size)
    return nibbles(blocks) if bits == 4 else blocks


def block_scales(weight: QuantizedWeight) -> NDArray[Any]:
    """Scales for MatMulNBits; of a whole row, repeated for each block."""
    return stored_scales(weight).repeat(_repeats(weight), axis=1)


def block_float_scales(weight: QuantizedWeight) -> NDArray[np.float32]:
    """The same in float32, to be stored in whatever type the product has."""
    return weight.scales.repeat(_repeats(weight), axis=1)


def block_zeros(weight: QuantizedWeight, times: int = 1) -> NDArray[np.uint8]:
    """Zero points for MatMulNBits, each `times` times where a group is stored as so many blocks."""
    zeros = weight.zeros.repeat(times * _repeats(weight), axis=1)
    return nibbles(zeros) if weight.format.bits == 4 else zeros


def signed_columns(weight: QuantizedWeight) -> NDArray[np.int8]:
    """Symmetric 8-bit codes as int8 [K, N]."""
    return (_grouped_codes(weight) ^ 0x80).view(np.int8).T


def matrix_codes(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Codes for DequantizeLinear: [K, N], whole numbers of symmetric ones in two's complement around zero."""
    codes = _grouped_codes(weight)
    if weight.format.symmetric:
        codes = codes ^ np.uint8(weight.format.middle)
    codes = np.ascontiguousarray(codes.T)
    return nibbles(codes.reshape(-1)) if weight.format.bits == 4 else codes


def matrix_scales(weight: QuantizedWeight) -> NDArray[Any]:
    """Scales for DequantizeLinear."""
    return stored_scales(weight).T


def matrix_float_scales(weight: QuantizedWeight) -> NDArray[np.float32]:
    """Scales for DequantizeLinear in float32, to be stored in whatever type the product has."""
    return weight.scales.T


def matrix_zeros(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Zero points for DequantizeLinear."""
    zeros = np.ascontiguousarray(weight.zeros.T).reshape(-1)
    return nibbles(zeros) if weight.format.bits == 4 else zeros


def stored_scales(weight: QuantizedWeight) -> NDArray[Any]:
    """The scales [out, groups] in the 16 or 32 bits that they are stored in.

    Raises:
        ExportError: float16 does not hold them.
    """
    if weight.format.scale_bits == 32:
        return weight.scales
    with np.errstate(over="ignore"):
        scales = weight.scales.astype(np.float16)
    if not np.array_equal(scales.astype(np.float32), weight.scales):
        raise ExportError("its scales are not float16 values; quantize the checkpoint again")
    return scales


def fitting_scales(scales: NDArray[np.float32], dtype: ir.DataType) -> NDArray[Any]:
    """Scales in the type of the product.

    Raises:
        ExportError: one becomes zero or infinite there.
    """
    with np.errstate(over="ignore", under="ignore"):
        stored = scales.astype(_NUMPY_DTYPES[dtype])
    narrowed = stored.astype(np.float32)
    if not np.isfinite(narrowed).all() or ((narrowed == 0) & (scales != 0)).any():
        raise ExportError(
            f"its scales do not fit {dtype.name.lower()}; compute in a wider type (--weights bf16 or fp32)"
        )
    return stored


def codebook_codes(weight: CodebookWeight) -> NDArray[np.uint8]:
    """Codes for MatMulBnb4.

    Raises:
        ExportError: the table is not the one that the operator has.
    """
    expected = BNB4_TABLES[weight.format.name]
    if not np.allclose(weight.table, expected, atol=1e-6):
        raise ExportError(
            f"its table of 16 values is not {weight.format.name}'s; dequantize the checkpoint and export that"
        )
    return nibbles(weight.codes.reshape(-1), high_first=True)


def codebook_scales(weight: CodebookWeight) -> NDArray[np.float32]:
    """Scales for MatMulBnb4."""
    return weight.scales


def _grouped_codes(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Codes [N, K] in the order that the product reads: the layer's own where a row is one group.

    Raises:
        ExportError: groups are scattered over the inputs, which the format did not announce.
    """
    if weight.order is None or (weight.format.act_order and weight.scales.shape[1] > 1):
        return weight.codes
    if weight.scales.shape[1] > 1:
        raise ExportError("its inputs are reordered, but its format does not say so (act_order)")
    codes = np.empty_like(weight.codes)
    codes[:, weight.order] = weight.codes
    return codes


def _repeats(weight: QuantizedWeight) -> int:
    if weight.format.group_size:
        return 1
    inputs = weight.shape[1]
    return math.ceil(inputs / block_size(0, inputs))


def _normal_float() -> NDArray[np.float32]:
    """NF4: quantiles of the normal distribution, with an exact zero (QLoRA, arXiv 2305.14314, appendix E)."""
    return np.array(
        [
            *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
        ],
        dtype=np.float32,
    )


def _float4() -> NDArray[np.float32]:
    """FP4 of bitsandbytes: sign, then 0, 1/192, 8/12, 1, 4/12, 6/12, 2/12, 3/12."""
    positive = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / 12
    return np.concatenate([positive, -positive])


BNB4_TABLES = {"nf4": _normal_float(), "fp4": _float4()}
BNB4_TYPES = {"fp4": 0, "nf4": 1}

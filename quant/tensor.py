"""A quantized weight matrix: codes, scales and zero points. Every target lowers from this form.

W[o, i] = (codes[o, i] − zeros[o, g(i)]) · scales[o, g(i)], where inputs share a group g of `group_size`
neighbours. Codes are unsigned; a symmetric weight has the constant zero point 2^(bits−1). In fp8 a code is a float
of 8 bits (`zreward.quant.float8`), and W[o, i] = float8(codes[o, i]) · scales[o]. Scales are values that float16
holds exactly, so that every format stores the same numbers; only 8-bit weights of bitsandbytes have float32 scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.errors import QuantizationError
from zreward.quant.float8 import NAN_CODES, float8_values

BITS = (4, 8)
ACTIVATIONS = ("float", "int8", "int8-static", "fp8-static")


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored and multiplied.

    Attributes:
        bits: of a weight's code, 4 or 8.
        group_size: neighbouring inputs that share a scale; 0: all inputs of an output share one.
        symmetric: the zero point is the middle code and is not stored.
        activations: "float": the product dequantizes the weights; "int8": the inputs are quantized too, a
            scale per token found at run time, and the product is in whole numbers; "int8-static": so are they, with
            one scale for all that calibration found; "fp8-static": the same of weights and inputs that are floats of
            8 bits.
        act_order: the codes have their inputs in another order than the layer, which `QuantizedWeight.order`
            tells. It is known before the weight is read, because a graph must reorder its activations.
        scale_bits: of a stored scale: 16, or 32 where another tool's scales do not fit float16.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    activations: str = "float"
    act_order: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise QuantizationError(f"weights of {self.bits} bits are not supported; choose 4 or 8")
        if self.group_size < 0 or (self.group_size and not 16 <= self.group_size <= 256):
            raise QuantizationError(
                f"group size {self.group_size} is not supported; choose 16 to 256, or 0 for whole rows"
            )
        if self.group_size & (self.group_size - 1):
            raise QuantizationError(f"group size {self.group_size} is not a power of two")
        if self.activations not in ACTIVATIONS:
            raise QuantizationError(f"activations {self.activations!r} are none of {', '.join(ACTIVATIONS)}")
        if self.rounds_inputs and (self.bits, self.group_size, self.symmetric) != (8, 0, True):
            raise QuantizationError("8-bit activations need symmetric 8-bit weights with a scale per output")

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are quantized too."""
        return self.activations != "float"

    @property
    def has_static_inputs(self) -> bool:
        """Whether calibration must find the scale of the inputs."""
        return self.activations.endswith("-static")

    @property
    def is_float8(self) -> bool:
        """Whether codes are floats of 8 bits."""
        return self.activations == "fp8-static"

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight: the code of 0."""
        return 0 if self.is_float8 else int(2 ** (self.bits - 1))

    def n_groups(self, in_features: int) -> int:
        """Groups of a row.

        Raises:
            QuantizationError: the group size does not divide the inputs.
        """
        if not self.group_size:
            return 1
        if in_features % self.group_size:
            raise QuantizationError(
                f"group size {self.group_size} does not divide {in_features} inputs; choose a smaller power of two"
            )
        return in_features // self.group_size

    def fitted(self, in_features: int) -> WeightFormat:
        """This format with the group size halved until it divides the inputs.

        Raises:
            QuantizationError: groups would have fewer than 16 inputs.
        """
        size = math.gcd(self.group_size, in_features) if self.group_size else 0
        if self.group_size and size < 16:
            raise QuantizationError(f"{in_features} inputs cannot be cut into groups of 16 or more")
        return replace(self, group_size=size)

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits a weight, scales and zero points of `bits` bits included."""
        overhead = self.scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.n_groups(in_features) / in_features


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized matrix of a linear layer.

    Attributes:
        format: bits, groups and symmetry.
        codes: uint8 [out, in], one code an element whatever the bits.
        scales: float32 [out, groups], positive; float16 holds them unless `format.scale_bits` is 32.
        zeros: uint8 [out, groups]; all `format.middle` where symmetric.
        order: where not None, int64 [in]: column j of `codes` is input `order[j]` (act-order checkpoints).
    """

    format: WeightFormat
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    order: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise QuantizationError(f"codes must be uint8 [out, in], not {_described(self.codes)}")
        expected = (self.codes.shape[0], self.format.n_groups(self.codes.shape[1]))
        if self.scales.shape != expected or self.scales.dtype != np.float32:
            raise QuantizationError(f"scales must be float32 {expected}, not {_described(self.scales)}")
        if self.zeros.shape != expected or self.zeros.dtype != np.uint8:
            raise QuantizationError(f"zero points must be uint8 {expected}, not {_described(self.zeros)}")
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            raise QuantizationError("scales must be positive and finite; the checkpoint is damaged")
        if self.codes.size and int(self.codes.max()) > self.format.max_code:
            raise QuantizationError(
                f"a code exceeds {self.format.max_code}, the largest of {self.format.bits} bits"
            )
        if self.format.is_float8 and np.isin(self.codes, NAN_CODES).any():
            raise QuantizationError("a code is NaN; the checkpoint is damaged")
        if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(self.codes.shape[1])):
            raise QuantizationError("the order of the inputs is not a permutation; the checkpoint is damaged")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def n_bits(self) -> int:
        """Stored bits: codes, scales and, where asymmetric, zero points."""
        return math.ceil(self.format.bits_per_weight(self.codes.shape[1]) * self.codes.size)

    def dequantized(self) -> NDArray[np.float32]:
        """The matrix that the codes stand for, float32 [out, in], inputs in their own order."""
        out, inputs = self.codes.shape
        groups = self.scales.shape[1]
        codes = self.codes.reshape(out, groups, inputs // groups)
        if self.format.is_float8:
            levels = float8_values()[codes]
        else:
            levels = codes.astype(np.float32) - self.zeros[:, :, None].astype(np.float32)
        values = levels * self.scales[:, :, None]
        flat: NDArray[np.float32] = values.reshape(out, inputs)
        if self.order is None:
            return flat
        restored = np.empty_like(flat)
        restored[:, self.order] = flat
        return restored


@dataclass(frozen=True)
class CodebookFormat:
    """4-bit codes into a table of 16 values, as bitsandbytes stores NF4 and FP4.

    Attributes:
        name: "nf4" or "fp4".
        block_size: consecutive elements of the flattened [out, in] matrix that share a scale.
    """

    name: str
    block_size: int

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits a weight with float32 scales."""
        return 4 + 32 / self.block_size


@dataclass(frozen=True)
class CodebookWeight:
    """A matrix in a codebook format: W.flat[e] = table[codes.flat[e]] · scales[e // block_size].

    Attributes:
        format: which table, and the block size.
        codes: uint8 [out, in], 0 to 15.
        scales: float32 [ceil(out·in / block_size)].
        table: float32 [16].
    """

    format: CodebookFormat
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    table: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantized(self) -> NDArray[np.float32]:
        """The matrix that the codes stand for, float32 [out, in]."""
        scales = np.repeat(self.scales, self.format.block_size)[: self.codes.size]
        values: NDArray[np.float32] = self.table[self.codes.reshape(-1)] * scales
        return values.reshape(self.codes.shape)


def _described(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"

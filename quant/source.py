"""Where an export reads a quantized model from.

`QuantizedCheckpoint` is a checkpoint of which some matrices are stored as codes and scales. Read as floats they
come dequantized, so everything that works on checkpoints works on it; a target that can multiply codes asks
`weights` for them. There are three origins: the store that `zreward.quant.quantize` writes, and checkpoints in
the formats of GPTQ and bitsandbytes (`zreward.quant.formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zreward.checkpoint import Checkpoint
from zreward.quant.tensor import CodebookFormat, CodebookWeight, QuantizedWeight, WeightFormat
from zreward.safetensors_file import TensorInfo


class QuantizedWeights(Protocol):
    """The quantized matrices of a checkpoint, read when they are asked for."""

    @property
    def formats(self) -> Mapping[str, WeightFormat | CodebookFormat]:
        """Format of each quantized matrix, by the name that it has in a float checkpoint ("….weight")."""

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a quantized matrix."""

    def input_scale(self, name: str) -> float | None:
        """The static scale of the inputs of a matrix whose format has one; None where nothing found it."""

    def weight(self, name: str) -> QuantizedWeight | CodebookWeight:
        """Read one quantized matrix."""

    def summary(self) -> dict[str, Any]:
        """What the manifest says about the quantization: scheme, method, formats, what is kept and why."""


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint with quantized matrices.

    Attributes:
        weights: those matrices; `tensors` has the others.
    """

    weights: QuantizedWeights

    def info(self, name: str) -> TensorInfo:
        """As for a float checkpoint; a quantized matrix is described as the float32 that `read` returns."""
        if name in self.weights.formats:
            return TensorInfo(name, "F32", self.weights.shape(name), self.path, 0)
        return super().info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        if name in self.weights.formats:
            return self.weights.weight(name).dequantized()[start:stop]
        return super().read(name, start, stop)

    def read_stored(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """As for a float checkpoint; a quantized matrix comes as the float32 that `info` describes."""
        if name in self.weights.formats:
            return self.read(name, start, stop)
        return super().read_stored(name, start, stop)

    @property
    def n_parameters(self) -> int:
        quantized = sum(out * inputs for out, inputs in map(self.weights.shape, self.weights.formats))
        floats = (info.size for name, info in self.tensors.items() if name not in self.weights.formats)
        return quantized + sum(floats)

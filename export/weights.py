"""Weights that stay in the checkpoint until the moment they are written.

A `StreamedTensor` is an onnx_ir tensor whose values come in blocks when `zreward.export.storage` writes them,
so an export never holds more than one matrix. `CheckpointTensor` knows where a float weight lies and how it
is laid out in the graph; passes change its layout or stored type without reading anything. The parts of a
quantized weight are streamed tensors too (`zreward.export.packed_weights`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from zreward.checkpoint import Checkpoint
from zreward.errors import ExportError

_BLOCK_BYTES = 64 * 1024 * 1024
_NUMPY_DTYPES: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Layout:
    """How a tensor of the checkpoint is laid out in the graph.

    Attributes:
        source: its name in the checkpoint.
        rows: keep only these rows, in this order.
        flatten: then view it as a matrix [first dimension, rest] (a convolution kernel as a weight matrix).
        transpose: then swap the two dimensions ([out, in] of a linear layer as [in, out] of a MatMul).
        dtype: the type it is stored in.
    """

    source: str
    rows: tuple[int, ...] | None = None
    flatten: bool = False
    transpose: bool = False
    dtype: ir.DataType = ir.DataType.FLOAT


class StreamedTensor(ir.LazyTensor):
    """A tensor of the graph that is read when it is written; nothing is cached."""

    def __init__(self, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> None:
        super().__init__(self.in_memory, dtype, ir.Shape(shape), name=name)

    @abstractmethod
    def blocks(self) -> Iterator[NDArray[Any]]:
        """The values in storage order: C-contiguous, little-endian, elements below 8 bits packed."""

    @abstractmethod
    def in_memory(self) -> ir.TensorProtocol:
        """All values as one tensor in memory."""


class CheckpointTensor(StreamedTensor):
    """A float weight of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, name: str) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        shape = checkpoint.info(layout.source).shape
        if layout.flatten:
            shape = (shape[0], math.prod(shape[1:]))
        if layout.rows is not None:
            shape = (len(layout.rows), *shape[1:])
        if layout.transpose:
            shape = (shape[1], shape[0])
        super().__init__(layout.dtype, shape, name)

    def with_layout(self, name: str | None = None, **changes: Any) -> CheckpointTensor:
        """The same weight laid out otherwise, for example `with_layout(transpose=True)`."""
        return CheckpointTensor(self.checkpoint, replace(self.layout, **changes), name or str(self.name))

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The values in storage order, C-contiguous and little-endian, in blocks of at most 64 MiB.

        A transposed or row-selected tensor comes as one block. Blocks of a flattened tensor keep the shape
        that they have in the checkpoint; their bytes are the same.

        Raises:
            ExportError: a value is not finite, or does not fit the stored type.
        """
        info, layout = self.checkpoint.info(self.layout.source), self.layout
        if layout.transpose or layout.rows is not None or not info.shape:
            yield self._converted(self._arranged())
            return
        row_bytes = max(1, 4 * info.size // max(1, info.shape[0]))
        step = max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, info.shape[0], step):
            yield self._converted(self.checkpoint.read(layout.source, start, start + step))

    def in_memory(self) -> ir.TensorProtocol:
        values = np.concatenate([block.reshape(-1) for block in self.blocks()])
        return ir.Tensor(values.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def _arranged(self) -> NDArray[np.float32]:
        layout = self.layout
        if layout.rows is not None:
            picked = [self.checkpoint.read(layout.source, row, row + 1) for row in layout.rows]
            values = np.concatenate(picked)
        else:
            values = self.checkpoint.read(layout.source)
        if layout.flatten:
            values = values.reshape(values.shape[0], -1)
        return np.ascontiguousarray(values.T) if layout.transpose else values

    def _converted(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if not np.isfinite(values).all():
            raise ExportError(
                f"{self.checkpoint.path}: weight {self.layout.source!r} holds NaN or infinity; "
                "the checkpoint is damaged or its training diverged"
            )
        with np.errstate(over="ignore"):
            stored = values.astype(_NUMPY_DTYPES[self.dtype], copy=False)
        if self.dtype is not ir.DataType.FLOAT and not np.isfinite(stored.astype(np.float32)).all():
            raise ExportError(
                f"{self.checkpoint.path}: weight {self.layout.source!r} exceeds the range of "
                f"{self.dtype.name.lower()}; store the weights as bf16 (--weights bf16), or as fp32"
            )
        return stored

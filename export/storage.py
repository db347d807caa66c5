"""Writing a graph: weights stream into one external-data file, the graph beside it stays small.

Tensors are aligned to 4 KiB, so that a runtime can map each of them, and they are written in graph order.
Constants below 1 KiB stay inside the graph, where runtimes fold them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from zreward.bundle import EmbeddingInfo
from zreward.checkpoint import Checkpoint
from zreward.errors import ExportError
from zreward.export.graph import EMBEDDING
from zreward.export.weights import StreamedTensor
from zreward.safetensors_file import float32_from_stored

ByteProgress = Callable[[int], None]

_ALIGNMENT = 4096
_INLINE_BYTES = 1024
_EMBEDDING_BLOCK_ROWS = 8192
_EMBEDDING_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_graph(model: ir.Model, path: Path, wrote: ByteProgress) -> None:
    """Write `model` to `path` and its weights to `path` + `.data`; `wrote` hears of each block's bytes.

    The model is consumed: its initializers point at the written file afterwards.
    """
    data_path = path.with_name(path.name + ".data")
    with data_path.open("wb") as file:
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes >= _INLINE_BYTES:
                value.const_value = _write_external(file, tensor, str(value.name), wrote)
            elif isinstance(tensor, StreamedTensor):
                value.const_value = tensor.in_memory()
        _sync(file)
    proto = ir.serde.serialize_model(model)
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        _sync(file)


def graph_weight_bytes(model: ir.Model) -> int:
    """Bytes that `write_graph` will report for this model."""
    sizes = (v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    return sum(size for size in sizes if size >= _INLINE_BYTES)


def write_embedding(checkpoint: Checkpoint, path: Path, wrote: ByteProgress) -> EmbeddingInfo:
    """Write the token embedding as raw rows in the checkpoint's own type, which loses nothing.

    Raises:
        ExportError: a value is not finite; it would surface in the prompts alone that use its token.
    """
    info = checkpoint.info(EMBEDDING)
    with path.open("wb") as file:
        for start in range(0, info.shape[0], _EMBEDDING_BLOCK_ROWS):
            block = checkpoint.read_stored(EMBEDDING, start, start + _EMBEDDING_BLOCK_ROWS)
            if not np.isfinite(float32_from_stored(block, info.dtype)).all():
                raise ExportError(
                    f"{checkpoint.path}: weight {EMBEDDING!r} holds NaN or infinity; "
                    "the checkpoint is damaged or its training diverged"
                )
            _write_blocks(file, [block], wrote)
        _sync(file)
    return EmbeddingInfo(path.name, _EMBEDDING_DTYPES[info.dtype], (info.shape[0], info.shape[1]))


def _write_external(
    file: BinaryIO, tensor: ir.TensorProtocol, name: str, wrote: ByteProgress
) -> ir.ExternalTensor:
    """Append `tensor` to `file`, aligned; returns the tensor that points there."""
    offset = _align(file)
    blocks = tensor.blocks() if isinstance(tensor, StreamedTensor) else [_raw_bytes(tensor)]
    length = _write_blocks(file, blocks, wrote)
    location, shape = Path(file.name).name, ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(location, offset, length, tensor.dtype, shape=shape, name=name)


def _write_blocks(file: BinaryIO, blocks: Iterable[NDArray[Any]], wrote: ByteProgress) -> int:
    length = 0
    for block in blocks:
        data = block.reshape(-1).view(np.uint8).data
        file.write(data)
        length += len(data)
        wrote(len(data))
    return length


def _raw_bytes(tensor: ir.TensorProtocol) -> NDArray[np.uint8]:
    """The bytes as ONNX stores them: little-endian, elements below 8 bits packed."""
    return np.frombuffer(tensor.tobytes(), dtype=np.uint8)


def _align(file: BinaryIO) -> int:
    offset = file.tell()
    padding = -offset % _ALIGNMENT
    file.write(b"\0" * padding)
    return offset + padding


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

"""Safetensors files: where each tensor lies, and its values, without mapping the file.

Mapped pages stay resident: an export that reads a 9B checkpoint through a map needs as much memory as the
checkpoint. So values are read with plain file reads at the offsets that the header gives. Format:
https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from zreward.errors import CheckpointError
from zreward.jsonfile import parse_json_object

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is the safetensors name (F32, F16, BF16), `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.size * _STORED_DTYPES[self.dtype].itemsize


def tensors_of_file(file: Path) -> list[TensorInfo]:
    """The tensors of one file, in the order of their data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: not a safetensors file, or truncated; copy it again")
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        header = parse_json_object(raw.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged safetensors header ({error})") from None
    header.pop("__metadata__", None)
    tensors = [_tensor_info(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.n_bytes))
    _check_layout(file, tensors, 8 + length, size)
    return tensors


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: damaged header entry of tensor {name!r}") from None
    if not isinstance(dtype, str) or dtype not in _STORED_DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the type {dtype!r}, which is not supported; "
            f"save the weights as one of {', '.join(_STORED_DTYPES)}"
        )
    if not isinstance(shape, list) or not all(is_count(n) for n in (*shape, begin, end)):
        raise CheckpointError(f"{file}: tensor {name!r} has a damaged shape or data_offsets")
    info = TensorInfo(name, dtype, tuple(shape), file, base + begin)
    if end - begin != info.n_bytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} spans {end - begin} bytes, its shape needs {info.n_bytes}"
        )
    return info


def _check_layout(file: Path, tensors: list[TensorInfo], base: int, file_size: int) -> None:
    """The tensors must fill the file without gap or overlap, as the format demands."""
    end = base
    for info in tensors:
        if info.offset != end:
            raise CheckpointError(
                f"{file}: the data of tensor {info.name!r} overlaps its neighbour or leaves a gap; "
                "save the weights again"
            )
        end += info.n_bytes
    if end > file_size:
        raise CheckpointError(f"{file}: ends inside its last tensors; the file is truncated, copy it again")
    if end < file_size:
        raise CheckpointError(
            f"{file}: {file_size - end} bytes after the last tensor; save the weights again"
        )


def read_stored(info: TensorInfo, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Rows `start` to `stop` of a tensor in its stored type, [stop − start, …]; bfloat16 as uint16 bits.

    Raises:
        CheckpointError: no such rows, or the file ends inside the tensor.
    """
    dtype = _STORED_DTYPES[info.dtype]
    rows = info.shape[0] if info.shape else 1
    stop = rows if stop is None else min(stop, rows)
    if not 0 <= start <= stop:
        raise CheckpointError(f"{info.file}: tensor {info.name!r} has {rows} rows, not {start} to {stop}")
    row_size = info.size // rows if rows else 0
    n_bytes = (stop - start) * row_size * dtype.itemsize
    with info.file.open("rb") as file:
        file.seek(info.offset + start * row_size * dtype.itemsize)
        data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise CheckpointError(
            f"{info.file}: ends inside tensor {info.name!r}; the file is truncated, copy it again"
        )
    values = np.frombuffer(data, dtype=dtype)
    return values.reshape((stop - start, *info.shape[1:]) if info.shape else ())


def float32_from_stored(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Float32 values of an array in a stored type (F32, F16, or BF16 as uint16 bits)."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value read from JSON is a whole number of at least zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

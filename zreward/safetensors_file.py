"""Safetensors files: where each tensor lies, and its values, without mapping the file.

Mapped pages stay resident: an export that reads a 9B checkpoint through a map needs as much memory as the
checkpoint. So values are read with plain file reads at the offsets that the header gives, and written the same
way, one tensor in memory at a time. Format: https://github.com/huggingface/safetensors (8 bytes little-endian
header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from zreward.errors import CheckpointError
from zreward.jsonfile import parse_json_object

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    **_FLOAT_DTYPES,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
"""How each type is held in memory; bfloat16 and the 8-bit floats, which numpy lacks, as their bits."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is the safetensors name (F32, BF16, I32, …), `offset` in bytes."""

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

    @property
    def is_float(self) -> bool:
        """Whether `float32_from_stored` reads it. Integers and 8-bit floats mean nothing without their scales."""
        return self.dtype in _FLOAT_DTYPES


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
    """Rows `start` to `stop` of a tensor in its stored type, [stop − start, …].

    Bfloat16 comes as uint16 bits, 8-bit floats as uint8 bits.

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
    """Float32 values of an array in a stored type (F64, F32, F16, or BF16 as uint16 bits).

    Raises:
        CheckpointError: the type is not one of these; the values are codes of a quantized checkpoint.
    """
    if dtype not in _FLOAT_DTYPES:
        raise CheckpointError(f"values of type {dtype} are no weights by themselves")
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: its safetensors type and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _STORED_DTYPES[self.dtype].itemsize


class SafetensorsWriter:
    """Writes a file whose tensors are known before their values, in any order of the values.

        with SafetensorsWriter(path, {"a": TensorSpec("F16", (2, 3))}) as writer:
            writer.write("a", values)

    Wide types come first in the file, so that every tensor is aligned. Leaving the block without an exception
    flushes the file to the disk.

    Raises:
        ValueError: on `write`, the values are not of the announced type and shape; on leaving, not all of a
            tensor was written.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = dict(specs)
        self._missing = {name: spec.n_bytes for name, spec in specs.items()}
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(specs, key=lambda n: (-_STORED_DTYPES[specs[n].dtype].itemsize, n)):
            spec, begin = specs[name], end
            end += spec.n_bytes
            self._offsets[name] = begin
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + end)

    def write(self, name: str, values: NDArray[Any], start: int = 0) -> None:
        """Write a tensor, or its rows from `start` on, in its stored type (bfloat16 as uint16 bits)."""
        spec = self._specs[name]
        rows, *row_shape = values.shape or (1,)
        announced_rows = spec.shape[0] if spec.shape else 1
        fits = tuple(row_shape) == spec.shape[1:] and 0 <= start <= start + rows <= announced_rows
        if values.dtype != _STORED_DTYPES[spec.dtype] or not fits:
            raise ValueError(
                f"{name}: got {values.dtype} {values.shape} from row {start} on, announced {spec.dtype} {spec.shape}"
            )
        row_bytes = spec.n_bytes // announced_rows if announced_rows else 0
        self._file.seek(self._base + self._offsets[name] + start * row_bytes)
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._missing[name] -= values.nbytes

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            missing = [name for name, n_bytes in self._missing.items() if n_bytes]
            if missing:
                raise ValueError(f"{self._file.name}: {missing[0]} was not written, or not once")
            self._file.flush()
            os.fsync(self._file.fileno())


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value read from JSON is a whole number of at least zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

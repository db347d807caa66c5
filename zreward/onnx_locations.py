"""Which external-data files an ONNX graph reads, found without the onnx package.

A graph names its weight files in `TensorProto.external_data`. A bundle must not read outside its own
directory, and the runtime that checks it has no onnx. This walks the protobuf wire format
(https://protobuf.dev/programming-guides/encoding/) along the fields of onnx.proto that lead to tensors,
and skips everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zreward.errors import BundleError

# message -> {field number: message of that field}, from onnx/onnx.proto
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELD_NUMBER = 2**29 - 1
_MAX_DEPTH = 64


def external_locations(path: Path) -> set[str]:
    """The `location` of every external tensor in the ONNX file at `path`.

    Raises:
        BundleError: the file is not readable or not a protobuf message.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return set(_locations(data, "Model", 0))
    except (IndexError, ValueError) as error:
        raise BundleError(f"{path}: not an ONNX file, or damaged ({error})") from None


def _locations(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs nested too deeply")
    children = _CHILDREN[message]
    entry: dict[int, str] = {}
    for number, value in _fields(data):
        if message == "Entry":
            entry[number] = bytes(value).decode("utf-8")
        elif number in children:
            yield from _locations(value, children[number], depth + 1)
    if entry.get(1) == "location":
        yield entry.get(2, "")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of one message, as (field number, content)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if not 1 <= number <= _MAX_FIELD_NUMBER:
            # The parser of ONNX Runtime drops the bits above 32 and would see another field than this one.
            raise ValueError(f"field number {number} is out of range")
        if wire_type == _BYTES:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("a field ends beyond the file")
            yield number, data[position : position + length]
            position += length
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
    if position != len(data):
        raise ValueError("a field ends beyond the file")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")

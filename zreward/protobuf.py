"""The protobuf wire format (https://protobuf.dev/programming-guides/encoding/), as far as ONNX files need it.

The runtime has no onnx package. What it must know about a graph, or change in one, is found by walking along the
fields of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELD_NUMBER = 2**29 - 1


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: of the field.
        content: of a length-delimited field (a message, a string, bytes); None for numbers.
        raw: all of the field, its key included.
    """

    number: int
    content: memoryview | None
    raw: memoryview


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of one message, in their order.

    Raises:
        ValueError, IndexError: it is not a message.
    """
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if not 1 <= number <= _MAX_FIELD_NUMBER:
            # The parser of ONNX Runtime drops the bits above 32 and would see another field than this one.
            raise ValueError(f"field number {number} is out of range")
        content = None
        if wire_type == _BYTES:
            length, position = _varint(data, position)
            content = data[position : position + length]
            position += length
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if position > len(data):
            raise ValueError("a field ends beyond the file")
        yield Field(number, content, data[start:position])


def encoded(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _encoded_varint(number << 3 | _BYTES) + _encoded_varint(len(content)) + content


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


def _encoded_varint(value: int) -> bytes:
    encoded_bytes = bytearray()
    while value > 0x7F:
        encoded_bytes.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded_bytes, value])

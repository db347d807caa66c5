"""TFRecord files of tf.train.Example messages, without TensorFlow.

A record is framed as

    uint64  length of the data, little-endian
    uint32  masked CRC-32C of these eight bytes
    bytes   the data
    uint32  masked CRC-32C of the data

(tensorflow/core/lib/io/record_writer.h). A CRC is masked by rotating it right by 15 bits and adding 0xa282ead8
(tensorflow/core/lib/hash/crc32c.h). Both are checked, so a cut or altered file is noticed at the record where it
happened. The message is parsed by protobuf with a descriptor that is built here
(tensorflow/core/example/feature.proto): an example maps names to lists of bytes, floats or integers.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from zreward.errors import UsageError

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_CRC32C_REVERSED = 0x82F63B78


def data_of_tfrecord(path: Path) -> Iterator[bytes]:
    """The data of each record, one at a time.

    Raises:
        UsageError: the file is no TFRecord, or is cut or altered.
    """
    with path.open("rb") as stream:
        number = 1
        while (data := _read_record(stream, f"{path}, record {number}")) is not None:
            yield data
            number += 1


def _read_record(stream: BinaryIO, where: str) -> bytes | None:
    header = stream.read(_HEADER.size)
    if not header:
        return None
    if len(header) < _HEADER.size:
        raise UsageError(f"{where}: the file is cut short here")
    length, crc = _HEADER.unpack(header)
    if crc != masked_crc32c(header[:8]):
        raise UsageError(
            f"{where}: the checksum of its length is wrong; this is no TFRecord file, or an altered one"
        )
    data = stream.read(length)
    footer = stream.read(_CRC.size)
    if len(data) < length or len(footer) < _CRC.size:
        raise UsageError(f"{where}: the file is cut short here")
    if _CRC.unpack(footer)[0] != masked_crc32c(data):
        raise UsageError(f"{where}: the checksum of its data is wrong; the file is damaged")
    return data


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord stores it."""
    crc = 0xFFFFFFFF
    table = _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc_table() -> tuple[int, ...]:
    entries = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (_CRC32C_REVERSED if entry & 1 else 0)
        entries.append(entry)
    return tuple(entries)


def features_of_example(data: bytes, where: str) -> dict[str, list[Any]]:
    """The features of a tf.train.Example: lists of bytes, floats or integers by name.

    Raises:
        UsageError: `data` is no such message, or protobuf is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UsageError(f"{where}: TFRecord files need protobuf: pip install 'zreward[train]'") from None
    try:
        example = _example_class().FromString(data)
    except DecodeError:
        raise UsageError(f"{where}: its data is no tf.train.Example") from None
    found = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        found[name] = list(getattr(feature, kind).value) if kind else []
    return found


@functools.cache
def _example_class() -> Any:
    from google.protobuf import (
        descriptor_pb2,
        descriptor_pool,
        message_factory,
        text_format,
    )

    file = text_format.Parse(_EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("zreward.Example"))


_EXAMPLE_PROTO = """
name: "zreward/example.proto" package: "zreward" syntax: "proto3"
message_type {
  name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT }
}
message_type {
  name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".zreward.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".zreward.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".zreward.Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  field {
    name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".zreward.Features.FeatureEntry"
  }
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".zreward.Feature" }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".zreward.Features" }
}
"""

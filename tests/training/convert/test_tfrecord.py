"""TFRecord framing and its checksums, and the messages in it, against bytes put together by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.training.convert.support import example_bytes, framed
from zreward.errors import UsageError
from zreward.training.convert.tfrecord import data_of_tfrecord, features_of_example, masked_crc32c


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),  # the check value of CRC-32C
        (b"\x00" * 32, 0x8A9136AA),  # these four are in RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_checksums(data: bytes, crc: int) -> None:
    rotated = int(f"{crc:032b}"[-15:] + f"{crc:032b}"[:-15], 2)
    assert masked_crc32c(data) == (rotated + 0xA282EAD8) % 2**32


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    path.write_bytes(framed(b"one") + framed(b"") + framed(b"three" * 1000))
    assert list(data_of_tfrecord(path)) == [b"one", b"", b"three" * 1000]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    first, second = framed(b"one"), framed(b"three")
    for end in range(len(first) + 1, len(first) + len(second)):
        path.write_bytes((first + second)[:end])
        with pytest.raises(UsageError, match=r"a\.tfrecord, record 2: the file is cut short here"):
            list(data_of_tfrecord(path))


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    whole = framed(b"some data")
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 0x10
        path.write_bytes(altered)
        with pytest.raises(UsageError, match=r"record 1: the checksum of its (length|data) is wrong"):
            list(data_of_tfrecord(path))


def test_features() -> None:
    found = features_of_example(example_bytes({"name": "é", "score": 0.25, "map": b"\xff\x00"}), "here")
    assert found == {"name": ["é".encode()], "score": [0.25], "map": [b"\xff\x00"]}


def test_features_of_other_kinds() -> None:
    """Floats that are not packed, integers, and a feature with no list: all of them are in the format."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def entry(name: bytes, feature: bytes) -> bytes:
        return field(1, field(1, name) + field(2, feature))

    unpacked = bytes([1 << 3 | 5]) + struct.pack("<f", 1.5) + bytes([1 << 3 | 5]) + struct.pack("<f", 2.5)
    data = field(
        1, entry(b"f", field(2, unpacked)) + entry(b"i", field(3, field(1, b"\x07"))) + entry(b"n", b"")
    )
    assert features_of_example(data, "here") == {"f": [1.5, 2.5], "i": [7], "n": []}


def test_other_messages() -> None:
    with pytest.raises(UsageError, match=r"here: its data is no tf\.train\.Example"):
        features_of_example(b"\x0a\x05abc", "here")

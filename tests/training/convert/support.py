"""Small sets in the published layouts, made by the tests."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from zreward.contract import ScoreContract
from zreward.training.convert.records import Request
from zreward.training.convert.tfrecord import masked_crc32c
from zreward.training.convert.write import Summary, Target, convert_dataset, images_folder
from zreward.training.data import LabelledPair, TrainingSet, load_pairs, load_training_set

CONTRACT = ScoreContract.default()


def encoded(shade: int, form: str = "PNG") -> bytes:
    """A small image; equal shades are equal bytes."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), (shade, 10, 20)).save(stream, form)
    return stream.getvalue()


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (number, 0, 0)).save(path)


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 2) -> Path:
    parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    return path


def hugging_face_image(shade: int) -> dict[str, Any]:
    return {"bytes": encoded(shade), "path": None}


def tfrecord(*examples: Mapping[str, Any]) -> bytes:
    """Examples of texts and floats, encoded here byte by byte, framed as TensorFlow does."""
    return b"".join(framed(example_bytes(example)) for example in examples)


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def example_bytes(example: Mapping[str, Any]) -> bytes:
    """Protocol buffers' wire format: a tag, and for tag type 2 a length and that many bytes."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    entries = b""
    for name, value in example.items():
        if isinstance(value, float):
            feature = field(2, field(1, struct.pack("<f", value)))
        else:
            feature = field(1, field(1, value.encode() if isinstance(value, str) else value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def _varint(value: int) -> bytes:
    encoded_bytes = []
    while value > 0x7F:
        encoded_bytes.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded_bytes, value])


class Job:
    """A conversion into `data.jsonl` (and `pairs.jsonl`) of a folder, and what came out of it."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data.jsonl"
        self.pairs = folder / "pairs.jsonl"

    def run(
        self,
        name: str,
        source: Path,
        *,
        images: Path | None = None,
        dimension: str | None = None,
        prompts: Path | None = None,
        pairs: bool = False,
        replace: bool = False,
        limit: int | None = None,
        skip_missing: bool = False,
    ) -> Summary:
        request = Request(source, images or images_folder(name, source, self.data), dimension, prompts)
        target = Target(self.data, self.pairs if pairs else None, replace)
        return convert_dataset(name, request, target, limit=limit, skip_missing=skip_missing)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.data.read_text(encoding="utf-8").splitlines()]

    def pair_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.pairs.read_text(encoding="utf-8").splitlines()]

    def loaded(self) -> TrainingSet:
        """As training opens it, under the default contract."""
        return load_training_set(self.data, CONTRACT)

    def loaded_pairs(self) -> list[LabelledPair]:
        return load_pairs(self.pairs, self.loaded())

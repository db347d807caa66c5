"""JSONL files of (prompt, image) pairs: what `zreward score --input` and `zreward eval` read.

A line is an object with `prompt`, `image` (a path, relative to the folder of the file) and optionally

    id            a string or an integer, handed through
    scores        the annotated score per dimension, which data sets have
    annotations   what each annotator said per dimension, as a list of scores or as counts by score; a dimension that
                  has these and no score gets their aggregate (`zreward.annotations`)

Lines with the same prompt are candidates of one prompt. Other keys are errors, since a misspelt one would be ignored
silently. Each line has a digest, by which an answer can later be matched with the line that it answers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from zreward.annotations import Histogram
from zreward.errors import UsageError, ZrewardError
from zreward.jsonfile import parse_json_object

MAX_LINE_BYTES = 1 << 20
"""Longer lines are errors, so that a file without line breaks is not read into memory."""

KNOWN_KEYS = ("prompt", "image", "id", "scores", "annotations")


class LineError(ZrewardError):
    """A line is not a pair of a prompt and an image."""


@dataclass(frozen=True)
class Line:
    """One line of a JSONL file, not yet parsed.

    Attributes:
        number: from 1.
        digest: 16 hex digits of the SHA-256 of the bytes without the line break, so that a missing last
            line break may be added later.
        text: the bytes; None where there are more than `MAX_LINE_BYTES`.
        end: offset in the file after this line.
    """

    number: int
    digest: str
    text: bytes | None
    end: int


@dataclass(frozen=True)
class Pair:
    """A prompt and the path of an image; `scores` and `annotations` have the dimensions that the line has."""

    prompt: str
    image: Path
    scores: Mapping[str, float]
    annotations: Mapping[str, Histogram] = field(default_factory=dict)
    id: str | int | None = None


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """The lines of a file opened in binary mode, one at a time and each of bounded size."""
    for number in itertools.count(1):
        text = stream.readline(MAX_LINE_BYTES + 1)
        if not text:
            return
        digest = hashlib.sha256(text.rstrip(b"\r\n"))
        too_long = len(text) > MAX_LINE_BYTES
        piece = text
        while not piece.endswith(b"\n") and (piece := stream.readline(MAX_LINE_BYTES)):
            digest.update(piece.rstrip(b"\r\n"))
        yield Line(number, digest.hexdigest()[:16], None if too_long else text, stream.tell())


def parse_line(line: Line) -> dict[str, Any]:
    """The JSON object of a line, its keys not yet checked (see `pair_from_object`).

    Raises:
        LineError: the line is too long, not UTF-8, or not one JSON object.
    """
    if line.text is None:
        raise LineError(f"the line is longer than {MAX_LINE_BYTES:,} bytes; is a line break missing?")
    try:
        return parse_json_object(line.text.decode())
    except (ValueError, RecursionError) as error:
        raise LineError(f"not a JSON object: {error}") from None


def pair_from_object(item: Mapping[str, Any], folder: Path) -> Pair:
    """The pair that a line's object describes; image paths are taken from `folder`.

    Raises:
        LineError: a key is unknown or missing, or a value has the wrong type.
    """
    unknown = sorted(item.keys() - set(KNOWN_KEYS))
    if unknown:
        raise LineError(f"unknown key {unknown[0]!r}; known are {', '.join(KNOWN_KEYS)}")
    for key in ("prompt", "image"):
        if key not in item:
            raise LineError(f"the key {key!r} is missing")
        if not isinstance(item[key], str):
            raise LineError(f"{key!r} must be a string; found {type(item[key]).__name__}")
    if not isinstance(item.get("id", ""), str | int):
        raise LineError(f"'id' must be a string or an integer; found {type(item['id']).__name__}")
    scores = item.get("scores", {})
    if not isinstance(scores, dict) or not all(_is_score(value) for value in scores.values()):
        raise LineError("'scores' must be an object with one finite number per dimension")
    annotations = _annotations(item.get("annotations", {}))
    aggregates = {name: histogram.aggregate for name, histogram in annotations.items()}
    return Pair(item["prompt"], folder / item["image"], aggregates | scores, annotations, item.get("id"))


def read_labelled_pairs(path: Path) -> Iterator[tuple[Line, Pair]]:
    """The lines of a data set with their pairs.

    Raises:
        UsageError: there is no such file, or one of its lines is not a pair with scores. An evaluation on
            part of a data set would look like one on the whole, so no line is passed over.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such data set; expected JSONL with prompt, image and scores a line")
    with path.open("rb") as stream:
        for line in read_lines(stream):
            try:
                pair = pair_from_object(parse_line(line), path.parent)
            except LineError as error:
                raise UsageError(f"{path}, line {line.number}: {error}") from None
            if not pair.scores:
                raise UsageError(f"{path}, line {line.number}: no 'scores'; an evaluation needs labels")
            yield line, pair


def _annotations(value: object) -> dict[str, Histogram]:
    if not isinstance(value, dict):
        raise LineError("'annotations' must be an object with the scores of each dimension")
    found = {}
    for name, raw in value.items():
        try:
            found[name] = Histogram.from_json(raw)
        except ValueError as error:
            raise LineError(f"'annotations' of {name!r}: {error}") from None
    return found


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

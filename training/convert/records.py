"""What a converter is given, what it yields, and how a field of a source is read.

A converter sees rows (`Row`) whose fields are checked when they are read, so that every complaint names the file, the
record and the field. It yields a `Record` for each, or says why there is none: `LeftOut` where the set itself has no
label there, `Missing` where a file of the user is not there. `write` numbers the outcomes and turns them into lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zreward.errors import UsageError

LABEL_LOW, LABEL_HIGH = 1.0, 5.0
"""The scale that every label is mapped to: the first and the last bin of the default contract."""

_DECIMALS = 6
"""Labels are rounded to these, since a set's float32 ratings carry noise beyond them."""

Annotations = list[float] | dict[str, float]


class Scale(NamedTuple):
    """The lowest and the highest rating of a set."""

    low: float
    high: float

    def label(self, rating: float) -> float:
        """`rating` moved linearly onto 1 … 5."""
        share = (rating - self.low) / (self.high - self.low)
        return round(LABEL_LOW + share * (LABEL_HIGH - LABEL_LOW), _DECIMALS)


SHARE = Scale(0.0, 1.0)
"""Of the votes of a comparison: the label of an image is 1 + 4 · its share."""


class Item(NamedTuple):
    """One image of a record, with labels from 1 to 5 per dimension.

    Attributes:
        side: names the image within its record, "" where it is the only one.
        annotations: as `zreward.annotations` reads them.
    """

    side: str
    image: Path
    scores: Mapping[str, float]
    annotations: Mapping[str, Annotations]


class Record(NamedTuple):
    """Images of one prompt that the set judges together."""

    prompt: str
    items: tuple[Item, ...]


class LeftOut(NamedTuple):
    """A record that the set itself gives no label to."""

    reason: str


class Missing(NamedTuple):
    """A record that needs something which is not there, such as a prompt."""

    what: str


Outcome = Record | LeftOut | Missing


@dataclass(frozen=True)
class Request:
    """What a converter works on.

    Attributes:
        source: a file, or a folder of files.
        images: the folder that image paths are relative to, or into which images are written.
        dimension: the dimension of a preference, or of a set's overall rating.
        prompts: file of prompts by image name, for the set that has none.
    """

    source: Path
    images: Path
    dimension: str | None = None
    prompts: Path | None = None

    @property
    def voted(self) -> str:
        """The dimension of a preference set, which `write` asks for before it starts."""
        if not self.dimension:
            raise UsageError("a preference needs the name of its dimension")
        return self.dimension


@dataclass(frozen=True)
class Row:
    """One record of a source.

    Attributes:
        where: the file and the record's number in it, from 1.
        values: its fields.
        columns: all fields of the file, where only some of them were read.
    """

    where: str
    values: Mapping[str, Any]
    columns: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            found = ", ".join(self.columns or map(str, self.values)) or "none"
            raise self.error(f"the field {name!r} is missing; found {found}")
        if self.values[name] is None:
            raise self.error(f"the field {name!r} is empty")
        return self.values[name]

    def error(self, message: str) -> UsageError:
        """`message` with the place it is about, to be raised."""
        return UsageError(f"{self.where}: {message}")

    def text(self, name: str) -> str:
        """A string that can be written as UTF-8."""
        return self._text(self[name], name)

    def texts(self, name: str) -> list[str]:
        """A list of such strings."""
        return [self._text(value, name) for value in self._list(name)]

    def number(self, name: str) -> float:
        """A finite number."""
        return self._number(self[name], name)

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers."""
        return [self._number(value, name) for value in self._list(name)]

    def label(self, name: str, scale: Scale) -> float:
        """A rating on `scale`, moved onto 1 … 5."""
        return self._label(self[name], name, scale)

    def labels(self, name: str, scale: Scale) -> list[float]:
        """The ratings of several annotators, each moved onto 1 … 5."""
        values = self._list(name)
        if not values:
            raise self.error(f"{name!r} has no ratings")
        return [self._label(value, name, scale) for value in values]

    def image_bytes(self, name: str) -> bytes:
        """Encoded image: bytes, or the object with `bytes` that Hugging Face stores images as."""
        value = self[name]
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes) or not data:
            raise self.error(f"{name!r} holds no image bytes; the version of the set with images is needed")
        return data

    def rows(self, name: str) -> Iterator[Row]:
        """The objects in a list."""
        for number, value in enumerate(self._list(name), 1):
            yield self._row(value, f"{name}, entry {number}")

    def row(self, name: str) -> Row:
        """The object in a field."""
        return self._row(self[name], name)

    def _row(self, value: object, name: str) -> Row:
        if not isinstance(value, Mapping):
            raise self.error(f"{name!r} must be an object; found {type(value).__name__}")
        return Row(f"{self.where}, {name}", value)

    def _list(self, name: str) -> list[Any]:
        value = self[name]
        if not isinstance(value, list):
            raise self.error(f"{name!r} must be a list; found {type(value).__name__}")
        return value

    def _text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{name!r} must be text; found {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"{name!r} holds half of a surrogate pair, which is no text") from None
        return value

    def _number(self, value: object, name: str) -> float:
        """A number, or its numeral as CSV has it."""
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            raise self.error(f"{name!r} must be a number; found {value!r}") from None
        if not math.isfinite(number):
            raise self.error(f"{name!r} is {number}, which is no rating")
        return number

    def _label(self, value: object, name: str, scale: Scale) -> float:
        rating = self._number(value, name)
        if not scale.low <= rating <= scale.high:
            raise self.error(
                f"{name!r} is {rating:g}, off the set's scale from {scale.low:g} to {scale.high:g}"
            )
        return scale.label(rating)


def fields_with_overall(fields: Mapping[str, str], overall: str, dimension: str | None) -> dict[str, str]:
    """Columns by dimension, with the set's overall rating under `dimension` where the caller names one.

    Raises:
        UsageError: the set rates that dimension itself.
    """
    if dimension is not None and dimension in fields:
        raise UsageError(
            f"{dimension!r} is what the set's {fields[dimension]} is; give its {overall} another name, or leave out "
            "--dimension"
        )
    return dict(fields) | ({dimension: overall} if dimension else {})


def voted_item(side: str, image: Path, dimension: str, wins: float, losses: float) -> Item:
    """An image that won and lost so many votes of its comparison; a tie is half of each.

    Its score is 1 + 4 · share of the votes; the votes themselves are counts at 5 and at 1.
    """
    score = SHARE.label(wins / (wins + losses))
    votes = {"1": _plain(losses), "5": _plain(wins)}
    return Item(side, image, {dimension: score}, {dimension: votes})


def _plain(count: float) -> float:
    return int(count) if count == int(count) else count

"""What annotators said of one image in one dimension, before it is one number.

The raw form is a list of scores, `[3.5, 4, 4]`, or an object of counts by score, `{"3.5": 1, "4": 2}`, which data
sets publish as histograms. Both become a `Histogram`. Its aggregate is the paper's label: the highest and the lowest
score dropped, the mean of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Histogram:
    """Scores with how often each was given.

    Attributes:
        scores: distinct and increasing.
        counts: as many, each > 0; shares are allowed where a data set publishes nothing else.
    """

    scores: tuple[float, ...]
    counts: tuple[float, ...]

    @staticmethod
    def from_json(value: Any) -> Histogram:
        """Read a list of scores or an object of counts by score.

        Raises:
            ValueError: it is neither, it is empty, or a number in it is not usable.
        """
        if isinstance(value, Mapping):
            pairs = [(_number(float, score), _number(None, count)) for score, count in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            pairs = [(_number(None, score), 1.0) for score in value]
        else:
            raise ValueError(f"expected a list of scores or counts by score, found {type(value).__name__}")
        total: dict[float, float] = {}
        for score, count in pairs:
            if count < 0:
                raise ValueError(f"a count is {count:g}; counts cannot be negative")
            total[score] = total.get(score, 0.0) + count
        kept = sorted((score, count) for score, count in total.items() if count > 0)
        if not kept:
            raise ValueError("nobody gave a score")
        return Histogram(tuple(score for score, _ in kept), tuple(count for _, count in kept))

    @property
    def n(self) -> float:
        """How many scores were given."""
        return sum(self.counts)

    @property
    def aggregate(self) -> float:
        """The mean without one highest and one lowest score; of fewer than three scores, of all of them."""
        counts = list(self.counts)
        if self.n >= 3:
            _drop_one(counts, range(len(counts)))
            _drop_one(counts, range(len(counts) - 1, -1, -1))
        weighted = sum(score * count for score, count in zip(self.scores, counts, strict=True))
        return weighted / sum(counts)

    def mapped(self, low: float, high: float, to_low: float = 1.0, to_high: float = 5.0) -> Histogram:
        """The same votes with the scale from `low` to `high` moved linearly onto the other one."""
        scores = [to_low + (score - low) * (to_high - to_low) / (high - low) for score in self.scores]
        pairs = sorted(zip(scores, self.counts, strict=True))
        return Histogram(tuple(score for score, _ in pairs), tuple(count for _, count in pairs))

    def to_json(self) -> dict[str, float]:
        """Counts by score, as `from_json` reads them."""
        return {f"{score:g}": count for score, count in zip(self.scores, self.counts, strict=True)}


def _drop_one(counts: list[float], order: range) -> None:
    """Take one vote away, from the first score on; shares of a vote are taken from several scores."""
    left = 1.0
    for index in order:
        taken = min(left, counts[index])
        counts[index] -= taken
        left -= taken
        if left <= 0:
            return


def _number(convert: type[float] | None, value: Any) -> float:
    """A finite number; with `convert` also from its text, as keys of JSON objects are."""
    try:
        if convert is None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number

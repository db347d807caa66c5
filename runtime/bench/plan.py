"""What a benchmark measures, checked before any work."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zreward.errors import UsageError
from zreward.image import MAX_SOURCE_PIXELS
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.backends.providers import check_options

MIN_REPETITIONS = 10
WARM_UP = 2
"""Repetitions of each configuration that are not counted: the first ones make the runtime's buffers."""

_MOST = {"candidates": 1024, "threads": 1024}
_MOST_SECONDS = 3600.0


@dataclass(frozen=True)
class Configuration:
    """One point of the sweep.

    Attributes:
        provider: as it was asked for.
        threads: as they were asked for; None lets the backend choose.
        image_size: side of the square test image in pixels.
        candidates: images of one prompt that are scored at once.
    """

    provider: str
    threads: int | None
    image_size: int
    candidates: int

    @property
    def label(self) -> str:
        """For people: `512×512, 4 candidates, 2 threads, cpu`."""
        size = f"{self.image_size}×{self.image_size}"
        many = f"{self.candidates} candidate" + "s" * (self.candidates != 1)
        return ", ".join([size, many, threads_label(self.threads), self.provider])


@dataclass(frozen=True)
class BenchPlan:
    """A sweep over four axes, and how long each point of it is measured.

    Attributes:
        image_sizes: sides of the square test images in pixels.
        candidates: numbers of images of one prompt.
        threads: thread counts; None lets the backend choose.
        providers: as for `Scorer.open`.
        repetitions: at least this many of each configuration are measured,
        min_seconds: and for at least this long.
        starts: processes that are started for each provider and thread count, to time a start.
        separate: also measure what it takes when nothing is shared: one full pass for each question.
        gpu: use of a GPU, as text for `GpuOptions.parse`.

    Raises:
        UsageError: an axis is empty or repeats itself, or a value is out of range.
    """

    image_sizes: tuple[int, ...] = (256, 512)
    candidates: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    providers: tuple[str, ...] = ("auto",)
    repetitions: int = MIN_REPETITIONS
    min_seconds: float = 3.0
    starts: int = 3
    separate: bool = False
    gpu: str = ""

    def __post_init__(self) -> None:
        for name in ("image_sizes", "candidates", "threads", "providers"):
            _check_axis(name, getattr(self, name))
        for name, most in _MOST.items():
            over = [value for value in getattr(self, name) if value is not None and value > most]
            if over:
                raise UsageError(f"{name} {over[0]} is more than {most}")
        for size in self.image_sizes:
            if size * size > MAX_SOURCE_PIXELS:
                raise UsageError(
                    f"image size {size} makes {size * size:,} pixels, more than the {MAX_SOURCE_PIXELS:,} that the "
                    f"runtime reads; use at most {math.isqrt(MAX_SOURCE_PIXELS)}"
                )
        gpu = GpuOptions.parse(self.gpu)
        for provider in self.providers:
            check_options(provider, gpu)
        if self.repetitions < MIN_REPETITIONS:
            raise UsageError(
                f"{self.repetitions} repetitions are too few for a spread; use {MIN_REPETITIONS} or more"
            )
        if not 0 <= self.min_seconds <= _MOST_SECONDS:
            raise UsageError(f"min-seconds must be between 0 and {_MOST_SECONDS:.0f}, not {self.min_seconds}")
        if not 1 <= self.starts <= 100:
            raise UsageError(f"starts must be between 1 and 100, not {self.starts}")

    def sessions(self) -> Iterator[tuple[str, int | None]]:
        """Each provider and thread count: what a process of its own measures."""
        return itertools.product(self.providers, self.threads)

    def configurations(self, provider: str, threads: int | None) -> list[Configuration]:
        """What one process measures, in order."""
        sizes = itertools.product(self.image_sizes, self.candidates)
        return [Configuration(provider, threads, size, candidates) for size, candidates in sizes]

    def only(self, provider: str, threads: int | None) -> BenchPlan:
        """The part of one process."""
        return dataclasses.replace(self, providers=(provider,), threads=(threads,))


def threads_label(threads: int | None) -> str:
    """For people: `2 threads`."""
    if threads is None:
        return "default threads"
    return f"{threads} thread" + "s" * (threads != 1)


def _check_axis(name: str, values: Sequence[int | str | None]) -> None:
    what = name.replace("_", " ")
    if not values:
        raise UsageError(f"{what}: at least one value is needed")
    for value in values:
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{what} must be at least 1, not {value}")
        if values.count(value) > 1:
            raise UsageError(f"{what}: {value} is given more than once")

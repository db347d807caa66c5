"""Times of the stages of a score, each beside its bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zreward.runtime.bench.plan import WARM_UP
from zreward.runtime.bench.report import Timing
from zreward.runtime.bench.stages import STAGES, Tokens, durations, numbered_prompt, picture, tokens_of
from zreward.runtime.conformance.roofline import Bound, DeviceLimits, stage_bounds
from zreward.runtime.conformance.stages import Subject

_LARGEST_SIDE = 512

_INCLUDES = {
    "nothing_kept": ("vision", "system_text", "prompt", "image_prefix", "questions"),
    "new_prompt": ("vision", "prompt", "image_prefix", "questions"),
    "same_prompt": ("vision", "image_prefix", "questions"),
}
"""Stages with a bound that a score end to end includes."""


@dataclass(frozen=True)
class StageTime:
    """One stage.

    Attributes:
        stage: a key of `zreward.runtime.bench.stages.STAGES`.
        samples_ms: one for each repetition.
        median_ms: of them, and `iqr_ms` is their interquartile range.
        bound: None for what runs no graph.
    """

    stage: str
    samples_ms: tuple[float, ...]
    median_ms: float
    iqr_ms: float
    bound: Bound | None

    @staticmethod
    def of(stage: str, samples_ms: Sequence[float], bound: Bound | None) -> StageTime:
        timing = Timing.of(samples_ms)
        return StageTime(stage, timing.samples_ms, timing.median_ms, timing.iqr_ms, bound)

    @property
    def title(self) -> str:
        return STAGES[self.stage]

    @property
    def share(self) -> float | None:
        """The bound as a share of the median."""
        if self.bound is None or self.bound.bound_ms is None:
            return None
        return self.bound.bound_ms / self.median_ms


@dataclass(frozen=True)
class Times:
    """Of one image of `image_side` pixels a side, which reads so many `tokens`."""

    image_side: int
    tokens: Tokens
    stages: tuple[StageTime, ...]


def timed(
    subject: Subject, limits: DeviceLimits, repetitions: int, *, on_gpu: bool, heard: Callable[[int], None]
) -> Times:
    """Time a score of one square image, as large as the contract's budget, and at most 512 pixels a side.

    Args:
        limits: of the device, for the bounds.
        repetitions: that count, after those that warm up.
        on_gpu: see `stage_bounds`.
        heard: is called with the number of repetitions that are done.
    """
    side = min(_LARGEST_SIDE, math.isqrt(subject.engine.contract.image.max_pixels))
    image = picture(side)
    samples: dict[str, list[float]] = {}
    for number in range(WARM_UP + repetitions):
        heard(number)
        for stage, duration in durations(subject.scorer, numbered_prompt(number), [image]).items():
            samples.setdefault(stage, []).append(duration)
    heard(WARM_UP + repetitions)
    tokens = tokens_of(subject.scorer, image)
    bounds = dict(stage_bounds(subject.bundle, tokens, limits, on_gpu=on_gpu))
    bounds |= {stage: _sum([bounds[part] for part in parts]) for stage, parts in _INCLUDES.items()}
    stages = tuple(
        StageTime.of(stage, samples[stage][WARM_UP:], bounds.get(stage))
        for stage in STAGES
        if stage in samples
    )
    return Times(side, tokens, stages)


def _sum(bounds: list[Bound]) -> Bound:
    """Of stages that follow each other; None where one of them is not known."""

    def total(name: str) -> float | None:
        values = [getattr(bound, name) for bound in bounds]
        return None if None in values else sum(values)

    operations = total("operations")
    return Bound(
        operations=None if operations is None else int(operations),
        n_bytes=sum(bound.n_bytes for bound in bounds),
        products_ms=total("products_ms"),
        memory_ms=total("memory_ms"),
        bound_ms=total("bound_ms"),
    )

"""The charts of the evaluation page, as SVG text: see `zreward.charts` for how they get their colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from zreward.calibration import Group
from zreward.charts import rect, svg, text
from zreward.evaluation import Floats
from zreward.metrics import Interval

Range = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 32, 12, 26, 42
_PLANE = 258  # side of the plane of predictions and labels, in SVG units
_WIDTH, _HEIGHT = _LEFT + _PLANE + _RIGHT, _TOP + _PLANE + _BOTTOM
_STEPS = 16  # from end to end of a side of the plane, for counting: quarter points on a scale from 1 to 5


class Bar(NamedTuple):
    """One figure of a row: its colour's class, its value (None: undefined) and its interval."""

    kind: str
    value: float | None
    interval: Interval | None


def score_range(*values: Floats, bins: Sequence[float] | None) -> Range:
    """A range of scores that holds the scale of the bins and all values, in whole points."""
    known = np.concatenate([*values, np.asarray(bins or [], np.float64)])
    low, high = math.floor(known.min() + 1e-9), math.ceil(known.max() - 1e-9)
    return float(low), float(max(high, low + 1))


def reliability_chart(groups: Sequence[Group], scale: Range, label: str) -> str:
    """Mean label against mean prediction of each group, with two standard errors to each side."""
    parts = _plane(scale)
    for group in groups:
        x, y = _across(group.predicted, scale), _up(group.label, scale)
        if group.standard_error is not None:
            reach = 2 * group.standard_error
            low, high = (
                _up(float(np.clip(v, *scale)), scale) for v in (group.label - reach, group.label + reach)
            )
            parts.append(f'<path class="bound" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(f'<circle class="after" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    return svg(_WIDTH, _HEIGHT, parts, label)


def density_chart(predicted: Floats, truth: Floats, scale: Range, label: str) -> str:
    """How many images lie where: the area of a disc is the count in its cell of the plane."""
    # Labels often stand on half points, which are to be in the middle of their cells.
    centres = np.linspace(*scale, _STEPS + 1)
    half = (centres[1] - centres[0]) / 2
    edges = np.append(centres - half, centres[-1] + half)
    counts, _, _ = np.histogram2d(predicted, truth, bins=(edges, edges))
    largest = _PLANE / _STEPS / 2
    parts = _plane(scale)
    for column, row in np.argwhere(counts > 0):
        radius = max(1.0, largest * math.sqrt(counts[column, row] / counts.max()))
        x, y = _across(centres[column], scale), _up(centres[row], scale)
        parts.append(f'<circle class="after" fill-opacity=".75" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
    return svg(_WIDTH, _HEIGHT, parts, label)


def bar_chart(rows: Sequence[tuple[str, Sequence[Bar]]], zero: float, label: str) -> str:
    """Bars from `zero` for the figures of each row, with their intervals and values.

    The axis ends at 1 and begins at `zero`, or lower where a value or an interval does.
    """
    width, left, right, thick, gap, top = 340, 86, 46, 13, 12, 8
    lows = [v for _, bars in rows for bar in bars for v in _extent(bar)]
    start = min([zero, *(math.floor(10 * v) / 10 for v in lows)])
    tall = sum(len(bars) * (thick + 2) + gap for _, bars in rows)

    def across(value: float) -> float:
        return left + (value - start) / (1 - start) * (width - left - right)

    parts = []
    step = next(size for size in (0.1, 0.2, 0.5) if (1 - start) / size < 7.5)
    for tick in step * np.arange(math.ceil(start / step - 1e-9), round(1 / step) + 1):
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + tall}"/>')
        parts.append(text(x, top + tall + 18, f"{tick:.1f}".replace("-", "−"), "middle"))
    y = top + gap / 2
    for name, bars in rows:
        parts.append(text(left - 8, y + len(bars) * (thick + 2) / 2 + 4, name, "end", "label"))
        for bar in bars:
            parts += _bar(bar, across, zero, y, thick)
            shown = "–" if bar.value is None else f"{bar.value:.3f}".replace("-", "−")
            parts.append(text(width - 4, y + thick - 2, shown, "end"))
            y += thick + 2
        y += gap
    return svg(width, math.ceil(top + tall + 26), parts, label)


def _bar(bar: Bar, across: Callable[[float], float], zero: float, y: float, thick: float) -> list[str]:
    if bar.value is None:
        return []
    ends = sorted((across(zero), across(bar.value)))
    parts = [rect(ends[0], y, ends[1] - ends[0], thick, bar.kind)]
    if bar.interval:
        low, high, middle = across(bar.interval.low), across(bar.interval.high), y + thick / 2
        path = (
            f"M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 3:.1f}v6M{high:.1f} {middle - 3:.1f}v6"
        )
        parts.append(f'<path class="bound" d="{path}"/>')
    return parts


def _extent(bar: Bar) -> list[float]:
    ends = [bar.interval.low] if bar.interval else []
    return ends if bar.value is None else [*ends, bar.value]


def _plane(scale: Range) -> list[str]:
    """Axes of predictions (across) and labels (up) over one range, with the diagonal where both agree."""
    left, right, top, floor = _LEFT, _LEFT + _PLANE, _TOP, _TOP + _PLANE
    parts = []
    for tick in _ticks(scale):
        x, y = _across(tick, scale), _up(tick, scale)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        parts.append(text(left - 11, y + 4, f"{tick:g}", "end"))
        parts.append(text(x, floor + 21, f"{tick:g}", "middle"))
    parts.append(f'<line class="zero" x1="{left}" x2="{right}" y1="{floor}" y2="{top}"/>')
    parts.append(text(left, top - 12, "label", "start"))
    parts.append(text(right, floor + 37, "predicted", "end"))
    return parts


def _ticks(scale: Range) -> list[float]:
    """Round numbers, at most nine of them."""
    low, high = scale
    sizes = (round_size * 10**power for power in range(12) for round_size in (1, 2, 5))
    step = next((size for size in sizes if (high - low) / size <= 8), high - low)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _across(value: float, scale: Range) -> float:
    return _LEFT + (value - scale[0]) / (scale[1] - scale[0]) * _PLANE


def _up(value: float, scale: Range) -> float:
    return _TOP + (scale[1] - value) / (scale[1] - scale[0]) * _PLANE

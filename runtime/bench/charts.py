"""The charts of the benchmark's page, as small SVG texts; `zreward.charts` has what they are made of.

Each is of one provider and thread count, so that a page has as many as the sweep has of these. The figures behind them
stand in the page's tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from zreward.charts import RIGHT, TOP, rect, svg, text, y_axis
from zreward.runtime.bench.report import Result
from zreward.runtime.bench.stages import PARTS, STAGES

ENDS = ("nothing_kept", "new_prompt", "same_prompt")
"""The stages that are drawn as lines and points."""

_WIDTH, _HEIGHT, _LEFT = 320, 190, 50
_FLOOR = _HEIGHT - 40
_POINTS = 240  # of one stage; more would only cover each other

Line = tuple[str, Sequence[tuple[float, float]]]
"""Class and points of a line, in the units of its axes."""


def size_chart(results: Sequence[Result]) -> str:
    """Milliseconds end to end against the side of the image, with quartiles, and the bound of each."""
    label = "Median milliseconds end to end by image size; the summary has the figures"
    return _line_chart(
        results, lambda r: r.configuration.image_size, lambda r: 1, "side of the image, pixels", label
    )


def candidates_chart(results: Sequence[Result]) -> str:
    """Milliseconds end to end for one candidate, against how many are scored at once."""
    label = "Median milliseconds end to end per candidate, by their number; the summary has the figures"
    return _line_chart(
        results,
        lambda r: r.configuration.candidates,
        lambda r: r.configuration.candidates,
        "candidates at once",
        label,
    )


def stage_chart(results: Sequence[Result], name: Callable[[Result], str]) -> str:
    """Medians of the stages that follow each other, as one column for each configuration; its bound is a mark."""
    totals = [sum(timing.median_ms for timing in result.parts.values()) for result in results]
    parts, ceiling = _axis(max(totals))
    step = (_WIDTH - _LEFT - RIGHT) / len(results)
    wide = min(0.62 * step, 56)
    for index, result in enumerate(results):
        x, y = _LEFT + step * (index + 0.5) - wide / 2, float(_FLOOR)
        for stage, timing in result.parts.items():
            tall = timing.median_ms / ceiling * (_FLOOR - TOP)
            y -= tall
            parts.append(rect(x, y, wide, tall, stage.replace("_", "-")))
        bounds = [timing.bound_ms for timing in result.parts.values() if timing.bound_ms is not None]
        if bounds:
            level = _FLOOR - sum(bounds) / ceiling * (_FLOOR - TOP)
            parts.append(
                f'<path class="bound" d="M{x - 4:.1f} {level:.1f}h{wide + 8:.1f}"/>',
            )
        parts.append(text(x + wide / 2, _FLOOR + 18, name(result), "middle"))
    return svg(
        _WIDTH, _HEIGHT - 14, parts, "Median milliseconds of each stage; the stage tables have the figures"
    )


def sample_chart(result: Result) -> str:
    """Every sample end to end in the order taken: what drifts and what jumps is seen here."""
    samples = {name: result.stages[name].samples_ms for name in ENDS}
    parts, ceiling = _axis(max(max(values) for values in samples.values()))
    n = result.repetitions
    for name, values in samples.items():
        for index in range(0, n, math.ceil(n / _POINTS)):
            x = _LEFT + (index + 0.5) / n * (_WIDTH - _LEFT - RIGHT)
            y = _FLOOR - values[index] / ceiling * (_FLOOR - TOP)
            parts.append(f'<circle class="{name.replace("_", "-")}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>')
    parts.append(text(_LEFT, _FLOOR + 18, "1", "start"))
    parts.append(text(_WIDTH - RIGHT, _FLOOR + 18, f"{n:,}", "end"))
    parts.append(text((_LEFT + _WIDTH - RIGHT) / 2, _FLOOR + 18, "repetition", "middle"))
    spread = ", ".join(f"{STAGES[name]} {min(v):.3g} to {max(v):.3g} ms" for name, v in samples.items())
    return svg(_WIDTH, _HEIGHT - 14, parts, f"Samples in the order taken: {spread}")


def stage_classes() -> list[tuple[str, str]]:
    """Classes and titles of the stages of `stage_chart`, for its key."""
    return [(name.replace("_", "-"), title) for name, title in PARTS.items()]


def _line_chart(
    results: Sequence[Result],
    across: Callable[[Result], int],
    divisor: Callable[[Result], int],
    axis: str,
    label: str,
) -> str:
    """Medians of `ENDS` over `divisor`, with quartiles, and their bounds."""
    results = sorted(results, key=across)
    first, last = across(results[0]), across(results[-1])

    def x_of(result: Result) -> float:
        share = (across(result) - first) / max(last - first, 1)
        return _LEFT + 14 + share * (_WIDTH - _LEFT - RIGHT - 28)

    tallest = max(r.stages[name].p90_ms / divisor(r) for r in results for name in ENDS)
    parts, ceiling = _axis(tallest)

    def y_of(value: float) -> float:
        return _FLOOR - min(value / ceiling, 1) * (_FLOOR - TOP)

    for name in ENDS:
        kind = name.replace("_", "-")
        timed = [(x_of(r), r.stages[name], divisor(r)) for r in results]
        bounds = [(x, y_of(t.bound_ms / n)) for x, t, n in timed if t.bound_ms is not None]
        parts.append(_path(bounds, f"{kind} line bound"))
        parts.append(_path([(x, y_of(t.median_ms / n)) for x, t, n in timed], f"{kind} line"))
        for x, timing, n in timed:
            low, high = timing.quartiles
            parts.append(
                f'<path class="{kind} line" d="M{x:.1f} {y_of(low / n):.1f}V{y_of(high / n):.1f}"/>'
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y_of(timing.median_ms / n):.1f}" r="3.5"/>'
            )
    taken = -math.inf
    for result in results:
        shown, x = f"{across(result):,}", x_of(result)
        if x - 4 * len(shown) > taken:  # a label that would cover its neighbour is left out
            parts.append(text(x, _FLOOR + 18, shown, "middle"))
            taken = x + 4 * len(shown)
    parts.append(text((_LEFT + _WIDTH - RIGHT) / 2, _HEIGHT - 6, axis, "middle"))
    return svg(_WIDTH, _HEIGHT, parts, label)


def _path(points: Iterable[tuple[float, float]], kind: str) -> str:
    steps = [f"{x:.1f} {y:.1f}" for x, y in points]
    return f'<path class="{kind}" d="M{"L".join(steps)}"/>' if len(steps) > 1 else ""


def _axis(highest: float) -> tuple[list[str], float]:
    """An axis of milliseconds from 0 to a round number above `highest`, and that number."""
    step = _round_above(highest / 4)
    ceiling = step * math.ceil(highest / step)
    ticks = list(itertools.takewhile(lambda v: v <= ceiling * 1.001, (step * i for i in itertools.count())))
    digits = max(0, -math.floor(math.log10(step)))
    parts = y_axis(_FLOOR, ticks, ceiling, lambda v: f"{v:,.{digits}f}", width=_WIDTH, left=_LEFT)
    return parts, ceiling


def _round_above(value: float) -> float:
    """1, 2 or 5 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= value * 0.9999)

"""The charts of the report page, as SVG text.

Colours come from the page's style sheet by class, so that a chart follows the reader's light or dark setting. Each
chart is small and is laid out by the page in columns: text keeps its size on a phone. Every chart has a text
alternative, and the figures behind it stand in the page's tables or captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from zreward.charts import BOTTOM, LEFT, RIGHT, TOP, number, rect, svg, text, y_axis
from zreward.quant.drift import Example, LayerFacts

Point = tuple[str, float, float]
"""Label, bits per weight and mean KL in nats of one quantized model."""

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""

_WIDTH = 320  # of the small charts, in SVG units


def distribution_chart(bins: Sequence[float], example: Example) -> str:
    """Probability of each bin, before and after side by side, with a mark at each expected score."""
    height = 150
    floor, tallest = height - BOTTOM, max(*example.before, *example.after)
    ceiling = min(1.0, math.ceil(tallest * 10 + 0.2) / 10)
    step = (_WIDTH - LEFT - RIGHT) / len(bins)
    parts = y_axis(floor, [0.0, ceiling / 2, ceiling], ceiling, lambda v: f"{v:.0%}", width=_WIDTH)
    for index, value in enumerate(bins):
        x = LEFT + step * index
        for offset, probs, kind in ((0.12, example.before, "before"), (0.5, example.after, "after")):
            tall = probs[index] / ceiling * (floor - TOP)
            parts.append(rect(x + offset * step, floor - tall, 0.38 * step, tall, kind))
        parts.append(text(x + step / 2, floor + 20, f"{value:g}", "middle"))
    means = []
    for probs, kind in ((example.before, "before"), (example.after, "after")):
        mean = sum(b * p for b, p in zip(bins, probs, strict=True))
        x = LEFT + step * (_bin_position(bins, mean) + 0.5)
        parts.append(f'<path class="{kind} mark" d="M{x:.1f} {floor + 1} l4.5 7 h-9 z"/>')
        means.append(number(mean))
    return svg(_WIDTH, height, parts, f"Probability per score; mean {means[0]} before, {means[1]} after")


def histogram_chart(edges: Sequence[float], counts: Sequence[int], label: str) -> str:
    """Counts of Δμ; the outermost bars hold everything beyond the axis."""
    height = 130
    floor, tallest = height - BOTTOM, max(1, *counts)
    parts = y_axis(floor, [0, tallest], tallest, lambda v: f"{v:,.0f}", width=_WIDTH)
    scale = (_WIDTH - LEFT - RIGHT) / (edges[-1] - edges[0])
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        tall = count / tallest * (floor - TOP)
        # A bar of one item among thousands would be thinner than a pixel.
        tall = max(tall, 1.5) if count else 0.0
        x = LEFT + (low - edges[0]) * scale
        parts.append(rect(x + 0.5, floor - tall, (high - low) * scale - 1, tall, "after"))
    middle = LEFT - edges[0] * scale
    parts.append(f'<line class="zero" x1="{middle:.1f}" x2="{middle:.1f}" y1="{TOP}" y2="{floor}"/>')
    parts.append(text(LEFT, floor + 18, f"≤ {number(edges[0], 1)}", "start"))
    parts.append(text(middle, floor + 18, "0", "middle"))
    parts.append(text(_WIDTH - RIGHT, floor + 18, f"≥ {number(edges[-1], 1)}", "end"))
    return svg(_WIDTH, height, parts, label)


def sensitivity(layer: LayerFacts) -> float:
    """What layers are sorted and drawn by: the measured divergence, else the error of the weights."""
    return next((v for v in (layer.sensitivity_kl, layer.relative_error) if v is not None), 0.0)


def size_chart(points: Sequence[Point], current: str) -> str:
    """Mean KL (logarithmic) against bits per weight; the point named `current` is filled.

    A model without any drift has no place on a logarithmic axis; it is drawn on the bottom line.
    """
    width, height, left, right = 400, 300, 58, 12
    top, bottom = 30, height - 44
    low, high = _decades([kl for _, _, kl in points if kl > 0])
    first, last = min(b for _, b, _ in points), max(b for _, b, _ in points)
    start, stop = math.floor(first - 0.25), math.ceil(last + 0.25)

    def place(bits: float, kl: float) -> tuple[float, float]:
        share = (math.log10(kl) - low) / (high - low) if kl > 0 else 0.0
        across = (bits - start) / (stop - start)
        return left + across * (width - left - right), bottom - share * (bottom - top)

    parts = []
    for power in range(low, high + 1):
        y = place(start, 10.0**power)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - 6, y + 4, number(10.0**power, 2 if power < -4 else 1), "end"))
    for tick in range(start, stop + 1, max(1, (stop - start) // 8)):
        parts.append(text(place(tick, 1.0)[0], bottom + 18, str(tick), "middle"))
    parts.append(text((left + width - right) / 2, height - 6, "bits per quantized weight", "middle"))
    parts.append(text(left, 14, "mean KL, nats", "start"))
    # Labels may cover neither a point nor another label.
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in (place(bits, kl) for _, bits, kl in points)]
    for label, bits, kl in points:
        x, y = place(bits, kl)
        kind = "after" if label == current else "open"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(_free_label(x, y, label, width, taken))
    return svg(width, height, parts, "Mean KL against bits per weight; the table has the figures", "wide")


def _free_label(x: float, y: float, label: str, width: int, taken: list[Box]) -> str:
    """The label of a point, beside it and as near as the boxes in `taken` allow; its own box joins them."""
    long = 7.2 * len(label)
    places = [(side, shift) for shift in (0, 6, -6, 14, -14, 28, -28, 42) for side in ("start", "end")]
    boxes = {}
    for side, shift in places:
        x1 = x + 10 if side == "start" else x - 10 - long
        boxes[side, shift] = (x1, y + shift - 7, x1 + long, y + shift + 7)
    free = [p for p in places if boxes[p][0] >= 0 and boxes[p][2] <= width and not _overlaps(boxes[p], taken)]
    side, shift = free[0] if free else places[0]
    taken.append(boxes[side, shift])
    reach = 1 if side == "start" else -1
    leader = ""
    if abs(shift) > 6:
        leader = (
            f'<path class="leader" d="M{x + 5 * reach:.1f} {y:.1f}L{x + 10 * reach:.1f} {y + shift:.1f}"/>'
        )
    return leader + text(x + 11 * reach, y + shift + 4, label, side, "label")


def _overlaps(box: Box, taken: Iterable[Box]) -> bool:
    return any(box[0] < x2 and x1 < box[2] and box[1] < y2 and y1 < box[3] for x1, y1, x2, y2 in taken)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values, at least one decade."""
    if not values:
        return -3, 0
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _bin_position(bins: Sequence[float], score: float) -> float:
    """Where `score` lies among the bins, in bins from the first one."""
    index = max(i for i, b in enumerate(bins[:-1]) if i == 0 or b <= score)
    return index + (score - bins[index]) / (bins[index + 1] - bins[index])

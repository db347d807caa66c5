"""What charts are drawn with: SVG text whose colours a page chooses by class, and numbers as a page writes them.

A chart without colours of its own follows the reader's light or dark setting. Each has a text alternative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 38, 8, 12, 28
"""What a small chart leaves for its axes, in SVG units."""


def number(value: float, digits: int = 3) -> str:
    """`value` with that many significant digits and a real minus sign; small values as 2.1×10⁻⁵."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}×10{power}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def cell_bar(share: float) -> str:
    """A horizontal bar over `share` of its table cell, marked where it exceeds 1; the next cell has the figure."""
    width, kind = 100 * min(max(share, 0.0), 1.0), "over" if share > 1 else "after"
    rect = f'<rect class="{kind}" width="{width:.1f}%" height="100%" rx="2"/>'
    return f'<svg class="cell" aria-hidden="true">{rect}</svg>'


def y_axis(
    floor: float,
    ticks: Iterable[float],
    ceiling: float,
    shown: Callable[[float], str],
    *,
    width: float,
    left: float = LEFT,
    top: float = TOP,
) -> list[str]:
    """Lines and labels at `ticks` of an axis from 0, at `floor`, to `ceiling`, at `top`."""
    parts = []
    for tick in ticks:
        y = floor - tick / ceiling * (floor - top)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - 5, y + 4, shown(tick), "end"))
    return parts


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle of class `kind`."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    """Words that begin, are centred or end at `x`, by `anchor`: start, middle or end."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def svg(width: int, height: int, parts: Iterable[str], label: str, kind: str = "small") -> str:
    """The chart, with `label` as its text alternative."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )

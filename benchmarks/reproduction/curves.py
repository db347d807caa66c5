"""Learning curves: HPA on the validation split over the course of each run, a panel for each size of model."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from html import escape
from pathlib import Path

from zreward.jsonfile import write_text
from zreward.training.folder import CONFIG_FILE
from zreward.training.log import LOG_FILE

Curve = dict[float, list[float]]
"""HPA of each seed by the share of the run's steps that are done."""

COLOURS = {
    "sft": "#b45309",
    "rewarddance": "#64748b",
    "grpo": "#7e22ce",
    "grpo-parsed": "#c084fc",
    "gdso": "#1d5fd1",
    "gdso-parsed": "#7dd3fc",
    "opd": "#15803d",
    "risd": "#be123c",
}
_PANEL, _HEIGHT, _LEFT, _TOP, _BOTTOM, _NAMES, _LINE = 420, 340, 56, 44, 44, 100, 15


def write_curves(work: Path, path: Path) -> None:
    """Draw the curves of all runs in `work` as SVG; nothing is written where none was validated."""
    found = curves(work)
    if found:
        write_text(path, as_svg(found))


def curves(work: Path) -> dict[str, dict[str, Curve]]:
    """By size and method."""
    found: dict[str, dict[str, Curve]] = defaultdict(dict)
    for path in sorted(work.glob(f"seed-*/*/run/{LOG_FILE}")):
        size, method = path.parent.parent.name.split("-", 1)
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        total = json.loads((path.parent / CONFIG_FILE).read_text(encoding="utf-8"))["run"]["steps"]
        for event in events:
            if event["event"] == "validation" and event["overall"]["hpa"] is not None:
                curve = found[size].setdefault(method, defaultdict(list))
                curve[event["step"] / total].append(event["overall"]["hpa"])
    return dict(found)


def as_svg(found: dict[str, dict[str, Curve]]) -> str:
    values = [
        hpa for of_size in found.values() for curve in of_size.values() for s in curve.values() for hpa in s
    ]
    low, high = _bounds(values)
    width = len(found) * _PANEL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    teacher_first = sorted(found.items(), reverse=True)
    for number, (size, of_size) in enumerate(teacher_first):
        parts += _panel(number * _PANEL, size, of_size, low, high)
    return "".join(parts) + "</svg>\n"


def _panel(x0: float, size: str, of_size: dict[str, Curve], low: float, high: float) -> list[str]:
    left, right = x0 + _LEFT, x0 + _PANEL - _NAMES
    floor = _HEIGHT - _BOTTOM

    def x(share: float) -> float:
        return left + share * (right - left)

    def y(hpa: float) -> float:
        return floor - (hpa - low) / (high - low) * (floor - _TOP)

    parts = [_text(left, 20, f"{size} size: HPA on validation, mean of the seeds", "start", "#222")]
    ticks = round((high - low) / 0.02)
    for tick in range(ticks + 1):
        hpa = low + tick * 0.02
        parts.append(f'<path d="M{left} {y(hpa):.1f}H{right}" stroke="#e2e2e2"/>')
        parts.append(_text(left - 8, y(hpa) + 4, f"{hpa:.2f}", "end"))
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(x(share), floor + 18, f"{share:.0%}", "middle"))
    parts.append(_text((left + right) / 2, floor + 36, "share of the run's steps", "middle"))
    ends = []
    for method, curve in of_size.items():
        colour = COLOURS.get(method, "#333")
        means = [(x(share), y(statistics.mean(seeds))) for share, seeds in sorted(curve.items())]
        for share, seeds in sorted(curve.items()):
            parts += [
                f'<circle cx="{x(share):.1f}" cy="{y(hpa):.1f}" r="2" fill="{colour}" fill-opacity=".45"/>'
                for hpa in seeds
            ]
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in means)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        ends.append((means[-1][1], method, colour))
    return parts + _names(right + 10, ends, floor)


def _names(x: float, ends: list[tuple[float, str, str]], floor: float) -> list[str]:
    """The methods' names beside the ends of their curves, moved apart where they would overlap."""
    parts, last = [], -1e9
    places = []
    for height, method, colour in sorted(ends):
        last = max(height, last + _LINE)
        places.append((last, method, colour))
    over = max(0.0, places[-1][0] - floor) if places else 0.0
    for place, method, colour in places:
        parts.append(_text(x, place - over + 4, method, "start", colour))
    return parts


def _bounds(values: list[float]) -> tuple[float, float]:
    """Even hundredths around all values."""
    low, high = int(min(values) * 50) / 50, (int(max(values) * 50) + 1) / 50
    return low, high


def _text(x: float, y: float, words: str, anchor: str, colour: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

"""The figures of `latency.py` as a table and as a picture: seconds against image size, and against candidates.

    python benchmarks/latency.py build/random-0.8B --image-size 256,512,1024 --json build/latency.json …
    python benchmarks/latency_chart.py build/latency.json --svg docs/latency.svg

Each report may hold other sizes of the same systems. N candidates of one prompt are one image with nothing kept and
N − 1 with the states after the prompt kept, the system of the same name that ends in `-next`; a system without one is
drawn as it is. The table goes to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

COLOURS = {
    "zreward-int8": "#0f766e",
    "zreward-int4": "#5bb3a8",
    "openvino-int8": "#b7791f",
    "openvino-int4": "#dcb269",
    "llamacpp-bf16": "#6d4fa3",
    "llamacpp-q4_0": "#a893cf",
    "onnxruntime-int4": "#c0587e",
    "transformers": "#8a8f98",
}
CANDIDATES = (1, 2, 4, 8, 16)
WIDTH, HEIGHT, TOP, BOTTOM = 860, 400, 48, 350

Seconds = dict[str, dict[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--candidates-at", type=int, default=512, help="image size of the second panel")
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    seconds: Seconds = {}
    for path in arguments.reports:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for size in report["results"]:
            for name, system in size["systems"].items():
                seconds.setdefault(name, {})[size["image_size"]] = system["median_seconds"]
    print(table(seconds, arguments.candidates_at))
    if arguments.svg:
        arguments.svg.write_text(chart(seconds, arguments.candidates_at), encoding="utf-8")


def per_candidate(seconds: Seconds, name: str, size: int, n: int) -> float:
    """Seconds for each of n candidates of a prompt."""
    first = seconds[name][size]
    return (first + (n - 1) * seconds.get(f"{name}-next", {}).get(size, first)) / n


def table(seconds: Seconds, size: int) -> str:
    names = [name for name in COLOURS if name in seconds]
    sizes = sorted({side for name in names for side in seconds[name]})
    head = ["system", *(f"{side}×{side}" for side in sizes), f"16 candidates at {size}×{size}, each"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        cells = [f"{seconds[name][side]:.2f}" if side in seconds[name] else "–" for side in sizes]
        many = f"{per_candidate(seconds, name, size, 16):.2f}" if size in seconds[name] else "–"
        lines.append("| " + " | ".join([name, *cells, many]) + " |")
    return "\n".join(lines)


def chart(seconds: Seconds, size: int) -> str:
    names = [name for name in COLOURS if name in seconds]
    sides = sorted({side for name in names for side in seconds[name]})
    by_size = {name: sorted(seconds[name].items()) for name in names}
    by_candidates = {
        name: [(n, per_candidate(seconds, name, size, n)) for n in CANDIDATES]
        for name in names
        if size in seconds[name]
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13"><title>Seconds for four rubrics of one image, by image size and by candidates</title>'
        '<rect width="100%" height="100%" fill="#fff"/>',
        *panel(by_size, sides, 60, 370, "seconds an image, nothing kept", "side of the image, pixels"),
        *panel(
            by_candidates,
            list(CANDIDATES),
            450,
            705,
            f"seconds an image, {size}×{size}",
            "candidates of one prompt",
        ),
    ]
    for order, name in enumerate(names):
        y = TOP + 10 + 22 * order
        parts.append(f'<circle cx="735" cy="{y}" r="5" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="747" y="{y + 4}" fill="#333">{name.replace("-", " ")}</text>')
    return "".join(parts) + "</svg>\n"


def panel(
    lines: dict[str, list[tuple[int, float]]], ticks: list[int], left: int, right: int, title: str, axis: str
) -> list[str]:
    """Lines over a logarithmic scale of seconds; the ticks stand at equal distances."""
    values = [value for line in lines.values() for _, value in line]
    low, high = math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)
    step = (right - left) / len(ticks)

    def across(tick: int) -> float:
        return left + step * (ticks.index(tick) + 0.5)

    def up(value: float) -> float:
        return BOTTOM - (math.log10(value) - low) / (high - low) * (BOTTOM - TOP)

    parts = [f'<text x="{left}" y="24" fill="#555">{title}</text>']
    for power in range(-2, 4):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if low <= math.log10(value) <= high:
                parts.append(f'<path d="M{left} {up(value):.1f}H{right}" stroke="#e2e2e2"/>')
                parts.append(
                    f'<text x="{left - 8}" y="{up(value) + 4:.1f}" text-anchor="end" fill="#555">{value:g}</text>'
                )
    for tick in ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{BOTTOM + 20}" text-anchor="middle" fill="#555">{tick}</text>'
        )
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{BOTTOM + 40}" text-anchor="middle" fill="#555">{axis}</text>')
    for name, line in lines.items():
        points = [(across(tick), up(value)) for tick, value in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[name]}"/>' for x, y in points]
    return parts


if __name__ == "__main__":
    main()

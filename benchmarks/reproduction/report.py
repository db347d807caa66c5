"""The tables of a reproduction: means over seeds with their range, and whether the orderings came out."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.reproduction.curves import write_curves
from benchmarks.reproduction.orderings import Difference, differences
from benchmarks.reproduction.settings import STUDENT, TEACHER
from zreward.jsonfile import write_text

ROWS = ("zero-shot", "sft", "rewarddance", "grpo", "gdso", "opd", "risd", "grpo-parsed", "gdso-parsed")
HEAD = ("method", "PLCC", "SRCC", "HPA", "margin HPA", "tokens", "failed", "seeds")

Results = dict[str, dict[str, list[dict[str, Any]]]]


def write_report(work: Path, test: Path) -> Path:
    """Write `results.md` and `curves.svg` into the folder of the reproduction.

    Args:
        test: the labelled lines that the rows were judged on.
    """
    found = results(work)
    tables = [table(size.name, found[size.name]) for size in (TEACHER, STUDENT) if size.name in found]
    parts = [*tables, "\n".join(averaged(found)), orderings(differences(work, test))]
    text = "\n\n".join(part for part in parts if part)
    path = work / "results.md"
    write_text(path, text + "\n")
    write_curves(work, work / "curves.svg")
    print(text)
    return path


def results(work: Path) -> Results:
    """Results by size and name, one for every seed."""
    found: Results = defaultdict(lambda: defaultdict(list))
    for path in sorted(work.glob("seed-*/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["size"]][result["name"]].append(result)
    return found


def table(size: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"**{size} size**", "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [line(name, rows[name]) for name in ROWS if name in rows]
    return "\n".join(lines)


def line(name: str, seeds: list[dict[str, Any]]) -> str:
    figures = [spread([_overall(result, 1)[key] for result in seeds]) for key in _FIGURES]
    failed = statistics.mean(result["traces_1"]["failed"] for result in seeds)
    tokens = statistics.mean(result["traces_1"]["tokens"] for result in seeds)
    cells = [name, *figures, f"{tokens:.3g}", f"{failed:.1%}", str(len(seeds))]
    return f"| {' | '.join(cells)} |"


def averaged(found: Results) -> list[str]:
    """How much the mean of several traces adds, where it was measured."""
    lines = []
    for size, rows in found.items():
        for name, seeds in rows.items():
            for key in sorted(
                {key for result in seeds for key in result if key.startswith("traces_")} - {"traces_1"}
            ):
                traces = int(key.removeprefix("traces_"))
                hpa = spread([_overall(result, traces)["hpa"] for result in seeds if key in result])
                lines.append(f"- {size}-{name}, {traces} traces averaged: HPA {hpa}")
    return lines


def _overall(result: dict[str, Any], traces: int) -> dict[str, float | None]:
    """The row over all dimensions."""
    overall: dict[str, float | None] = result[f"traces_{traces}"]["agreement"][-1]
    return overall


_FIGURES = ("plcc", "srcc", "hpa", "margin_hpa")


def orderings(rows: list[Difference]) -> str:
    lines = [
        "| better? | than | HPA | HPA | difference in points (95 %) | by seed | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap, interval = 100 * (row.better - row.worse), row.interval
        by_seed = " ".join(f"{100 * value:+.2f}" for value in row.by_seed)
        verdict = {True: "yes", False: "reversed", None: "open"}[row.holds]
        cells = [
            row.claim.better,
            row.claim.worse,
            f"{row.better:.4f}",
            f"{row.worse:.4f}",
            f"{gap:+.2f} ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})",
            by_seed,
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    """Mean, and the lowest and highest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "undefined"
    mean = f"{statistics.mean(known):.4f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f} to {max(known):.3f})"

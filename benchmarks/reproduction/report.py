"""The tables of a reproduction, from the `result.json` of its experiments: means over seeds, with their range."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from zreward.jsonfile import write_text

ROWS = ("zero-shot", "sft", "rewarddance", "grpo", "gdso", "opd", "risd", "grpo-parsed", "gdso-parsed")
HEAD = ("method", "PLCC", "SRCC", "HPA", "margin HPA", "HPA, 4 traces", "failed", "seeds")

Results = dict[str, dict[str, list[dict[str, Any]]]]


def write_report(work: Path) -> Path:
    """Write `results.md` into the folder of the reproduction."""
    found = results(work)
    text = "\n\n".join(table(size, rows) for size, rows in found.items())
    path = work / "results.md"
    write_text(path, text + "\n")
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
    figures = [spread([result["one_trace"][-1][key] for result in seeds]) for key in _FIGURES]
    several = [result["several_traces"][-1]["hpa"] for result in seeds if "several_traces" in result]
    failed = statistics.mean(result["one_trace_failed"] for result in seeds)
    cells = [name, *figures, spread(several) if several else "–", f"{failed:.1%}", str(len(seeds))]
    return f"| {' | '.join(cells)} |"


_FIGURES = ("plcc", "srcc", "hpa", "margin_hpa")


def spread(values: list[float | None]) -> str:
    """Mean, and the lowest and highest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "undefined"
    mean = f"{statistics.mean(known):.4f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f} to {max(known):.3f})"

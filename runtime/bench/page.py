from __future__ import annotations

from pathlib import Path

from zreward.jsonfile import write_text
from zreward.runtime.bench.report import BenchReport


def write_page(path: Path, report: BenchReport) -> None:
    write_text(path, "")

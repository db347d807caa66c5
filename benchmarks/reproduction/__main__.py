"""Tables 2 and 3 of the paper at small scale: every method, three seeds, one command.

    python -m benchmarks.reproduction --work build/reproduction

Data and base models are made first (`zreward data benchmark`, `base.py`), then every method runs for every seed through
`zreward train`'s own functions, and each trained model is judged on the split `test` by its own way of answering. What
is finished in `--work` is not repeated, so the command can be stopped and started again. `report.py` writes the tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.reproduction.base import make_base
from benchmarks.reproduction.experiments import run_experiments
from benchmarks.reproduction.report import write_report
from benchmarks.reproduction.settings import settings_for
from zreward.synthetic.benchmark import write_benchmark


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/reproduction"))
    parser.add_argument("--only", choices=["data", "base", "methods", "report"], help="one part of it")
    parser.add_argument("--seeds", type=int, help="how many, fewer than the setting's")
    options = parser.parse_args()
    settings = settings_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    data = work / "data"
    parts = [options.only] if options.only else ["data", "base", "methods", "report"]
    if "data" in parts and not (data / "benchmark.json").is_file():
        write_benchmark(data, scale=settings.scale)
    if "base" in parts:
        for size in settings.sizes:
            make_base(size, settings, data, work)
    if "methods" in parts:
        run_experiments(settings, data, work, settings.seeds[: options.seeds])
    if "report" in parts:
        write_report(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())

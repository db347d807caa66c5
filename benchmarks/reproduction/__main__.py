"""Tables 2 and 3 of the paper at small scale: every method, three seeds, one command.

    python -m benchmarks.reproduction --work build/reproduction

Data and base models are made first (`zreward data benchmark`, `base.py`), then every method runs for every seed through
`zreward train`'s own functions, and each trained model is judged on the split `test` by its own way of answering. What
is finished in `--work` is not repeated, so the command can be stopped and started again. `report.py` writes the tables.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reproduction.base import make_base
from benchmarks.reproduction.experiments import first_lines, jobs
from benchmarks.reproduction.report import write_report
from benchmarks.reproduction.schedule import Job, run_jobs
from benchmarks.reproduction.settings import Settings, settings_for
from zreward.synthetic.benchmark import write_benchmark
from zreward.synthetic.dataset import SCENES_FILE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/reproduction"))
    parser.add_argument("--only", choices=["data", "base", "methods", "report"], help="one part of it")
    parser.add_argument("--seeds", type=int, help="how many, fewer than the setting's")
    parser.add_argument("--rows", help='some of the experiments, such as "teacher-gdso,student-risd"')
    parser.add_argument("--workers", type=int, help="experiments at a time, if not as many as cores")
    options = parser.parse_args()
    settings = settings_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = replace(settings, workers=options.workers or settings.workers)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    data = work / "data"
    parts = [options.only] if options.only else ["data", "base", "methods", "report"]
    if "data" in parts and not (data / "benchmark.json").is_file():
        shutil.rmtree(data, ignore_errors=True)  # what an interrupted run left; benchmark.json comes last
        write_benchmark(data, settings.scenes, scale=settings.scale)
    found = base_jobs(settings, data, work) if "base" in parts else []
    if "methods" in parts:
        found += chosen_jobs(settings, data, work, options)
    run_jobs(found, settings.workers)
    if "report" in parts:
        write_report(work, first_lines(data / "test" / SCENES_FILE, settings.test_images))
    return 0


def base_jobs(settings: Settings, data: Path, work: Path) -> list[Job]:
    found = []
    for size in settings.sizes:
        needed = [f"base {size.grown_from}"] if size.grown_from else []
        found.append(Job(f"base {size.name}", make_base, (size, settings, data, work)).after(needed))
    return found


def chosen_jobs(settings: Settings, data: Path, work: Path, options: argparse.Namespace) -> list[Job]:
    """The experiments of the chosen seeds, or of these the chosen rows."""
    found = jobs(settings, data, work, settings.seeds[: options.seeds])
    return [job for job in found if options.rows is None or job.name.split()[-1] in options.rows.split(",")]


if __name__ == "__main__":
    sys.exit(main())

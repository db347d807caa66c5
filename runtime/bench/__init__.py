"""`zreward bench`: how long a bundle takes on this machine, stage by stage and end to end, and what it could take.

    plan.py      what is measured: sizes, candidates, threads, providers
    run.py       the whole: a process for each provider and thread count, and the report that comes of it
    worker.py    that process: opens the bundle, scores once, and measures its configurations
    stages.py    what runs in a repetition: the one place that calls the engine and the scorer
    bound.py     operations of a stage, and the time they would take at the machine's own rate
    rates.py     that rate
    machine.py   processor, memory, versions
    report.py    the report as data; docs/bench.md has every field
    compare.py   several reports of one bundle
    tables.py, page.py   for people: Markdown, and one HTML page

docs/bench.md says what each figure means.
"""

from __future__ import annotations

from zreward.runtime.bench.machine import describe_machine
from zreward.runtime.bench.plan import BenchPlan
from zreward.runtime.bench.report import BenchReport
from zreward.runtime.bench.run import run_bench

__all__ = ["BenchPlan", "BenchReport", "describe_machine", "run_bench"]

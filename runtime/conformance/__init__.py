"""`zreward conformance`: proof, on the machine at hand, that a provider computes what ONNX Runtime computes on a CPU.

    plan.py         what is asked for
    run.py          the whole: reference, variants, checks, times, and the report that comes of it
    variants.py     what is examined: engines with and without plugins, found or built, or a provider as it is
    stages.py       golden inputs stage by stage, and how far they are from the reference
    shapes.py       sizes from the largest to the smallest, round and round, while memory is watched
    timing.py       times of the stages beside their bounds
    roofline.py     those bounds: operations, bytes, and what the device can do
    gpu.py          a GPU as its driver describes it
    tolerances.py   what is allowed, and why
    checks.py       one check and its verdict
    report.py       the report as data; docs/conformance.md has every field
    tables.py       the same for people

Nothing here knows a provider but by `zreward.runtime.backends`; only engines of TensorRT are asked for their layers.
"""

from __future__ import annotations

from zreward.runtime.conformance.plan import ConformancePlan
from zreward.runtime.conformance.report import ConformanceReport
from zreward.runtime.conformance.run import run_conformance

__all__ = ["ConformancePlan", "ConformanceReport", "run_conformance"]

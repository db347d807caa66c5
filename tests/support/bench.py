"""Reports of a benchmark that nobody ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from zreward.bundle import GraphWork, Work
from zreward.runtime.bench.bound import bound_ms, stage_operations
from zreward.runtime.bench.machine import Gpu, Machine
from zreward.runtime.bench.plan import BenchPlan, Configuration
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.report import BenchReport, BundleFacts, Result, Session, Start, Timing
from zreward.runtime.bench.stages import STAGES, Tokens

RATE = Rate(2, 900.0, 230.0, 460.0, "registers")
TOKENS = Tokens(patches=100, image=26, system=60, prompt=20, questions=(11, 12))
WORK = Work(GraphWork(500, 100, 0, 7, 5, 0, 0), GraphWork(3000, 0, 50, 11, 3, 70, 90))
MEDIANS = {
    "decode": 1.0,
    "vision": 3.0,
    "system_text": 7.0,
    "prompt": 2.0,
    "image_prefix": 2.0,
    "questions": 3.0,
    "nothing_kept": 18.0,
    "new_prompt": 11.0,
    "same_prompt": 9.0,
    "separate": 40.0,
}


def timing(median: float, *, n: int = 20, spread: float = 0.02, seed: int = 0) -> Timing:
    """Samples around `median`."""
    return Timing.of(median * (1 + spread * np.random.default_rng(seed).standard_normal(n)))


def result(one: Configuration, *, slower: float = 1.0, separate: bool = False, seed: int = 0) -> Result:
    """A result whose stages take `MEDIANS`, times the candidates and the area of the image."""
    scale = slower * one.candidates * (one.image_size / 120) ** 2
    counted = stage_operations(WORK, TOKENS, one.candidates)
    stages = {}
    for index, name in enumerate(STAGES):
        if name == "separate" and not separate:
            continue
        made = timing(scale * MEDIANS[name], seed=seed + index)
        operations = counted.get(name)
        bound = bound_ms(operations, RATE) if operations else None
        stages[name] = dataclasses.replace(made, operations=operations, bound_ms=bound)
    return Result.of(one, (one.image_size, one.image_size), TOKENS, stages, 100_000_000)


def report(
    sizes: Sequence[int] = (120,),
    candidates: Sequence[int] = (1,),
    threads: Sequence[int | None] = (2,),
    *,
    slower: float = 1.0,
    separate: bool = False,
    seed: int = 0,
    **changes: Any,
) -> BenchReport:
    """A report of that sweep."""
    plan = BenchPlan(tuple(sizes), tuple(candidates), tuple(threads), separate=separate)
    sessions, results = [], []
    for provider, count in plan.sessions():
        starts = (Start(0.2, 0.1, 0.05, 0.35), Start(0.3, 0.2, 0.1, 0.6))
        sessions.append(Session(provider, count, True, RATE, starts, 120_000_000))
        for one in plan.configurations(provider, count):
            results.append(result(one, slower=slower, separate=separate, seed=seed))
    fields: dict[str, Any] = {
        "date": "2026-11-21T12:00:00+00:00",
        "bundle": BundleFacts(
            "bundle", "ab" * 32, "judge", "cd" * 32, "cpu", "fp32", None, 3_000_000, 13_000_000
        ),
        "machine": Machine(
            "A processor",
            "x86_64",
            ("avx2",),
            "Linux",
            2,
            2,
            None,
            2**34,
            (Gpu("G", "1", "8 GiB"),),
            (0.1,) * 3,
        ),
        "versions": {"zreward": "0.1.0", "onnxruntime": "1.31.1"},
        "plan": plan,
        "prompt": "a red cube",
        "sessions": tuple(sessions),
        "results": tuple(results),
        **changes,
    }
    return BenchReport(**fields)

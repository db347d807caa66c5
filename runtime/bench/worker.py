"""One provider and thread count, measured in a process of its own: an honest start, an honest peak of memory.

The process that only times a start opens the bundle, scores one image and ends. The last one goes on to measure every
configuration.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zreward.child import Message, child_process, serve
from zreward.errors import BackendError, BenchError
from zreward.jsonfile import dataclass_from_json
from zreward.progress import Progress
from zreward.runtime import Scorer
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.bench.machine import peak_memory_bytes
from zreward.runtime.bench.measure import measure
from zreward.runtime.bench.plan import BenchPlan
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.report import Result, Start
from zreward.runtime.bench.stages import numbered_prompt, picture


@dataclass(frozen=True)
class Job:
    """What the child does.

    Attributes:
        bundle: its directory.
        plan: of one provider and thread count.
        rate: of products, for the bounds.
        spawned: when the child was started, by the monotonic clock that all processes share.
        only_start: it ends after the first score.
    """

    bundle: str
    plan: BenchPlan
    rate: Rate
    spawned: float
    only_start: bool


@dataclass(frozen=True)
class Measured:
    """What the child found; `results` are empty where it only started, `provider` is what ran the model."""

    start: Start
    results: tuple[Result, ...]
    peak_memory_bytes: int
    provider: str


def measure_in_child(
    bundle: Path, plan: BenchPlan, rate: Rate, progress: Progress, *, only_start: bool
) -> Measured:
    """Run a child.

    Raises:
        ZrewardError: what the child raised, as the same class.
        BackendError: the child died; the message has its last words.
    """
    job = Job(str(bundle), plan, rate, time.monotonic(), only_start)
    what = "measures"
    with child_process(
        "zreward.runtime.bench.worker", dataclasses.asdict(job), what=what, error=BackendError
    ) as messages:
        for message in messages:
            if "measured" in message:
                return dataclass_from_json(Measured, message["measured"], "measured", BenchError)
            progress(*message["progress"])
    raise BackendError(f"the process that {what} ended without a result")


def _work(data: dict[str, Any], say: Callable[[Message], None]) -> None:
    imported = time.monotonic()
    job = dataclass_from_json(Job, data, "job", BenchError)
    (provider,), (threads,) = job.plan.providers, job.plan.threads
    image = picture(job.plan.image_sizes[0])
    begun = time.monotonic()
    gpu = GpuOptions.parse(job.plan.gpu)
    with Scorer.open(job.bundle, provider=provider, threads=threads, gpu=gpu) as scorer:
        opened, ran_on = time.monotonic(), scorer.engine.opened.provider
        scorer.score(prompt=numbered_prompt(0), images=[image])
        scored = time.monotonic()
        waited = begun - imported  # the picture is ours, not the user's
        start = Start(
            import_s=imported - job.spawned,
            open_s=opened - begun,
            first_score_s=scored - opened,
            total_s=scored - job.spawned - waited,
        )
        peak = peak_memory_bytes()
        results: tuple[Result, ...] = ()
        if not job.only_start:
            rate = job.rate if ran_on == "cpu" else None  # it is the processor's
            results = measure(scorer, job.plan, rate, lambda *progress: say({"progress": progress}))
    peaks = [result.peak_memory_bytes or 0 for result in results]
    measured = Measured(start, results, max([peak, peak_memory_bytes(), *peaks]), ran_on)
    say({"measured": dataclasses.asdict(measured)})


if __name__ == "__main__":
    serve(_work)

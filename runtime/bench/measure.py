"""The configurations of one opened scorer, measured one after the other."""

from __future__ import annotations

import time

from zreward.bundle import Work
from zreward.progress import Progress
from zreward.runtime.bench.bound import bound_ms, stage_operations
from zreward.runtime.bench.machine import peak_memory_bytes, restart_peak_memory
from zreward.runtime.bench.plan import WARM_UP, BenchPlan, Configuration
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.report import Result, Timing
from zreward.runtime.bench.stages import Tokens, durations, measured_size, numbered_prompt, picture, tokens_of
from zreward.runtime.scorer import Scorer


def measure(
    scorer: Scorer, plan: BenchPlan, rate: Rate | None = None, progress: Progress | None = None
) -> tuple[Result, ...]:
    """Measure every image size and number of candidates of `plan`.

    Args:
        scorer: opened with the one provider and thread count of `plan`.
        rate: of products, for the bounds; None leaves them out.
        progress: hears how far each configuration is.
    """
    (provider,), (threads,) = plan.providers, plan.threads
    configurations = plan.configurations(provider, threads)
    return tuple(_measure(scorer, one, plan, rate, progress) for one in configurations)


def _measure(
    scorer: Scorer,
    configuration: Configuration,
    plan: BenchPlan,
    rate: Rate | None,
    progress: Progress | None,
) -> Result:
    image = picture(configuration.image_size)
    images, tokens = [image] * configuration.candidates, tokens_of(scorer, image)
    samples: dict[str, list[float]] = {}
    tells_peak = restart_peak_memory()
    started, repetition, done = time.monotonic(), -WARM_UP, 0.0
    while repetition < plan.repetitions or done < 1:
        if repetition == 0:
            started = time.monotonic()
        # A new prompt each time: the same one would come from the cache.
        prompt = numbered_prompt(repetition + WARM_UP + 1)
        for name, duration in durations(scorer, prompt, images, separate=plan.separate).items():
            if repetition >= 0:
                samples.setdefault(name, []).append(duration)
        repetition += 1
        waited = time.monotonic() - started
        done = min(repetition / plan.repetitions, waited / plan.min_seconds if plan.min_seconds else 1.0)
        if progress:
            progress(configuration.label, round(100 * min(max(done, 0.0), 1.0)), 100)
    return Result.of(
        configuration,
        measured_size(configuration.image_size, scorer.contract.image),
        tokens,
        _timings(samples, scorer.bundle.manifest.work, tokens, configuration.candidates, rate),
        peak_memory_bytes() if tells_peak else None,
    )


def _timings(
    samples: dict[str, list[float]], work: Work | None, tokens: Tokens, candidates: int, rate: Rate | None
) -> dict[str, Timing]:
    counted = {} if work is None else stage_operations(work, tokens, candidates)
    timings = {}
    for name, values in samples.items():
        operations = counted.get(name)
        bound = bound_ms(operations, rate) if operations and rate else None
        timings[name] = Timing.of(values, operations, bound)
    return timings

"""The whole benchmark: the machine's rate, a process for each provider and thread count, and the report."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from zreward.bundle import Bundle
from zreward.progress import Progress
from zreward.runtime.bench.machine import Machine, describe_machine, versions
from zreward.runtime.bench.plan import BenchPlan, threads_label
from zreward.runtime.bench.rates import Rate, kernels_run, measure_rate
from zreward.runtime.bench.report import BenchReport, BundleFacts, Result, Session
from zreward.runtime.bench.stages import PROMPT
from zreward.runtime.bench.worker import Measured, measure_in_child


def run_bench(path: Path, plan: BenchPlan, progress: Progress | None = None) -> BenchReport:
    """Measure the bundle at `path`.

    Raises:
        BundleError: it is no bundle, or altered.
        BackendError: the backend is missing, refuses the graphs, or a measuring process died.
    """
    report = progress or (lambda stage, done, total: None)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    bundle = Bundle.open(path)
    machine = describe_machine()  # before the work, so that the load is not our own
    rates = _rates(plan, report)
    sessions: list[Session] = []
    results: list[Result] = []
    on_gpu: list[str] = []
    for provider, threads in plan.sessions():
        session, measured = _session(path, plan.only(provider, threads), rates[threads], report)
        sessions.append(session)
        results += measured.results
        if measured.provider != "cpu" and provider not in on_gpu:
            on_gpu.append(provider)
    return BenchReport(
        date=date,
        bundle=BundleFacts.of(bundle),
        machine=machine,
        versions=versions(),
        plan=plan,
        prompt=PROMPT,
        sessions=tuple(sessions),
        results=tuple(results),
        notes=tuple(_notes(bundle, machine, plan, results, rates, on_gpu)),
    )


def _rates(plan: BenchPlan, report: Progress) -> dict[int | None, Rate]:
    stage, rates = "rate of the machine", {}
    for done, threads in enumerate(plan.threads):
        report(stage, done, len(plan.threads))
        rates[threads] = measure_rate(threads)
    report(stage, len(plan.threads), len(plan.threads))
    return rates


def _session(path: Path, plan: BenchPlan, rate: Rate, report: Progress) -> tuple[Session, Measured]:
    (provider,), (threads,) = plan.providers, plan.threads
    stage, starts = f"starts, {threads_label(threads)}, {provider}", []
    for done in range(plan.starts - 1):
        report(stage, done, plan.starts)
        starts.append(measure_in_child(path, plan, rate, report, only_start=True).start)
    report(stage, plan.starts - 1, plan.starts)
    last = measure_in_child(path, plan, rate, report, only_start=False)
    report(stage, plan.starts, plan.starts)
    session = Session(
        provider,
        threads,
        kernels_run(),
        rate,
        (*starts, last.start),
        peak_memory_bytes=last.peak_memory_bytes,
    )
    return session, last


def _notes(
    bundle: Bundle,
    machine: Machine,
    plan: BenchPlan,
    results: list[Result],
    rates: dict[int | None, Rate],
    on_gpu: list[str],
) -> list[str]:
    """What the figures alone would not say; `on_gpu` are the providers, as asked for, that ran on one."""
    notes = []
    resized = {r.configuration.image_size: (r.width, r.height) for r in results}
    for size, (width, height) in resized.items():
        if (width, height) != (size, size):
            notes.append(
                f"Images of {size}×{size} are resized to {width}×{height}, the budget of the contract: that is "
                "what the stages after decoding read."
            )
    over = [t for t in plan.threads if t is not None and t > machine.usable_cpus]
    if over:
        notes.append(
            f"There are {max(over)} threads, and usable processors: {machine.usable_cpus}. The rate is that of the "
            "processors."
        )
    if machine.load_average and machine.load_average[0] > machine.usable_cpus / 2:
        notes.append(
            f"The machine was busy before the work: a load of {machine.load_average[0]:.1f}, and usable processors: "
            f"{machine.usable_cpus}."
        )
    if bundle.manifest.work is None:
        notes.append(
            "There is no bound: the bundle does not count its operations. Export it again to have one."
        )
        return notes
    if on_gpu:
        notes.append(
            f"There is no bound for {', '.join(on_gpu)}: a GPU computes there, and the rate is the processor's."
        )
    on_cpu = set(plan.providers) - set(on_gpu)
    if on_cpu and any(rate.integer_gops is None for rate in rates.values()) and _multiplies_integers(bundle):
        notes.append(
            "There is no bound: the rate of 8-bit products can be measured with the compiled kernels only."
        )
    return notes


def _multiplies_integers(bundle: Bundle) -> bool:
    work = bundle.manifest.work
    return work is not None and bool(work.vision.integer_per_row or work.decoder.integer_per_row)

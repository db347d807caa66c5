"""The whole proof: variants, the reference, what was found of each, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from zreward.bundle import Bundle, check_files
from zreward.errors import BackendError
from zreward.progress import Progress
from zreward.runtime.backends import OpenGraphs
from zreward.runtime.bench.machine import Machine, describe_machine, resident_bytes, versions
from zreward.runtime.bench.report import BundleFacts
from zreward.runtime.conformance.examine import Task, examine, unopened
from zreward.runtime.conformance.gpu import GpuFacts, gpu_facts, memory_in_use
from zreward.runtime.conformance.plan import ConformancePlan
from zreward.runtime.conformance.reference import Expected, OpenRounded, check_installed, expected_of
from zreward.runtime.conformance.report import ConformanceReport, VariantReport
from zreward.runtime.conformance.roofline import DeviceLimits, limits_of_cpu, limits_of_gpu
from zreward.runtime.conformance.tolerances import tolerances_of
from zreward.runtime.conformance.variants import Build, Variant, prepared


def run_conformance(
    path: str | Path,
    plan: ConformancePlan,
    *,
    build: Build,
    open_rounded: OpenRounded | None = None,
    progress: Progress | None = None,
) -> ConformanceReport:
    """Examine a provider with the bundle at `path`.

    What a provider does wrong is a failed check of the report; what keeps it from being examined at all is raised.

    Args:
        plan: what is asked for.
        build: builds engines, for providers that run them.
        open_rounded: opens graphs in bfloat16 on the CPU; without it their stages have no reference.
        progress: hears of the work.

    Raises:
        BackendError: what the provider or the reference needs is missing, or it refuses the bundle.
        BundleError: the bundle or an engine is incomplete or altered.
        PluginError: the library of plugins was altered, or does not fit.
        UsageError: the plan does not fit the provider or the bundle.
        ZrewardError: whatever `build` raises.
    """
    report = progress or (lambda stage, done, total: None)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    bundle = Bundle.open(path)
    check_files(bundle)
    items = bundle.golden_items()
    check_installed()
    variants = prepared(bundle, plan, build)
    machine = describe_machine()
    gpu = None if plan.provider == "cpu" else gpu_facts(plan.gpu.device)
    tolerances = tolerances_of(bundle, on_gpu=gpu is not None)
    notes: list[str] = []
    limits = _limits(plan, machine, gpu, notes)
    with _open(variants[0]) as opened:
        report("reference", 0, 1)
        expected = expected_of(bundle, plan, items, open_rounded)
        report("reference", 1, 1)
        memory, whose = _memory(plan, gpu)
        task = Task(bundle, plan, items, expected, tolerances, limits, memory, whose, report)
        found = [examine(task, variants[0], opened)]
    found += [_examined(task, variant) for variant in variants[1:]]
    return ConformanceReport(
        date=date,
        provider=plan.provider,
        bundle=BundleFacts.of(bundle),
        machine=machine,
        gpu=gpu,
        versions=versions(),
        plan=plan,
        reference=expected.record,
        tolerances=tolerances,
        limits=limits,
        variants=tuple(found),
        folder=bundle.path,
        notes=(*notes, *_notes(bundle, machine, expected, found)),
    )


@contextmanager
def _open(variant: Variant) -> Iterator[OpenGraphs]:
    opened = variant.open()
    try:
        yield opened
    finally:
        with suppress(BackendError):  # of a GPU that failed before, which the report says
            opened.close()


def _examined(task: Task, variant: Variant) -> VariantReport:
    try:
        with _open(variant) as opened:
            return examine(task, variant, opened)
    except Exception as error:  # of opening: the variant before is worth a report
        return unopened(variant, error)


def _limits(plan: ConformancePlan, machine: Machine, gpu: GpuFacts | None, notes: list[str]) -> DeviceLimits:
    if gpu is None:
        return limits_of_cpu(machine, plan.threads)
    try:
        return limits_of_gpu(gpu, plan.gpu.device)
    except BackendError as error:
        notes.append(f"There are no bounds: the GPU could not be measured ({error}).")
        return DeviceLimits(gpu.name, {}, None, None, None)


def _memory(plan: ConformancePlan, gpu: GpuFacts | None) -> tuple[Callable[[], int | None], str]:
    """What tells how much memory is in use, and whose that is."""
    if gpu is None:
        return resident_bytes, "resident memory of the process"
    return (lambda: memory_in_use(plan.gpu.device)), "memory of the GPU in use by all processes"


def _notes(
    bundle: Bundle, machine: Machine, expected: Expected, found: Sequence[VariantReport]
) -> Iterator[str]:
    """What the figures alone would not say."""
    off, allowed = expected.record.golden_difference, bundle.manifest.golden.tolerance
    if expected.observed and (off is None or off > allowed):
        yield (
            "The reference itself does not give the golden scores: ONNX Runtime computes otherwise on this processor. "
            "Look at the golden scores first."
        )
    if machine.load_average and machine.load_average[0] > machine.usable_cpus / 2:
        yield (
            f"The machine was busy before the work: a load of {machine.load_average[0]:.1f}, and usable processors: "
            f"{machine.usable_cpus}. Times are those of a busy machine."
        )
    if bundle.manifest.work is None:
        yield "There are no bounds: the bundle does not count its operations. Export it again to have them."
    for variant in found:
        stages = variant.times.stages if variant.times else ()
        for stage in stages:
            if stage.share is not None and stage.share > 1:
                yield (
                    f"{variant.title}: {stage.title} is faster than its bound, so what the device is said to do is "
                    "less than it does."
                )
        for graphs in variant.cuda_graphs:
            if graphs.off:
                yield f"{variant.title}: no CUDA graphs of {graphs.graph}, {graphs.profile}: {graphs.off}."

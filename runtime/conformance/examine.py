"""One variant, examined: layers, golden inputs, sizes, memory and times.

A provider may fail anywhere, and that is a finding: each part of the work is guarded, and the next one goes on.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from zreward.bundle import Bundle, GoldenItem
from zreward.plugins import OPERATORS
from zreward.progress import Progress
from zreward.runtime.backends import OpenGraphs
from zreward.runtime.bench.plan import WARM_UP
from zreward.runtime.conformance import shapes
from zreward.runtime.conformance.checks import FAIL, TITLES, Check, described, guarded
from zreward.runtime.conformance.plan import ConformancePlan
from zreward.runtime.conformance.reference import Expected
from zreward.runtime.conformance.report import CapturedGraphs, EngineFacts, VariantReport
from zreward.runtime.conformance.roofline import DeviceLimits
from zreward.runtime.conformance.stages import (
    COMPARED,
    Subject,
    compared,
    differences,
    golden_differences,
    means_apart,
    scored,
)
from zreward.runtime.conformance.timing import timed
from zreward.runtime.conformance.tolerances import RESERVE_SHARE, Tolerance
from zreward.runtime.conformance.variants import Variant

_ENOUGH_FOR_A_CAPTURE = 4
"""Equal runs in a row: two as they are, one that is captured, and one that is launched."""


@dataclass(frozen=True)
class Task:
    """What is the same for all variants.

    Attributes:
        memory: bytes in use; None where nobody tells.
        memory_of: whose they are.
    """

    bundle: Bundle
    plan: ConformancePlan
    items: Sequence[GoldenItem]
    expected: Expected
    tolerances: Mapping[str, Tolerance]
    limits: DeviceLimits
    memory: Callable[[], int | None]
    memory_of: str
    progress: Progress

    def within(self, name: str, found: float, detail: str = "") -> Check:
        """A check against the tolerance of this name."""
        return Check.within(name, found, self.tolerances[name].allowed, detail)


def examine(task: Task, variant: Variant, opened: OpenGraphs) -> VariantReport:
    """Examine open graphs; who opened them closes them. Raises nothing that a provider can cause."""
    try:
        subject = Subject(task.bundle, opened)
    except Exception as error:
        return unopened(variant, error)
    with subject.scorer:
        return _Examination(task, variant, subject).report()


def unopened(variant: Variant, error: Exception) -> VariantReport:
    """The report of a variant that does not open."""
    check = Check("opens", FAIL, detail=described(error))
    return replace(_report_of(variant), checks=(check,))


class _Examination:
    """The parts of the work, each of which yields checks and adds to the report."""

    def __init__(self, task: Task, variant: Variant, subject: Subject) -> None:
        self._task, self._variant, self._subject = task, variant, subject
        self._report = replace(_report_of(variant), details=subject.opened.details)
        self._limits = shapes.limits_of(subject, variant.engine)

    def report(self) -> VariantReport:
        checks = [
            Check.that("opens", True, self._subject.opened.details),
            *guarded("plugin_layers", self._plugin_layers),
            *guarded("inputs", self._stages),
            *guarded("golden", self._scores),
            *guarded("shapes", self._sizes),
            *guarded("batches", self._batches),
            *guarded("refusal", lambda: shapes.refusal_check(self._subject, self._limits)),
            *guarded("times", self._times),
        ]
        order = list(TITLES)
        return replace(
            self._report,
            checks=tuple(sorted(checks, key=lambda check: order.index(check.name))),
            cuda_graphs=tuple(_captured(self._subject.opened)),
        )

    def _plugin_layers(self) -> Iterator[Check]:
        """As many as the builder's network had, of every operator where a library was loaded; else none."""
        engine = self._variant.engine
        if engine is None:
            yield Check.left_out("plugin_layers", self._variant.once)
            return
        found: Counter[str] = Counter()
        for session in self._subject.opened.sessions.values():
            layers = session.layers()  # type: ignore[attr-defined]  # sessions of engines have it
            found.update(layer.plugin for layer in layers if layer.plugin is not None)
        self._report = replace(self._report, plugin_layers=dict(found))
        recorded = sum(graph.plugin_layers for graph in engine.info.graphs.values())
        listed = ", ".join(f"{n} {name}" for name, n in found.items()) or "none"
        detail = f"{listed}; the network that was built had {recorded or 'none'}"
        # An inspector may list a layer once for each profile, so there may be more.
        holds = found.total() >= recorded if recorded else not found
        missing = [name for name in OPERATORS if name not in found] if engine.info.plugins else []
        detail += f"; missing: {', '.join(missing)}" if missing else ""
        yield Check.that("plugin_layers", holds and not missing, detail)

    def _stages(self) -> Iterator[Check]:
        task, observed = self._task, []
        for done, item in enumerate(task.items):
            self._heard("golden inputs", done, len(task.items))
            observed.append(self._subject.observe(item))
        self._heard("golden inputs", len(task.items), len(task.items))
        if not task.expected.observed:
            for name in COMPARED:
                yield Check.left_out(name, task.expected.record.missing)
            return
        found = differences(observed, task.expected.observed)
        self._report = replace(self._report, states=found.states)
        yield from compared(found, task.tolerances)

    def _scores(self) -> Iterator[Check]:
        task = self._task
        probs = scored(self._subject, task.items)
        yield task.within("golden", golden_differences(probs, task.items))
        yield task.within("scores", means_apart(probs, task.expected.probs, task.bundle.contract.bins))

    def _sizes(self) -> Iterator[Check]:
        task = self._task
        made, cycles = shapes.shapes_of(self._subject, self._limits), task.plan.cycles
        in_a_row = _ENOUGH_FOR_A_CAPTURE if _captures(self._subject.opened) else 1
        results, used = shapes.cycle(
            made,
            cycles,
            in_a_row,
            watch=_settled(task.memory),
            heard=lambda done: self._heard("sizes", done, cycles * len(made)),
        )
        watched = shapes.MemoryWatch(task.memory_of, used) if used else None
        self._report = replace(self._report, shapes=results, memory=watched)
        failed, ran = ([r for r in results if bool(r.error) is wanted] for wanted in (True, False))
        detail = f"{len(ran)} of {len(results)} ran, each {in_a_row * cycles} times"
        detail += "".join(f"; {result.name}: {result.error}" for result in failed)
        yield Check.within("shapes", len(failed), 0, detail)
        if ran:
            furthest = max(ran, key=lambda r: float("inf") if r.relative_l2 is None else r.relative_l2)
            value = float("nan") if furthest.relative_l2 is None else furthest.relative_l2
            yield task.within("repeats", value, furthest.name if value else "")
        if watched is None:
            yield Check.left_out("memory", "nobody tells how much is in use here")
        else:
            detail = f"{used[0] / 1e6:,.0f} MB after the first of {len(used)} cycles, {task.memory_of}"
            reserve = RESERVE_SHARE * used[0] / 1e6 if task.plan.provider == "cpu" else 0.0
            allowed = max(task.tolerances["memory"].allowed, reserve)
            yield Check.within("memory", watched.growth_mb, allowed, detail)

    def _batches(self) -> Iterator[Check]:
        yield self._task.within("batches", shapes.batch_difference(self._subject.engine, self._limits))

    def _times(self) -> Iterator[Check]:
        """No check where it works: no time is too long."""
        task, total = self._task, WARM_UP + self._task.plan.repetitions
        times = timed(
            self._subject,
            task.limits,
            task.plan.repetitions,
            on_gpu=task.plan.provider != "cpu",
            heard=lambda done: self._heard("times", done, total),
        )
        self._report = replace(self._report, times=times)
        yield from ()

    def _heard(self, what: str, done: int, total: int) -> None:
        self._task.progress(f"{self._variant.title}: {what}", done, total)


def _report_of(variant: Variant) -> VariantReport:
    engine = None if variant.engine is None else EngineFacts.of(variant.engine)
    return VariantReport(variant.name, variant.title, None, variant.once, engine, checks=())


def _settled(memory: Callable[[], int | None]) -> Callable[[], int | None]:
    """Without what only Python's collector of cycles would free."""

    def watch() -> int | None:
        gc.collect()
        return memory()

    return watch


def _captures(opened: OpenGraphs) -> bool:
    """Whether CUDA graphs are captured, by the runtime or by the library behind it."""
    return any(hasattr(session, "graph_facts") for session in opened.sessions.values())


def _captured(opened: OpenGraphs) -> Iterator[CapturedGraphs]:
    for graph, session in opened.sessions.items():
        for profile, facts in getattr(session, "graph_facts", {}).items():
            yield CapturedGraphs(graph, profile, facts.captured, facts.replayed, facts.off)

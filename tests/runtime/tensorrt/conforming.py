"""Scenarios of `zreward conformance` with engines of TensorRT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.tensorrt.world import World
from tests.support.conformance import checked_json, failures
from tests.support.plugins import recorded_library
from tests.support.tensorrt_engines import PLUGIN_LAYERS
from zreward.bundle import Bundle
from zreward.errors import BackendError, BundleError, PluginError, UsageError, ZrewardError
from zreward.plugins import OPERATORS
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.backends.tensorrt.session import EngineSession
from zreward.runtime.conformance import (
    ConformancePlan,
    ConformanceReport,
    examine,
    gpu,
    run,
    run_conformance,
    shapes,
    timing,
    variants,
)
from zreward.runtime.conformance.checks import FAIL, PASS
from zreward.runtime.conformance.reference import Expected, expected_of
from zreward.runtime.conformance.shapes import Limits, Shape
from zreward.runtime.conformance.stages import Subject


class Bench:
    """Runs `run_conformance` in a world, and remembers which engines it had built.

    Unless a run is `in_full`, it has one golden input and two sizes, and is not timed; and then only its first variant
    has more sizes. The reference is computed once.
    """

    def __init__(self, world: World) -> None:
        self.world, self.built = world, list[tuple[str, bool]]()
        self.library: Path | None = None
        if world.own_graphs:
            self.library = world.folder / "libzreward_plugins.so"
            self.sha256 = recorded_library(self.library, world.version).sha256

    def build(self, library: Path | None, replace: bool) -> None:
        plugins = {} if library is None else {library.name: self.sha256}
        self.built.append(("with" if library else "without", replace))
        for path in (self.world.path / "engines").glob("*-plugins" if library else "*[!s]"):
            assert replace
            shutil.rmtree(path)
        self.world.write_engine(plugins=plugins, images=2)

    def run(self, *, in_full: bool = False, **options: Any) -> ConformanceReport:
        use = GpuOptions(plugins=options.pop("plugins", self.library))
        plan = {"provider": self.world.flavour, "gpu": use, "cycles": 2, "repetitions": 1}
        every, items, asked = shapes.shapes_of, Bundle.golden_items, list[Limits]()

        def shapes_of(subject: Subject, limits: Limits) -> list[Shape]:
            asked.append(limits)
            found = every(subject, limits)
            return [*found[:3], *found[-4:]] if in_full and len(asked) == 1 else found[-2:]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "_COPIED_BYTES", 1 << 16)
            patch.setattr(timing, "WARM_UP", 0)
            patch.setattr(shapes, "shapes_of", shapes_of)
            if not in_full:
                patch.setattr(Bundle, "golden_items", lambda bundle: items(bundle)[:1])
                patch.setattr(examine, "timed", lambda *_, **__: None)
                patch.setattr(run, "expected_of", _expected_once)
            report = run_conformance(self.world.path, ConformancePlan(**plan | options), build=self.build)
        self.world.assert_clean()
        assert str(self.world.folder) not in json.dumps(checked_json(report))
        return report

    def refused(self, error: type[ZrewardError], **options: Any) -> str:
        try:
            self.run(**options)
        except error as found:
            message = str(found)
        else:
            raise AssertionError("it was examined")
        self.world.assert_clean()
        return message


def verdicts(report: ConformanceReport, number: int = 0) -> dict[str, str]:
    return {check.name: check.verdict for check in report.variants[number].checks}


def conformance_with_and_without_plugins(world: World) -> None:
    """Everything passes, of two engines that are built because there is none."""
    bench = Bench(world)
    report = bench.run(in_full=True)
    assert report.passed, [failures(report, n) for n in range(len(report.variants))]
    assert bench.built == (
        [("without", False), ("with", False)] if world.own_graphs else [("without", False)]
    )
    assert report.gpu is not None and report.gpu.compute_capability == "8.9"
    assert report.limits.products["bits16"].per_second == 58 * 2.04e9 * 1024
    assert report.limits.bandwidth is not None
    assert report.limits.bandwidth.per_second == 2 * 6.251e9 * 192 / 8
    assert report.limits.copied is not None and report.limits.copied.per_second > 0
    first = report.variants[0]
    assert verdicts(report)["plugin_layers"] == PASS and first.plugin_layers == {}
    assert not report.reference.missing and report.reference.golden_difference is not None
    assert first.memory is not None and max(first.memory.used_bytes) < world.driver.memory_bytes
    limits = next(shape for shape in first.shapes if "image tokens after" in shape.name)
    assert limits.name.startswith("2 × ") and limits.runs == 8 and limits.relative_l2 == 0
    assert first.times is not None and len(first.times.stages) == 9
    (refusal,) = [check for check in first.checks if check.name == "refusal"]
    assert "batch is 3, and 'prefix' takes 1 to 2" in refusal.detail, refusal.detail
    assert "total_patches is" in refusal.detail and "/engines/" not in refusal.detail
    assert [graphs.replayed > 0 for graphs in first.cuda_graphs] == [True] * 3, first.cuda_graphs
    second = report.variants[1]
    assert second.plugin_layers is not None and sum(second.plugin_layers.values()) == PLUGIN_LAYERS
    assert set(second.plugin_layers) == set(OPERATORS) and not second.once
    assert second.engine is not None and second.engine.plugins == {"libzreward_plugins.so": bench.sha256}


def conformance_of_a_flavour_without_plugins(world: World) -> None:
    """It is examined once, here on a GPU whose driver does not tell how fast its memory is."""
    bench = Bench(world)
    del world.driver.attributes[36]
    report = bench.run()
    assert report.gpu is not None and report.gpu.memory_clock_khz == 0
    assert report.limits.bandwidth == report.limits.copied and "measured: copies" in str(report.limits.copied)
    assert report.passed and bench.built == [("without", False)], failures(report)
    (variant,) = report.variants
    assert "TensorRT-RTX has no plugins" in variant.once and variant.plugin_layers == {}
    assert any("TensorRT-RTX captures its own" in note for note in report.notes)
    assert "takes only device" in bench.refused(UsageError, plugins=world.image)


def conformance_finds_what_is_wrong(world: World) -> None:
    bench = Bench(world)
    options = {"without_plugins": True, "plugins": None}
    world.library.refuses["get_engine_information"] = "no layers"
    report = bench.run(**options)
    assert "--no-plugins" in report.variants[0].once
    found = failures(report)
    assert list(found) == ["plugin_layers"] and "does not tell the layers" in found["plugin_layers"]
    world.library.refuses.clear()
    # A run that fails, of one stage, after which all others go on.
    world.driver.failures["cuStreamSynchronize"] = [0] * 40 + [700]
    found = failures(bench.run(**options))
    assert len(found) == 1 and "an illegal memory access" in next(iter(found.values())), found
    # Memory that no run gives back.
    with _every_run(lambda session: session._device.allocate(3_000_000)):
        report = bench.run(**options)
    assert "memory" in failures(report), verdicts(report)


def conformance_of_plugins_that_are_not_there(world: World) -> None:
    bench = Bench(world)
    world.library.without_plugins = (OPERATORS[2],)
    report = bench.run()
    assert report.variants[0].passed and not report.passed
    found = failures(report, 1)
    assert list(found) == ["plugin_layers"], found
    assert f"the network that was built had {PLUGIN_LAYERS}" in found["plugin_layers"]
    assert f"missing: {OPERATORS[2]}" in found["plugin_layers"]
    # An engine that does not load is the failure of its variant, and what was found of the other one stays.
    world.library.without_plugins = ()
    file = next((world.path / "engines").glob("*-plugins")) / "decoder.engine"
    file.write_bytes(file.read_bytes().replace(b"decoder", b"decodes"))
    report = bench.run()
    assert report.variants[0].passed and len(bench.built) == 2, "engines are built once, and then loaded"
    assert list(failures(report, 1)) == ["opens"] and "was altered" in failures(report, 1)["opens"]
    assert verdicts(report, 1) == {"opens": FAIL}


def conformance_that_cannot_begin(world: World) -> None:
    bench = Bench(world)
    assert bench.library is not None
    options = {"without_plugins": True, "plugins": None}
    variants.find_library = lambda: None
    message = bench.refused(UsageError, plugins=None)
    assert "no library of plugins" in message and "--no-plugins" in message
    assert "there is no plugin library here" in bench.refused(PluginError, plugins=world.folder / "none.so")
    recorded_library(bench.library, "9.1.0")
    assert "built for TensorRT 9.1.0" in bench.refused(PluginError)
    assert not bench.built, "nothing is built before all of this is known"
    world.write_engine(tensorrt_version="1.2.3")
    message = bench.refused(UsageError, **options)
    assert "was built by version 1.2.3" in message and "--build" in message
    report = bench.run(build=True, **options)
    assert report.passed and bench.built == [("without", True)]
    file = next((world.path / "engines").glob("*")) / "vision.engine"
    file.write_text("{}")
    assert "cut short or altered" in bench.refused(BundleError, **options)
    world.driver.failures["cuInit"] = [100]
    assert "no CUDA-capable device" in bench.refused(BackendError, **options)


@cache
def _known(sha256: str) -> list[Expected]:
    return []


def _expected_once(bundle: Bundle, *arguments: Any) -> Expected:
    """What the reference gives for the one golden input of quick runs."""
    known = _known(bundle.sha256)
    if not known:
        known.append(expected_of(bundle, *arguments))
    return known[0]


class _every_run:  # noqa: N801  # used like a function
    """Does something after every run of an engine."""

    def __init__(self, work: Callable[[EngineSession], object]) -> None:
        self._work, self._run = work, EngineSession.run

    def __enter__(self) -> None:
        work, run = self._work, self._run

        def running(session: EngineSession, outputs: Any, inputs: Any) -> list[Any]:
            found = run(session, outputs, inputs)
            with session._device.in_use():
                work(session)
            return found

        EngineSession.run = running  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        EngineSession.run = self._run  # type: ignore[method-assign]

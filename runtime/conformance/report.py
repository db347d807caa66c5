"""The report of `zreward conformance` as data, and its file: docs/conformance.md and
assets/schemas/conformance.schema.json describe it.

It is meant to be sent, so folders of the machine are left out of the JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zreward.engines import BuiltEngine
from zreward.jsonfile import write_json
from zreward.runtime.bench.machine import Machine
from zreward.runtime.bench.report import BundleFacts
from zreward.runtime.conformance.checks import FAIL, PASS, Check
from zreward.runtime.conformance.gpu import GpuFacts
from zreward.runtime.conformance.plan import ConformancePlan
from zreward.runtime.conformance.roofline import DeviceLimits
from zreward.runtime.conformance.shapes import MemoryWatch, ShapeResult
from zreward.runtime.conformance.stages import StateDifference
from zreward.runtime.conformance.timing import Times
from zreward.runtime.conformance.tolerances import Tolerance

SCHEMA, REPORT_VERSION = "zreward.conformance", 1


@dataclass(frozen=True)
class EngineFacts:
    """The engine that was examined, as its engine.json has it; `sha256` and `n_bytes` of each graph's file."""

    name: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    plugins: Mapping[str, str]
    plugin_layers: Mapping[str, int]
    sha256: Mapping[str, str]
    n_bytes: Mapping[str, int]

    @staticmethod
    def of(built: BuiltEngine) -> EngineFacts:
        info = built.info
        return EngineFacts(
            name=built.path.name,
            tensorrt_version=info.tensorrt_version,
            compute_capabilities=info.compute_capabilities,
            precision=info.precision,
            plugins=info.plugins,
            plugin_layers={name: graph.plugin_layers for name, graph in info.graphs.items()},
            sha256={name: graph.sha256 for name, graph in info.graphs.items()},
            n_bytes={name: graph.bytes for name, graph in info.graphs.items()},
        )


@dataclass(frozen=True)
class CapturedGraphs:
    """CUDA graphs of one profile of a graph's engine; `off` says why none is made any more."""

    graph: str
    profile: str
    captured: int
    replayed: int
    off: str | None


@dataclass(frozen=True)
class Reference:
    """What providers are compared with.

    Attributes:
        what: for people.
        threads: of the CPU; None where ONNX Runtime chose.
        golden_difference: how far it is itself from the golden scores; None where nothing was computed.
        missing: why there is none but the golden scores, if so.
    """

    what: str
    threads: int | None
    golden_difference: float | None
    missing: str = ""


@dataclass(frozen=True)
class VariantReport:
    """What was found of one variant; what it did not come to is None or empty.

    Attributes:
        name, title: see `Variant`.
        details: what ran it, for people.
        once: why there is no other variant, if so.
        engine: that ran.
        checks: in the order of `TITLES`.
        plugin_layers: of the engine, by operator, as TensorRT's inspector tells them.
        states: each state's distance from the reference.
        shapes: every size that ran.
        memory: in use after each cycle.
        cuda_graphs: captured by the runtime.
        times: of the stages.
    """

    name: str
    title: str
    details: str | None
    once: str
    engine: EngineFacts | None
    checks: tuple[Check, ...]
    plugin_layers: Mapping[str, int] | None = None
    states: tuple[StateDifference, ...] = ()
    shapes: tuple[ShapeResult, ...] = ()
    memory: MemoryWatch | None = None
    cuda_graphs: tuple[CapturedGraphs, ...] = ()
    times: Times | None = None

    @property
    def passed(self) -> bool:
        return not any(check.verdict == FAIL for check in self.checks)


@dataclass(frozen=True)
class ConformanceReport:
    """What a provider was found to be.

    Attributes:
        date: when it began, in UTC.
        gpu: None for the provider "cpu".
        tolerances: by the name of the check.
        limits: of the device, for the bounds.
        folder: of the bundle; not in the JSON.
        notes: what a reader should know besides, in sentences.
    """

    date: str
    provider: str
    bundle: BundleFacts
    machine: Machine
    gpu: GpuFacts | None
    versions: Mapping[str, str]
    plan: ConformancePlan
    reference: Reference
    tolerances: Mapping[str, Tolerance]
    limits: DeviceLimits
    variants: tuple[VariantReport, ...]
    folder: Path
    notes: tuple[str, ...] = ()

    @property
    def checks(self) -> Iterator[Check]:
        """Of all variants."""
        for variant in self.variants:
            yield from variant.checks

    @property
    def passed(self) -> bool:
        """Whether no check failed, and there were some."""
        verdicts = [check.verdict for check in self.checks]
        return FAIL not in verdicts and PASS in verdicts

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the bundle's folder by its last name, the user's own as ~."""
        data = dataclasses.asdict(self)
        del data["folder"]
        asked = ("cycles", "repetitions", "threads", "build", "without_plugins")
        data["plan"] = {name: getattr(self.plan, name) for name in asked}
        data["plan"] |= {name: getattr(self.plan.gpu, name) for name in ("device", "memory_bytes")}
        for entry, variant in zip(data["variants"], self.variants, strict=True):
            entry["passed"] = variant.passed
            for check, written in zip(variant.checks, entry["checks"], strict=True):
                written["title"] = check.title
        whole = {"schema": SCHEMA, "version": REPORT_VERSION, "passed": self.passed, **data}
        folder = self.folder.resolve()
        found: dict[str, Any] = _renamed(
            whole, {str(folder): folder.name, str(self.folder): folder.name, str(Path.home()): "~"}
        )
        return found

    def save(self, path: Path) -> None:
        """Write the report to `path` in one step."""
        write_json(path, self.to_dict())


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with parts of its texts replaced."""
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(item, names) for item in value]
    if isinstance(value, str):
        for old, new in names.items():
            value = value.replace(f"{old}/", f"{new}/").replace(f"{old}:", f"{new}:")
    return value

"""The parts of `zreward conformance`: distances, limits of devices, bounds, sizes, layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.conformance import LIMITS
from zreward.bundle import Bundle
from zreward.engines import BuiltEngine, EngineInfo, GraphEngine
from zreward.errors import BackendError, UsageError
from zreward.export.tensorrt.profiles import profiles
from zreward.runtime.backends import open_graphs
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.backends.tensorrt.context import LoadedEngine
from zreward.runtime.backends.tensorrt.inspection import EngineLayer, layers_of
from zreward.runtime.bench.bound import stage_operations
from zreward.runtime.bench.stages import picture, tokens_of
from zreward.runtime.conformance import ConformancePlan, roofline
from zreward.runtime.conformance.checks import FAIL, PASS, Check, guarded
from zreward.runtime.conformance.gpu import GpuFacts
from zreward.runtime.conformance.shapes import Shape as Size
from zreward.runtime.conformance.shapes import ShapeResult, cycle, limits_of
from zreward.runtime.conformance.stages import Observed, Subject, compared, differences, relative_l2
from zreward.runtime.conformance.tolerances import arithmetic_of, tolerances_of


@pytest.fixture(scope="module")
def subject(tiny_bundle: Path) -> Subject:
    bundle = Bundle.open(tiny_bundle)
    return Subject(bundle, open_graphs(bundle, provider="cpu", threads=1))


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.3, 4.4], [3.0, 4.0], 0.1),
        ([0.0, 2.0], [0.0, 0.0], 2.0),
        ([1.0, 2.0, 3.0], [1.0, 2.0], np.inf),
        ([np.nan, 1.0], [1.0, 1.0], np.nan),
    ],
)
def test_relative_l2(found: list[float], expected: list[float], distance: float) -> None:
    assert relative_l2(np.array(found), np.array(expected)) == pytest.approx(distance, nan_ok=True)


def observed(**changes: Any) -> Observed:
    fields: dict[str, Any] = {
        "features": np.ones((4, 2), np.float32),
        "after_prompt": {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)},
        "after_image": {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)},
        "probs": np.full((4, 2), 0.5, np.float32),
        "mean": np.ones(4, np.float32),
        "variance": np.ones(4, np.float32),
    }
    return Observed(**fields | changes)


def test_the_state_that_is_furthest_off_is_named(tiny_bundle: Path) -> None:
    allowed = tolerances_of(Bundle.open(tiny_bundle), on_gpu=False)
    off = {"a": np.full(3, 1.001, np.float32), "b": np.full(3, 1.5, np.float32)}
    lost = {"a": np.array([1, np.nan, 1], np.float32), "b": np.full(3, 1.5, np.float32)}
    found = differences(
        [observed(), observed(after_image=off), observed(after_prompt=lost)], [observed()] * 3
    )
    checks = {check.name: check for check in compared(found, allowed)}
    assert checks["states_after_image"].detail == "b" and checks["states_after_image"].found == pytest.approx(
        0.5
    )
    assert checks["states_after_prompt"].detail == "a" and checks["states_after_prompt"].found is None
    assert {name for name, check in checks.items() if check.verdict == FAIL} == {
        "states_after_prompt",
        "states_after_image",
    }


def test_a_check_passes_within_its_tolerance_and_no_nan_does() -> None:
    verdicts = [Check.within("mean", found, 0.02).verdict for found in (0.02, 0.0200001, np.nan, np.inf)]
    assert verdicts == [PASS, FAIL, FAIL, FAIL]
    (check,) = guarded("shapes", lambda: [Check.within("shapes", 1 / 0, 0)])
    assert (check.verdict, check.detail) == (FAIL, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("target", "weights", "quantized", "arithmetic"),
    [
        ("cpu", "fp16", False, "float32"),
        ("tensorrt", "fp16", False, "float16"),
        ("cuda", "bf16", False, "bfloat16"),
        ("tensorrt", "fp32", False, "float32"),
        ("tensorrt", "fp16", True, "quantized"),
    ],
)
def test_tolerances_follow_the_arithmetic(
    tiny_bundle: Path, target: str, weights: str, quantized: bool, arithmetic: str
) -> None:
    bundle = Bundle.open(tiny_bundle)
    scheme = {"scheme": "int8"} if quantized else None
    changed = dataclasses.replace(bundle.manifest, target=target, weights=weights, quantization=scheme)
    bundle = dataclasses.replace(bundle, manifest=changed)
    assert arithmetic_of(bundle) == arithmetic
    allowed = tolerances_of(bundle, on_gpu=True)
    assert allowed["golden"].allowed == bundle.manifest.golden.tolerance
    assert allowed["variance"].allowed == pytest.approx(4 * allowed["mean"].allowed)
    if weights != "fp32" and arithmetic.endswith("16"):
        assert allowed["mean"].allowed == 0.02


GPUS = {
    "A100 40 GB": (
        GpuFacts("", "8.0", "13.0", 0, 108, 1_410_000, 1_215_000, 5120, 1),
        312e12,
        19.5e12,
        1555e9,
    ),
    "RTX 3090": (GpuFacts("", "8.6", "13.0", 0, 82, 1_695_000, 9_751_000, 384, 1), 142e12, 35.6e12, 936e9),
    "RTX 4090": (GpuFacts("", "8.9", "13.0", 0, 128, 2_520_000, 10_501_000, 384, 1), 330e12, 82.6e12, 1008e9),
    "H100 SXM": (GpuFacts("", "9.0", "13.0", 0, 132, 1_830_000, 2_619_000, 5120, 1), 989e12, 61.8e12, 3350e9),
    "RTX 5090": (
        GpuFacts("", "12.0", "13.0", 0, 170, 2_407_000, 14_001_000, 512, 1),
        419e12,
        104.8e12,
        1792e9,
    ),
}
"""With the published operations a second in 16 bits and in float32, and bytes a second."""


@pytest.mark.parametrize("name", GPUS)
def test_limits_of_gpus_are_those_that_are_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "copied_bytes_per_second", lambda device: 5e11)
    facts, narrow, wide, bandwidth = GPUS[name]
    found = roofline.limits_of_gpu(facts, 0)
    assert found.products["bits16"].per_second == pytest.approx(narrow, rel=0.01)
    assert found.products["float32"].per_second == pytest.approx(wide, rel=0.01)
    assert found.bandwidth is not None and found.bandwidth.per_second == pytest.approx(bandwidth, rel=0.01)
    unknown = roofline.limits_of_gpu(
        dataclasses.replace(facts, compute_capability="7.5", memory_clock_khz=0), 0
    )
    assert not unknown.products and unknown.bandwidth == unknown.copied == found.copied


def test_bounds_of_a_stage(subject: Subject) -> None:
    """Counted anew: operations by the benchmark's count, bytes by the files and by the states that a run leaves."""
    bundle, tokens = subject.bundle, tokens_of(subject.scorer, picture(64))
    assert bundle.manifest.work is not None
    limits = dataclasses.replace(
        LIMITS, products={"float32": roofline.Limit(2e9, ""), "tf32": roofline.Limit(4e9, "")}
    )
    bound = roofline.stage_bounds(bundle, tokens, limits, on_gpu=False)["prompt"]
    counted = stage_operations(bundle.manifest.work, tokens, 1)["prompt"]
    in_states = 2 * tokens.prompt * bundle.manifest.work.decoder.recurrent_per_row
    assert bound.operations == counted.float and in_states > 0
    assert bound.products_ms == pytest.approx(1e3 * ((counted.float - in_states) / 2e9 + in_states / 4e9))
    system = subject.engine.system_state()
    after = subject.engine.prompt_state("take 000000", system)
    n_bytes = sum(path.stat().st_size for path in bundle.path.glob("decoder.onnx*"))
    n_bytes += sum(np.asarray(a).nbytes for state in (system, after) for a in state.arrays.values())
    grown = sum(s.n_bytes(rows=1, past=1) - s.n_bytes(rows=1, past=0) for s in bundle.manifest.states)
    longer = tokens.system + tokens.prompt - after.length
    assert bound.n_bytes == n_bytes + longer * grown
    assert bound.memory_ms == pytest.approx(bound.n_bytes / 1e6)
    assert bound.bound_ms == max(bound.products_ms or 0, bound.memory_ms)
    cached = dataclasses.replace(limits, cache_bytes=bound.n_bytes)
    assert roofline.stage_bounds(bundle, tokens, cached, on_gpu=False)["prompt"].memory_ms is None
    # Graphs that compute in 16 bits do so on a GPU alone; a rate that is not known leaves no bound.
    narrow = dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, target="tensorrt", weights="fp16")
    )
    assert roofline.stage_bounds(narrow, tokens, limits, on_gpu=False)["prompt"] == bound
    unknown = roofline.stage_bounds(narrow, tokens, limits, on_gpu=True)["prompt"]
    assert unknown.bound_ms is unknown.products_ms is None and unknown.n_bytes == bound.n_bytes
    faster = {**limits.products, "bits16": roofline.Limit(2e12, "")}
    fast = roofline.stage_bounds(narrow, tokens, dataclasses.replace(limits, products=faster), on_gpu=True)[
        "prompt"
    ]
    assert fast.products_ms == pytest.approx(1e3 * ((counted.float - in_states) / 2e12 + in_states / 4e9))


def test_sizes_are_those_of_the_profiles_and_else_of_the_contract(subject: Subject) -> None:
    engine = subject.engine
    made = profiles(engine.contract, engine.encoder, 3)
    graphs = {
        name: GraphEngine(1, "0" * 64, {"x": tuple(found[0].axes)}, found) for name, found in made.items()
    }
    info = EngineInfo("tensorrt", "11", ("8.9",), "fp32", "0" * 64, {}, graphs, "0")
    profiled = limits_of(subject, BuiltEngine(Path("engine"), info))
    free = limits_of(subject, None)
    assert profiled.profiled and not free.profiled
    assert dataclasses.replace(profiled, profiled=False, images=free.images) == free
    assert profiled.images == 3 and 1 <= free.images <= 8


def test_sizes_run_in_turn_and_what_fails_stops_alone() -> None:
    ran: list[str] = []
    outcomes: Mapping[str, list[Any]] = {
        "steady": [np.ones(2)] * 8,
        "drifts": [np.ones(2) * (1 + i / 100) for i in range(8)],
        "fails": [np.ones(2), BackendError("no memory left"), np.ones(2)],
        "lost": [np.array([1, np.nan])],
    }

    def shape(name: str) -> Size:
        results = iter(outcomes[name])

        def run() -> Any:
            ran.append(name)
            found = next(results)
            if isinstance(found, Exception):
                raise found
            return found

        return Size(name, run)

    heard: list[int] = []
    used = iter([7, None])
    results, memory = cycle(
        [shape(name) for name in outcomes], 2, 3, watch=lambda: next(used), heard=heard.append
    )
    assert ran == ["steady"] * 3 + ["drifts"] * 3 + ["fails"] * 2 + ["lost"] + ["steady"] * 3 + ["drifts"] * 3
    assert results[0] == ShapeResult("steady", 6, 0.0)
    assert results[1].runs == 6 and results[1].relative_l2 == pytest.approx(0.05)
    assert results[2] == ShapeResult("fails", 1, 0.0, "no memory left")
    assert results[3].error == "it gave no numbers (NaN or infinity)"
    assert memory == (7,) and heard == list(range(9))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ('{"Layers": ["a", "b"]}', [EngineLayer("a"), EngineLayer("b")]),
        (
            '{"Layers": [{"Name": "x", "LayerType": "gemm"}, '
            '{"Name": "y", "LayerType": "PluginV3", "PluginType": "P"}]}',
            [EngineLayer("x", "gemm"), EngineLayer("y", "PluginV3", "P")],
        ),
        ('{"Layers": [{"LayerType": "gemm"}]}', None),
        ('{"Layers": null}', None),
        ("", None),
    ],
)
def test_layers_as_an_inspector_tells_them(text: str, layers: list[EngineLayer] | None) -> None:
    inspector = SimpleNamespace(get_engine_information=lambda form: text)
    trt: Any = SimpleNamespace(__version__="11.4", LayerInformationFormat=SimpleNamespace(JSON=1))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector if text else None)
    loaded = LoadedEngine(trt, engine, "decoder", {}, {}, [])
    if layers is None:
        with pytest.raises(BackendError, match=r"TensorRT 11.4 does not tell the layers .*\(graph decoder"):
            layers_of(loaded)
    else:
        assert list(layers_of(loaded)) == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "auto"}, "unknown provider 'auto'; name the one to examine: cpu, "),
        ({"provider": "quantum"}, "unknown provider 'quantum'"),
        ({"provider": "cpu", "cycles": 1}, "cycles must be 2 to 1,000, not 1"),
        ({"provider": "cpu", "repetitions": 0}, "repetitions must be 1 to 1,000"),
        ({"provider": "cpu", "threads": 0}, "threads must be 1 to"),
        ({"provider": "cpu", "gpu": GpuOptions(device=1)}, "uses no GPU"),
        (
            {"provider": "tensorrt", "gpu": GpuOptions(memory_bytes=1 << 30)},
            "'memory': the provider tensorrt",
        ),
        (
            {"provider": "tensorrt", "gpu": GpuOptions(plugins=Path("p.so")), "without_plugins": True},
            "contradict each other",
        ),
    ],
)
def test_plans_that_cannot_be_carried_out(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ConformancePlan(**options)

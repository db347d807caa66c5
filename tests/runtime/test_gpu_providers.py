"""ONNX Runtime on a GPU: the real provider over libraries that stand for one, and every way to have none.

L2. Kernels compute nothing there, so no test looks at a score.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest

from tests.support.bundles import lowered_here
from tests.support.conformance import SCHEMA
from tests.support.cuda_stubs import cuda_child, needs_wheel
from tests.support.models import Shape, write_checkpoint
from zreward.bundle import Bundle
from zreward.errors import BackendError, UsageError
from zreward.export import ExportOptions, export_bundle
from zreward.export.quantized import QuantizationOptions
from zreward.plugins import OPERATORS
from zreward.runtime import Scorer
from zreward.runtime.backends import ort_tensorrt
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.verify import verify_bundle

MOVING = """
<ir_version: 10, opset_import: ["": 24]>
moving (float[rows, 3] x, float[n, 4] state) => (float[rows, 3] y, float[n, 4] state_out) {
  y = Identity(x)
  state_out = Identity(state)
}"""
WITHOUT_KERNEL = """
<ir_version: 10, opset_import: ["": 24]>
whole (int32[3, 4] a, int32[4, 5] b) => (int32[3, 5] y) { y = MatMul(a, b) }"""


@pytest.fixture(scope="module")
def cuda_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in 4 bits and float16 for the CUDA provider."""
    folder = tmp_path_factory.mktemp("cuda")
    checkpoint = write_checkpoint(
        folder / "checkpoint", Shape(layers=2, full_attention_interval=2, vision_depth=1)
    )
    codes = QuantizationOptions("int4,*.down_proj=int8-weight", method="rtn", allow_drift=True, judged=False)
    options = ExportOptions(target="cuda", weights="fp16", parity=False, quantization=codes)
    with lowered_here():
        return export_bundle(checkpoint, folder / "bundle", options).path


@pytest.fixture
def bfloat_bundle(cuda_bundle: Path, tmp_path: Path) -> Path:
    """The same, which says that it computes in bfloat16."""
    path = Path(shutil.copytree(cuda_bundle, tmp_path / "bundle"))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "weights": "bf16"}))
    return path


def graph(text: str, folder: Path) -> Path:
    path = folder / "graph.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@needs_wheel
def test_states_stay_on_the_gpu_and_keep_their_values(cuda_stubs: Path, tmp_path: Path) -> None:
    """Identity is a copy, which is done over the libraries: values go there, stay, and come back."""
    found = cuda_child(cuda_stubs, "moves", graph(MOVING, tmp_path))
    assert found["kinds"] == ["ndarray", "DeviceTensor", "DeviceTensor", "ndarray"]
    rows = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found["y"] == [[row[::-1] for row in rows], rows, rows[:1]]
    state = [[0.0, 1.0, 2.0, 3.0]]
    assert found["state"] == [state, state, [1, 4], "float32"]


@needs_wheel
def test_all_stages_of_a_score_run(cuda_stubs: Path, cuda_bundle: Path) -> None:
    found = cuda_child(cuda_stubs, "stages", cuda_bundle, "auto")
    assert (found["provider"], found["packages"]) == ("cuda", ["onnxruntime-gpu"])
    assert found["features"][0] == "ndarray"
    for name, rows in (("prompt", 1), ("images", 2)):
        state = found["states"][name]
        assert state["kinds"] == ["DeviceTensor"]
        assert {shape[0] for shape in state["shapes"]} == {rows}
    assert found["probs"] == [2, 4, 9]


def test_the_bundle_answers_on_the_cpu_too(cuda_bundle: Path) -> None:
    nodes = onnx.load(cuda_bundle / "decoder.onnx", load_external_data=False).graph.node
    assert {"MatMulNBits", "GatedDeltaNet"} <= {node.op_type for node in nodes}
    report = verify_bundle(cuda_bundle, provider="cpu")
    assert report.n_golden == len(Bundle.open(cuda_bundle).golden_items())
    assert report.max_probability_difference < 1e-5


@needs_wheel
def test_conformance_finds_kernels_that_compute_nothing(cuda_stubs: Path, cuda_bundle: Path) -> None:
    report = cuda_child(cuda_stubs, "conforms", cuda_bundle, "memory=1GiB")
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert not report["passed"] and report["gpu"]["name"] == "host memory"
    assert report["plan"]["memory_bytes"] == 1 << 30
    (variant,) = report["variants"]
    assert "runs no engine of a bundle" in variant["once"]
    verdicts = {check["name"]: check["verdict"] for check in variant["checks"]}
    assert {verdicts[name] for name in ("opens", "shapes", "refusal", "memory")} == {"pass"}
    assert {verdicts[name] for name in ("golden", "vision_features", "states_after_image")} == {"fail"}


@needs_wheel
def test_a_product_on_the_cpu_is_refused(cuda_stubs: Path, tmp_path: Path) -> None:
    said = cuda_child(cuda_stubs, "loads", graph(WITHOUT_KERNEL, tmp_path))
    assert "no kernels for GPUs for MatMul" in said and "--provider cpu" in said


@needs_wheel
def test_what_the_gpu_lacks_is_said(cuda_stubs: Path, cuda_bundle: Path, bfloat_bundle: Path) -> None:
    asked = [cuda_bundle, "cuda", "device=3", bfloat_bundle, "cuda", ""]
    missing, narrow = cuda_child(cuda_stubs, "opens", *asked, ZREWARD_STUB_CAPABILITY="75")
    assert "no usable GPU (cuDeviceGet: invalid device ordinal)" in missing
    assert "has no products in it; export with --weights fp16" in narrow
    (old,) = cuda_child(cuda_stubs, "opens", cuda_bundle, "cuda", "", ZREWARD_STUB_DRIVER="124")
    assert "supports CUDA 12.4; install a newer driver" in old


@needs_wheel
def test_a_provider_that_does_not_load_is_no_cpu(cuda_stubs: Path, cuda_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime would go on with the CPU, and warn."""
    for library in cuda_stubs.glob("*.so.*[0-9]"):
        if "cublasLt" not in library.name:
            (tmp_path / library.name).symlink_to(library)
    (found,) = cuda_child(tmp_path, "opens", cuda_bundle, "cuda", "")
    assert found.startswith("BackendError")
    assert "would run on the CPU" in found and "libcublasLt.so.13" in found


@needs_wheel
def test_without_a_driver_auto_takes_the_cpu_where_it_can(cuda_bundle: Path, bfloat_bundle: Path) -> None:
    asked = [cuda_bundle, "cuda", "", cuda_bundle, "auto", "", bfloat_bundle, "auto", ""]
    named, best, narrow = cuda_child(None, "opens", *asked)
    assert "no CUDA driver on this machine" in named
    assert best == "cpu"
    assert "computes in bfloat16 for the target cuda" in narrow
    assert "and a GPU, which it was exported for, is not here (no CUDA driver" in narrow


def test_auto_says_why_a_gpu_is_not_used(
    cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is a GPU, and the build of ONNX Runtime for CPUs."""
    monkeypatch.setattr("zreward.runtime.backends.compute_capability", lambda: "9.0")
    with Scorer.open(cuda_bundle, provider="auto", gpu=GpuOptions(device=1)) as scorer:
        assert scorer.engine.opened.provider == "cpu"
    (message,) = caplog.messages
    assert "scoring on the CPU" in message and "(cuda: this onnxruntime" in message
    with pytest.raises(UsageError, match="'plugins': the provider cuda takes only device, memory"):
        Scorer.open(cuda_bundle, provider="auto", gpu=GpuOptions(plugins=Path("a.so")))


def test_the_build_for_cpus_says_which_to_install(cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="build for CPUs; run `pip uninstall onnxruntime` and then"):
        Scorer.open(cuda_bundle, provider="cuda")
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", lambda name: object())
    with pytest.raises(
        BackendError, match=r"are both installed.*`pip uninstall onnxruntime onnxruntime-gpu`"
    ):
        Scorer.open(cuda_bundle, provider="cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed.*zreward\[gpu\]"):
        Scorer.open(cuda_bundle, provider="cuda")


def test_options_of_the_tensorrt_provider(tmp_path: Path) -> None:
    assert ort_tensorrt.tensorrt_options(GpuOptions(1)) == {"device_id": "1"}
    found = ort_tensorrt.tensorrt_options(GpuOptions(engine_cache=tmp_path, plugins=tmp_path / "p.so"))
    assert found["trt_engine_cache_path"] == found["trt_timing_cache_path"] == str(tmp_path)
    assert found["trt_engine_cache_enable"] == found["trt_timing_cache_enable"] == "1"
    assert found["trt_extra_plugin_lib_paths"] == str(tmp_path / "p.so")


def test_operators_with_plugins_are_named_as_the_tensorrt_provider_finds_them(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node(name, ["x"], [f"y{name}"], domain="zreward") for name in OPERATORS]
    nodes.append(onnx.helper.make_node("LabelMass", ["x"], ["z"], domain="zreward"))
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("zreward", 1)]
    before = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []), opset_imports=opsets)
    onnx.save(before, tmp_path / "g.onnx")
    after = onnx.ModelProto.FromString(ort_tensorrt.plugin_graph(tmp_path / "g.onnx"))
    for node in before.graph.node[: len(OPERATORS)]:
        node.domain = "trt.plugins"
    before.opset_import.append(onnx.helper.make_opsetid("trt.plugins", 1))
    assert [n.domain for n in after.graph.node] == [n.domain for n in before.graph.node]
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    assert after.opset_import == before.opset_import


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__dict__["__version__"] = "11.4.0"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_the_wrong_tensorrt_is_refused(fake_tensorrt: Any, tmp_path: Path) -> None:
    capi = tmp_path / "capi"
    capi.mkdir()
    (capi / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\0libcudart.so.13\0libnvinfer.so.10\0")
    runtime = types.ModuleType("onnxruntime")
    runtime.__dict__.update(__file__=str(tmp_path / "__init__.py"), __version__="1.31.1")
    with pytest.raises(
        BackendError, match=r"built for TensorRT 10, and 11.4.0 is installed; run `pip install"
    ):
        ort_tensorrt.prepare_tensorrt(runtime, GpuOptions())
    fake_tensorrt.__version__ = "10.16.1"
    ort_tensorrt.prepare_tensorrt(runtime, GpuOptions(engine_cache=tmp_path))
    with pytest.raises(UsageError, match="no such folder for engines"):
        ort_tensorrt.prepare_tensorrt(runtime, GpuOptions(engine_cache=tmp_path / "none"))

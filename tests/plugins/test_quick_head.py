"""The score head as a Python plugin: its kernel, its PTX, and what it tells TensorRT."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.gpu import references
from tests.support.tensorrt_api import VERSIONS, bindings_environment, on_linux_x86_64
from zreward.errors import PluginError
from zreward.export.plugins import nvrtc, toolchain
from zreward.export.plugins.quick_head import KERNEL, OPERATOR, quick_head_ptx, register_quick_head

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("width", "n_bins"), [(192, 9), (51, 2), (1024, 32)])
def test_the_kernel_computes_the_head(emulated: Path, dtype: torch.dtype, width: int, n_bins: int) -> None:
    """On the emulated GPU, with TensorRT's order of arguments: inputs, integers, outputs."""
    torch.manual_seed(width)
    rows = 3
    inputs = [
        torch.randn(rows, width).to(dtype),
        torch.randn(width),
        torch.randn(n_bins, width) / width**0.5,
        torch.rand(rows) + 0.5,
        torch.linspace(1, 5, n_bins),
    ]
    outputs = [torch.full(shape, torch.nan) for shape in ((rows, n_bins), (rows,), (rows,))]
    pointers = [[ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors] for tensors in (inputs, outputs)]
    run = ctypes.CDLL(str(emulated / "libkernels.so")).run_quick_head
    assert run(rows, TYPES[dtype], ctypes.c_float(1e-5), *pointers[0], width, n_bins, *pointers[1]) == 0
    for found, expected in zip(outputs, references.rubric_expectation(*inputs, epsilon=1e-5), strict=True):
        assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ptx_of_every_type_is_assembled_for_every_architecture(tmp_path: Path) -> None:
    """By ptxas, which refuses what its architecture cannot run."""
    nvcc = toolchain.wheel_nvcc()
    if nvcc is None:
        pytest.skip("the wheels of nvcc are for Linux")
    texts = [quick_head_ptx(kind, 1e-6) for kind in TYPES.values()]
    assert len(set(texts)) == len(TYPES)
    for number, ptx in enumerate(texts):
        entries = re.findall(rb"\.entry (\w+)\(([^)]*)\)", ptx)
        assert [name for name, _ in entries] == [KERNEL.encode()]
        # five inputs, two integers, three outputs
        assert re.findall(rb"\.param \.(u\d+)", entries[0][1]) == [b"u64"] * 5 + [b"u32"] * 2 + [b"u64"] * 3
        source = tmp_path / f"{number}.ptx"
        source.write_bytes(ptx)
        for architecture in (80, 90, 120):
            command = [str(nvcc.parent / "ptxas"), f"-arch=sm_{architecture}", str(source), "-o", "/dev/null"]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0 and not result.stderr, result.stderr


def test_what_the_compiler_refuses_is_quoted(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void kernel() { undeclared = 1; }\n')
    with pytest.raises(PluginError, match=r"(?s)NVRTC refuses this source.*undeclared"):
        nvrtc.ptx_from_cuda(source, architecture=80, definitions={}, headers=[])


def test_without_nvrtc_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nonexistent/libnvrtc.so"]))
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(PluginError, match="pip install nvidia-cuda-nvrtc"):
            quick_head_ptx(0, 1e-6)
    finally:
        nvrtc._library.cache_clear()


@pytest.mark.parametrize(("kind", "epsilon"), [(3, 1e-6), (0, -1.0), (0, float("nan"))])
def test_values_that_the_kernel_does_not_take(kind: int, epsilon: float) -> None:
    with pytest.raises(PluginError, match="is not taken"):
        quick_head_ptx(kind, epsilon)


# What it tells TensorRT. The module below has the names of `tensorrt.plugin` in 10.16 and 11.4 that the plugin uses.


class Expression(str):
    """A symbolic size, or one made of it: its text."""


class TensorDesc:
    def __init__(self, shape_expr: tuple[Expression, ...], dtype: str) -> None:
        self.shape_expr = shape_expr
        self.dtype = dtype


class KernelLaunchParams:
    grid_x: Any = None
    block_x: Any = None
    shared_mem: Any = None


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class FakeTensorRT:
    """A `tensorrt` module that keeps what is registered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registered: dict[str, Callable[..., Any]] = {}
        self.implemented: dict[str, Callable[..., Any]] = {}
        plugin: Any = ModuleType("tensorrt_of_this_test.plugin")
        plugin.TensorDesc, plugin.KernelLaunchParams, plugin.SymIntExprs = (
            TensorDesc,
            KernelLaunchParams,
            SymIntExprs,
        )
        plugin.SymInt32 = Expression
        plugin.from_shape_expr = TensorDesc
        plugin.register = lambda name: lambda function: self.registered.update({name: function})
        plugin.aot_impl = lambda name: lambda function: self.implemented.update({name: function})
        package: Any = ModuleType("tensorrt_of_this_test")
        package.plugin, package.__path__, package.__version__ = plugin, [], "11.4.0"
        package.float32, package.float16, package.bfloat16, package.int32 = (
            "float32",
            "float16",
            "bfloat16",
            "int32",
        )
        monkeypatch.setitem(sys.modules, "tensorrt_of_this_test", package)
        monkeypatch.setitem(sys.modules, "tensorrt_of_this_test.plugin", plugin)
        self.module = package


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(monkeypatch)
    register_quick_head(fake.module)
    return fake


def tensors(hidden_type: str) -> list[TensorDesc]:
    shapes = [("B", "H"), ("H",), ("n", "H"), ("B",), ("n",)]
    kinds = [hidden_type] + ["float32"] * 4
    return [
        TensorDesc(tuple(map(Expression, shape)), kind) for shape, kind in zip(shapes, kinds, strict=True)
    ]


def test_outputs_have_the_shapes_of_the_reference(tensorrt: FakeTensorRT) -> None:
    outputs = tensorrt.registered[OPERATOR](*tensors("float16"), np.float32(1e-6))
    assert [(output.shape_expr, output.dtype) for output in outputs] == [
        (("B", "n"), "float32"),
        (("B",), "float32"),
        (("B",), "float32"),
    ]


@pytest.mark.parametrize(("name", "kind"), [("float32", 0), ("float16", 1), ("bfloat16", 2)])
def test_it_is_launched_for_every_row(tensorrt: FakeTensorRT, name: str, kind: int) -> None:
    implement = tensorrt.implemented[OPERATOR]
    found = implement(*tensors(name), np.array([1e-5], np.float32), (), 0)
    kernel, ptx, launch, integers = found
    assert (kernel, ptx) == (KERNEL, quick_head_ptx(kind, 1e-5))
    assert (launch.grid_x, launch.block_x, launch.shared_mem) == ("B", 512, 128)
    assert integers == ["H", "n"]


def test_other_types_are_refused(tensorrt: FakeTensorRT) -> None:
    with pytest.raises(PluginError, match="hidden is int32; it must be float32, float16 or bfloat16"):
        tensorrt.implemented[OPERATOR](*tensors("int32"), np.float32(1e-6), (), 0)


def test_signatures_are_what_tensorrt_reads(tensorrt: FakeTensorRT) -> None:
    """It wants tensors, then attributes, then outputs and tactic, by annotations that are types."""
    described = typing.get_type_hints(tensorrt.registered[OPERATOR])
    inputs = ["hidden", "norm_weight", "score_rows", "temperature", "bins"]
    assert list(described) == [*inputs, "epsilon", "return"]
    assert all(described[name] is TensorDesc for name in inputs)
    assert described["epsilon"] == npt.NDArray[np.float32]
    assert described["return"] == tuple[TensorDesc, TensorDesc, TensorDesc]
    implemented = typing.get_type_hints(tensorrt.implemented[OPERATOR])
    assert list(implemented) == [*inputs, "epsilon", "outputs", "tactic", "return"]
    assert typing.get_args(implemented["return"])[2:] == (KernelLaunchParams, SymIntExprs)


def test_a_tensorrt_without_python_plugins_is_refused() -> None:
    module = SimpleNamespace(__name__="tensorrt_without_plugins", __version__="1.7.1")
    with pytest.raises(PluginError, match=r"has no Python plugins .*zreward plugins build"):
        register_quick_head(module)


# NVIDIA's own Python classes, without their library.

IN_BINDINGS = """
import json
import tensorrt

class Registry:
    def register_creator(self, creator, namespace):
        self.creator = creator

    def get_creator(self, name, version, namespace):
        return self.creator

registry = Registry()
tensorrt.get_plugin_registry = lambda: registry
from zreward.export.plugins.quick_head import OPERATOR, register_quick_head
register_quick_head(tensorrt)
from tensorrt.plugin import _lib
plugin, creator = _lib.QDP_REGISTRY[OPERATOR], registry.creator
print(json.dumps({
    "creator": [creator.name, creator.plugin_version, creator.plugin_namespace],
    "attributes": [[field.name, field.type.name] for field in creator.field_names],
    "inputs": plugin.input_tensor_names,
    "outputs": plugin.num_outputs,
    "ahead_of_time": plugin.aot_impl_attr_names,
    "registry": [name for name in ("load_library", "get_creator") if hasattr(tensorrt.IPluginRegistry, name)],
    "plugins_in_networks": hasattr(tensorrt.INetworkDefinition, "add_plugin_v3"),
}))
"""


@on_linux_x86_64
@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_bindings_take_it(version: str, tmp_path: Path) -> None:
    """Their own checks of signatures run, and the names that `PluginLibrary.load` uses are there."""
    environment = bindings_environment(version, tmp_path)
    command = [sys.executable, "-c", IN_BINDINGS]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "creator": ["RubricExpectation", "1", "zreward"],
        "attributes": [["epsilon", "FLOAT32"]],
        "inputs": ["hidden", "norm_weight", "score_rows", "temperature", "bins"],
        "outputs": 3,
        "ahead_of_time": ["epsilon"],
        "registry": ["load_library", "get_creator"],
        "plugins_in_networks": True,
    }

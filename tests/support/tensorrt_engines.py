"""Engines that compute: TensorRT's real classes by signature, ONNX Runtime behind them, on the memory of `FakeDriver`.

`write_engine` puts an engine into a bundle's directory as `zreward engine` would, with files that only name a graph.
`FakeLibrary` is the module that loads them. It holds the runtime to TensorRT's rules: every input has a shape within
the profile, every tensor an address, a run has all of its memory, scratch is large enough, a capture follows a run of
the same shapes, and a graph is not launched once its context was changed.
"""

from __future__ import annotations

import ctypes
import json
import math
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from tests.support.cuda_driver import FakeDriver
from tests.support.tensorrt_api import Checked, CheckedModule
from zreward.bundle import Bundle
from zreward.engines import (
    BuiltEngine,
    EngineInfo,
    GraphEngine,
    engine_name,
    file_sha256,
    write_engine_info,
)
from zreward.export.tensorrt.profiles import profiles
from zreward.plugins import OPERATORS
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.runtime.backends.ort import OrtSession

GRAPHS = ("vision", "decoder")
PLUGIN_LAYERS = 7
"""Of a decoder that was built with plugins."""
_TYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}

Shape = tuple[int, ...]


def write_engine(
    bundle: Bundle, flavour: str, version: str, *, images: int = 8, **changes: Any
) -> BuiltEngine:
    """An engine of `bundle` that fits a GPU of compute capability 8.9, or another by `changes` of its record."""
    sizes = profiles(bundle.contract, PromptEncoder(bundle.contract, load_tokenizer(bundle.path)), images)
    plugins = changes.get("plugins", {})
    kinds = changes.get("compute_capabilities", ("8.0+",) if flavour == "tensorrt-rtx" else ("8.9",))
    path = bundle.path / "engines" / engine_name(flavour, kinds, with_plugins=bool(plugins))
    path.mkdir(parents=True)
    graphs = {}
    for graph in GRAPHS:
        file = path / f"{graph}.engine"
        file.write_text(json.dumps({"graph": graph, "engine": path.name}))
        inputs = {v.name: tuple(v.shape) for v in session_of(bundle, graph)._session.get_inputs()}
        n_plugins = PLUGIN_LAYERS if plugins and graph == "decoder" else 0
        graphs[graph] = GraphEngine(file.stat().st_size, file_sha256(file), inputs, sizes[graph], n_plugins)
    facts: dict[str, Any] = {
        "flavour": flavour,
        "tensorrt_version": version,
        "compute_capabilities": kinds,
        "precision": "fp32",
        "bundle_sha256": bundle.sha256,
        "plugins": plugins,
        "graphs": graphs,
        "zreward_version": "0.1.0",
    }
    info = EngineInfo(**{**facts, **changes})
    write_engine_info(path, info)
    return BuiltEngine(path, info)


_sessions: dict[tuple[str, str], OrtSession] = {}


def session_of(bundle: Bundle, graph: str) -> OrtSession:
    """ONNX Runtime as the provider cpu runs it, on one thread; copies of a bundle share it."""
    if (bundle.sha256, graph) not in _sessions:
        path = bundle.path / bundle.manifest.graphs[graph]
        _sessions[bundle.sha256, graph] = OrtSession(path, threads=1)
    return _sessions[bundle.sha256, graph]


class FakeLibrary(CheckedModule):
    """The module of TensorRT or TensorRT-RTX, whose engines are those of `bundle`.

    Attributes:
        scratch_bytes: that a context wants.
        refuses: names of calls that answer with a failure, and the error that the library then logs.
        without_plugins: operators whose plugins are not in any engine, whatever its record says.
        contexts: execution contexts that are alive.
        runs: shapes of every run that was enqueued, with the profile.
    """

    def __init__(self, module: ModuleType, driver: FakeDriver, bundle: Bundle) -> None:
        super().__init__(module, {}, starts=())
        self.driver, self.bundle, self.real = driver, bundle, module
        self.scratch_bytes = 10_000
        self.refuses: dict[str, str] = {}
        self.without_plugins: tuple[str, ...] = ()
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.engines: weakref.WeakSet[FakeEngine] = weakref.WeakSet()
        self.runs: list[tuple[int, dict[str, Shape]]] = []
        self.listeners: list[Any] = []
        self._sessions = {graph: session_of(bundle, graph) for graph in GRAPHS}
        self._answers = {
            "Runtime.deserialize_cuda_engine": self._deserialized,
            "ICudaEngine.num_io_tensors": lambda engine: len(engine.tensors),
            "ICudaEngine.num_optimization_profiles": lambda engine: len(engine.record.profiles),
            "ICudaEngine.device_memory_size_v2": lambda engine: self.scratch_bytes,
            "ICudaEngine.get_tensor_name": lambda engine, index: list(engine.tensors)[index],
            "ICudaEngine.get_tensor_location": lambda engine, name: self._location(name),
            "ICudaEngine.get_tensor_mode": lambda engine, name: engine.tensors[name][0],
            "ICudaEngine.get_tensor_dtype": lambda engine, name: self._dtype(engine.tensors[name][1]),
            "ICudaEngine.create_runtime_config": lambda engine: Checked(self, module.IRuntimeConfig),
            "ICudaEngine.create_execution_context": self._context,
            "EngineInspector.get_engine_information": self._layers,
            "IPluginRegistry.load_library": object(),
            "IPluginRegistry.get_creator": object(),
            "IExecutionContext.set_device_memory": FakeContext.set_device_memory,
            "IExecutionContext.set_optimization_profile_async": FakeContext.set_profile,
            "IExecutionContext.set_input_shape": FakeContext.set_input_shape,
            "IExecutionContext.get_tensor_shape": FakeContext.get_tensor_shape,
            "IExecutionContext.set_tensor_address": FakeContext.set_tensor_address,
            "IExecutionContext.execute_async_v3": FakeContext.execute,
        }

    def Runtime(self, listener: Any) -> Checked:  # noqa: N802  # the library's name
        self.listeners = [listener]
        if self.refused("Runtime"):
            raise TypeError("factory function returned nullptr")
        return Checked(self, self.real.Runtime)

    def get_plugin_registry(self) -> Checked:
        return Checked(self, self.real.IPluginRegistry)

    def tensors(self, graph: str) -> list[str]:
        """Names of the inputs and outputs of a graph."""
        session = self._sessions[graph]._session
        return [value.name for value in (*session.get_inputs(), *session.get_outputs())]

    def refused(self, call: str) -> bool:
        """Whether a call is to fail; the library then says why."""
        if call not in self.refuses:
            return False
        for listener in self.listeners:
            listener.log(self.real.ILogger.Severity.ERROR, self.refuses[call])
        return True

    def _deserialized(self, number: Any, data: bytes) -> Checked | None:
        if self.refused("deserialize_cuda_engine"):
            return None
        graph = json.loads(data)["graph"]
        (record,) = {
            id(e): e.info.graphs[graph] for e in _engines(self.bundle) if e.file(graph).read_bytes() == data
        }.values()
        engine = FakeEngine(self, graph, record, self._sessions[graph])
        self.engines.add(engine)
        return Checked(self, self.real.ICudaEngine, engine)

    def _context(self, engine: FakeEngine, how: Any) -> Checked | None:
        if self.refused("create_execution_context"):
            return None
        if isinstance(how, Checked):
            strategies = [call for call in self.calls if call.startswith("IRuntimeConfig")]
            assert strategies[-2:] == [
                "IRuntimeConfig.set_execution_context_allocation_strategy",
                "IRuntimeConfig.cuda_graph_strategy",
            ]
        else:
            assert how == self.real.ExecutionContextAllocationStrategy.USER_MANAGED
        context = FakeContext(self, engine)
        self.contexts.add(context)
        return Checked(self, self.real.IExecutionContext, context)

    def _layers(self, engine: FakeEngine, form: Any) -> str:
        assert form == self.real.LayerInformationFormat.JSON
        plugins = [OPERATORS[index % len(OPERATORS)] for index in range(engine.record.plugin_layers)]
        layers = [{"Name": "a product", "LayerType": "gemm"}]
        layers += [
            {"Name": f"{name}_{index}", "LayerType": "PluginV3", "PluginType": name}
            for index, name in enumerate(plugins)
            if name not in self.without_plugins
        ]
        return (
            "" if self.refused("get_engine_information") else json.dumps({"Layers": layers, "Bindings": []})
        )

    def _location(self, name: str) -> Any:
        return getattr(self.real.TensorLocation, "HOST" if name in self.refuses else "DEVICE")

    def _dtype(self, dtype: np.dtype[Any]) -> Any:
        return {"float32": self.real.DataType.FLOAT, "int64": self.real.DataType.INT64}[dtype.name]


class FakeEngine:
    """An engine in the memory of the GPU: one graph, by ONNX Runtime."""

    def __init__(self, library: FakeLibrary, graph: str, record: GraphEngine, session: OrtSession) -> None:
        self.library, self.graph, self.record, self.session = library, graph, record, session
        mode = library.real.TensorIOMode
        self.tensors = {v.name: (mode.INPUT, _TYPES[v.type]) for v in session._session.get_inputs()}
        self.tensors |= {v.name: (mode.OUTPUT, _TYPES[v.type]) for v in session._session.get_outputs()}
        self.output_axes = {v.name: tuple(v.shape) for v in session._session.get_outputs()}


class FakeContext:
    """An execution context that remembers what it was told, and refuses to run on anything less."""

    def __init__(self, library: FakeLibrary, engine: FakeEngine) -> None:
        self.library, self.engine, self.driver = library, engine, library.driver
        self.profile: int | None = None
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.flushed: dict[str, Shape] | None = None
        self.changes = 0
        self.has_scratch = False

    def set_device_memory(self, address: int, n_bytes: int) -> None:
        assert n_bytes >= self.library.scratch_bytes and address % 256 == 0
        assert self.driver.is_device(address, n_bytes)
        self.has_scratch = True

    def set_profile(self, profile: int, stream: int) -> bool:
        if self.library.refused("set_optimization_profile_async"):
            return False
        assert stream in self.driver._streams
        self.profile, self.shapes = profile, {}
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if self.library.refused("set_input_shape"):
            return False
        assert (
            self.profile is not None and self.engine.tensors[name][0] == self.library.real.TensorIOMode.INPUT
        )
        axes = self.engine.record.profiles[self.profile].axes
        for axis, size in zip(self.engine.record.inputs[name], shape, strict=True):
            assert size == axis if isinstance(axis, int) else axes[axis][0] <= size <= axes[axis][2]
        self.changes += 1
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        return (-1,) if self.library.refused("get_tensor_shape") else self.output_shape(name)

    def output_shape(self, name: str) -> Shape:
        assert set(self.shapes) == set(self.engine.record.inputs)
        sizes = {
            axis: size
            for key, shape in self.shapes.items()
            for axis, size in zip(self.engine.record.inputs[key], shape, strict=True)
            if isinstance(axis, str)
        }
        return tuple(_size(axis, sizes) for axis in self.engine.output_axes[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.library.refused("set_tensor_address"):
            return False
        assert name in self.engine.tensors and address % 256 == 0
        self.changes += 1
        self.addresses[name] = address
        return True

    def execute(self, stream: int) -> bool:
        if self.library.refused("execute_async_v3"):
            return False
        capturing = self.driver.capturing(stream)
        assert self.has_scratch and set(self.addresses) == set(self.engine.tensors)
        if capturing:
            if self.library.refused("capture"):
                return False
            assert self.flushed == self.shapes, "a capture before a run of these shapes"
        self.flushed = dict(self.shapes)
        described = {name: (shape, self.addresses[name]) for name, shape in self.shapes.items()}
        outputs = {name: (self.output_shape(name), self.addresses[name]) for name in self.engine.output_axes}
        for name, (shape, address) in (described | outputs).items():
            n_bytes = math.prod(shape) * self.engine.tensors[name][1].itemsize
            assert self.driver.is_device(address, max(n_bytes, 1)), f"{name} has no memory"
        if not capturing:
            self.library.runs.append((self.profile or 0, dict(self.shapes)))
        changes = self.changes

        def compute() -> None:
            assert not capturing or self.changes == changes, "the context of a graph was changed"
            arrays = {name: _read(self.engine, name, *where).copy() for name, where in described.items()}
            results = self.engine.session.run(list(outputs), arrays)
            for (name, where), result in zip(outputs.items(), results, strict=True):
                _read(self.engine, name, *where)[...] = result

        self.driver.enqueue(stream, compute)
        return True


def _engines(bundle: Bundle) -> tuple[BuiltEngine, ...]:
    from zreward.engines import engines_of

    return engines_of(bundle)


def _size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """An axis of an output, which ONNX Runtime names by an expression of those of the inputs."""
    return axis if isinstance(axis, int) else int(eval(axis, {"floor": math.floor}, dict(sizes)))


def _read(engine: FakeEngine, name: str, shape: Shape, address: int) -> np.ndarray[Any, Any]:
    dtype = engine.tensors[name][1]
    n_bytes = math.prod(shape) * dtype.itemsize
    data = (ctypes.c_uint8 * n_bytes).from_address(address)
    return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)

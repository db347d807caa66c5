"""From a bundle to running engines: which engine fits, that its bytes are those that were built, and loading it.

Nothing reaches TensorRT unchecked: it trusts an engine as it trusts code, and a library of plugins is code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableSequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from zreward.bundle import Bundle
from zreward.cuda_device import compute_capability
from zreward.engines import STATES, BuiltEngine, EngineInfo, select_engine
from zreward.errors import BackendError
from zreward.plugins import PluginLibrary
from zreward.runtime.backends import OpenGraphs
from zreward.runtime.backends.tensorrt.context import LoadedEngine, Scratch
from zreward.runtime.backends.tensorrt.device import Device
from zreward.runtime.backends.tensorrt.memory import ALIGNMENT, Memory
from zreward.runtime.backends.tensorrt.session import EngineSession
from zreward.tensorrt_library import error_listener, flavour_named, load_tensorrt, quoted

_REMEMBERED_ERRORS = 16
_AGAIN = "build it again with `zreward engine BUNDLE --force`"


def open_engine(bundle: Bundle, *, flavour: str, device: int = 0, plugins: Path | None = None) -> OpenGraphs:
    """Load the engine of `bundle` that runs on this machine.

    Args:
        bundle: exported for TensorRT.
        flavour: "tensorrt" or "tensorrt-rtx".
        device: number of the GPU, as CUDA counts them.
        plugins: library to load; an engine that was built with it is preferred to one without plugins.

    Raises:
        BackendError: the bundle has no engine for this machine; the driver, the library, cuda-bindings or plugins are
            missing; or the GPU has no memory for it.
        BundleError: a file of the engine was altered.
        PluginError: the library of plugins was altered, or does not fit this TensorRT.
    """
    library = flavour_named(flavour)
    capability = compute_capability(device)
    trt = load_tensorrt(flavour)
    built = select_engine(
        bundle,
        flavour=flavour,
        tensorrt_version=str(trt.__version__),
        compute_capability=capability,
        plugins=plugins if library.takes_plugins else None,
    )
    gpu = Device(device)
    try:
        sessions, runtime = _sessions(bundle, trt, built, plugins, gpu)
    except BaseException:
        gpu.close()
        raise

    def release() -> None:
        for session in sessions.values():
            session.close()
        runtime.clear()

    return OpenGraphs(
        provider=flavour,
        details=f"{library.title} {trt.__version__}, engine {built.path.name}",
        sessions=sessions,
        images=_most_images(built.info),
        packages=(library.package, "cuda-bindings"),
        close=partial(gpu.close, release),
    )


def _sessions(
    bundle: Bundle, trt: ModuleType, built: BuiltEngine, plugins: Path | None, device: Device
) -> tuple[dict[str, EngineSession], list[Any]]:
    """A session for each graph, and what must live as long as they do."""
    said: deque[str] = deque(maxlen=_REMEMBERED_ERRORS)
    with device.in_use():
        for sha256 in built.info.plugins.values():
            assert plugins is not None, "select_engine takes no engine whose plugins are missing"
            PluginLibrary.open(plugins, sha256=sha256).load(trt)
        listener = error_listener(trt, said)
        runtime = _started(trt, listener, said)
        engines = {graph: _loaded(trt, runtime, built, graph, said) for graph in built.info.graphs}
        memory = Memory(device)
        n_bytes = max(ALIGNMENT, *(int(engine.engine.device_memory_size_v2) for engine in engines.values()))
        scratch = Scratch(device.allocate(n_bytes), n_bytes)
        states = frozenset(state.output for state in bundle.manifest.states)
        sessions = {
            graph: EngineSession(engine, built.info.graphs[graph], scratch, memory, states)
            for graph, engine in engines.items()
        }
    return sessions, [runtime, listener]


def _started(trt: ModuleType, listener: Any, said: MutableSequence[str]) -> Any:
    try:
        return trt.Runtime(listener)
    except (TypeError, RuntimeError) as error:  # a constructor of pybind11 that was given no object
        raise BackendError(
            f"TensorRT {trt.__version__} does not start{quoted([*said, str(error)])}; check the driver with "
            "`nvidia-smi`"
        ) from None


def _loaded(
    trt: ModuleType, runtime: Any, built: BuiltEngine, graph: str, said: MutableSequence[str]
) -> LoadedEngine:
    file, record = built.file(graph), built.info.graphs[graph]
    said.clear()
    try:
        engine = runtime.deserialize_cuda_engine(built.read(graph))
    except RuntimeError as error:
        said.append(str(error))
        engine = None
    if engine is None:
        raise BackendError(f"{file}: TensorRT {trt.__version__} cannot load it{quoted(said)}; {_AGAIN}")
    types: dict[Any, dict[str, np.dtype[Any]]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BackendError(
                f"{file}: wants {name} in the memory of the host, which no graph of ours does; {_AGAIN}"
            )
        types[engine.get_tensor_mode(name)][name] = _dtype(trt, engine.get_tensor_dtype(name), file, name)
    inputs, outputs = types.values()
    if set(inputs) != set(record.inputs) or engine.num_optimization_profiles != len(record.profiles):
        raise BackendError(f"{file}: not the engine that its engine.json describes; {_AGAIN}")
    return LoadedEngine(trt, engine, graph, inputs, outputs, said)


def _dtype(trt: ModuleType, found: Any, file: Path, name: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(trt.nptype(found))
    except TypeError:
        raise BackendError(f"{file}: {name} is {found.name}, which NumPy does not have; {_AGAIN}") from None
    return dtype


def _most_images(info: EngineInfo) -> int:
    """Most images that its profiles take in one run."""
    return max(
        profile.axes[STATES][2] for profile in info.graphs["decoder"].profiles if STATES in profile.axes
    )

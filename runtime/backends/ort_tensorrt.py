"""What ONNX Runtime's TensorRT provider needs besides the CUDA provider: the library, options, and plugins.

The provider takes the parts of a graph that TensorRT's parser knows, builds an engine of each for every new range of
sizes, and leaves the rest to the CUDA provider. Functions are inlined before, so the operators of the domain zreward
run as their bodies. It makes plugins of nodes in the domain trt.plugins alone; with a library of plugins, those
operators are therefore renamed while the graph is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from zreward.errors import BackendError, UsageError
from zreward.onnx_names import with_names
from zreward.plugins import NAMESPACE, OPERATORS, PluginLibrary
from zreward.runtime.backends.options import GpuOptions
from zreward.tensorrt_library import load_tensorrt

_PLUGIN_DOMAIN = "trt.plugins"
_LIBRARY = "libonnxruntime_providers_tensorrt.so"


def prepare_tensorrt(runtime: ModuleType, gpu: GpuOptions) -> None:
    """Load the TensorRT that this onnxruntime is built for, and the library of plugins into it.

    Raises:
        BackendError: it is not installed, or of another major version.
        PluginError: the library was altered, or is for another TensorRT.
        UsageError: the folder for engines does not exist.
    """
    if gpu.engine_cache is not None and not gpu.engine_cache.is_dir():
        raise UsageError(f"{gpu.engine_cache}: no such folder for engines; create it first")
    library = PluginLibrary.open(gpu.plugins) if gpu.plugins is not None else None
    tensorrt = load_tensorrt("tensorrt")
    wanted, found = _wanted_major(runtime), str(tensorrt.__version__).partition(".")[0]
    if wanted is not None and wanted != found:
        raise BackendError(
            f"onnxruntime-gpu {runtime.__version__} is built for TensorRT {wanted}, and {tensorrt.__version__} is "
            f"installed; run `pip install 'tensorrt=={wanted}.*'`, or use --provider tensorrt"
        )
    if library is not None:
        library.load(tensorrt)


def tensorrt_options(gpu: GpuOptions) -> dict[str, str]:
    """Options of the provider. Without those for 16 bits it makes strongly typed networks, as the graphs are."""
    options = {"device_id": str(gpu.device)}
    if gpu.engine_cache is not None:
        folder = str(gpu.engine_cache)
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
    if gpu.plugins is not None:
        options["trt_extra_plugin_lib_paths"] = str(gpu.plugins)
    return options


def plugin_graph(path: Path) -> bytes:
    """The graph with the operators that plugins serve in the domain where the provider looks for plugins."""
    names = {(NAMESPACE, name): (_PLUGIN_DOMAIN, name) for name in OPERATORS}
    return with_names(path.read_bytes(), names, {_PLUGIN_DOMAIN: 1})


def _wanted_major(runtime: ModuleType) -> str | None:
    """The major version of TensorRT that the provider links to; None where its library cannot be read."""
    library = Path(str(runtime.__file__)).parent / "capi" / _LIBRARY
    try:
        found = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes())
    except OSError:
        return None
    return found[1].decode() if found else None

"""ONNX Runtime on a GPU: its CUDA provider, and its TensorRT provider with the CUDA provider behind it.

ONNX Runtime falls back to the CPU where a provider does not load, or has no kernel for a node. Here both are errors:
who asks for a GPU would otherwise wait for minutes and never learn why.

States stay on the GPU between the stages of a score, as `DeviceTensor`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle
from zreward.cuda_device import compute_capability, driver_cuda_version
from zreward.errors import BackendError
from zreward.runtime.backends import OpenGraphs
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.backends.ort import ERRORS_ONLY, WEIGHTS_FOLDER
from zreward.runtime.backends.ort_tensorrt import plugin_graph, prepare_tensorrt, tensorrt_options

_CUDA, _TENSORRT, _CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
_NAMES = {"cuda": (_CUDA,), "ort-tensorrt": (_TENSORRT, _CUDA)}
_INSTALL = "pip install 'zreward[gpu]'"
_LEAST_BFLOAT16 = (8, 0)

_HEAVY = (
    "Attention",
    "CausalConvWithState",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "Gemm",
    "LayerNormalization",
    "MatMul",
    "MatMulBnb4",
    "MatMulNBits",
    "RMSNormalization",
    "Scan",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Softmax",
)
"""What must not run on the CPU. Arithmetic on shapes does, by ONNX Runtime's own choice."""

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class DeviceTensor:
    """An output that stays where it was computed, for the next run of the same session."""

    def __init__(self, value: Any, owner: Any) -> None:
        self.value = value
        self._owner = owner  # the memory is the session's

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_NUMPY_TYPES[self.value.data_type()])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array: NDArray[Any] = self.value.numpy()
        return array if dtype is None else array.astype(dtype)


class GpuSession:
    """One graph in an onnxruntime.InferenceSession on a GPU; outputs named in `resident` stay there."""

    def __init__(self, session: Any, resident: Iterable[str], device: int, title: str) -> None:
        self._session, self._resident, self._device, self._title = session, frozenset(resident), device, title
        self.inputs = frozenset(value.name for value in session.get_inputs())

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, DeviceTensor):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in outputs:
            binding.bind_output(name, *(("cuda", self._device) if name in self._resident else ()))
        try:
            self._session.run_with_iobinding(binding)
            return [
                DeviceTensor(value, self._session) if name in self._resident else value.numpy()
                for name, value in zip(outputs, binding.get_outputs(), strict=True)
            ]
        except Exception as error:  # onnxruntime raises one class per status code, all bare Exceptions
            raise BackendError(f"{self._title} failed while running a graph ({error})") from None


def open_on_gpu(bundle: Bundle, *, provider: str, threads: int | None, gpu: GpuOptions) -> OpenGraphs:
    """Load the graphs of `bundle` on a GPU.

    Args:
        bundle: exported for what `provider` runs.
        provider: "cuda" or "ort-tensorrt".
        threads: for arithmetic on shapes, which stays on the CPU.
        gpu: how the GPU is used.

    Raises:
        BackendError: something is not installed or too old, there is no such GPU, or a part would run on the CPU.
        PluginError: the library of plugins was altered, or does not fit.
        UsageError: the folder for engines does not exist.
    """
    runtime = _runtime(provider)
    _check_gpu(bundle, runtime, gpu.device)
    if provider == "ort-tensorrt":
        prepare_tensorrt(runtime, gpu)
    sessions = {}
    for name, file in bundle.manifest.graphs.items():
        session = _session(runtime, bundle.path / file, provider, threads, gpu)
        resident = [state.output for state in bundle.manifest.states] if name == "decoder" else []
        sessions[name] = GpuSession(session, resident, gpu.device, f"onnxruntime {runtime.__version__}")
    details = f"ONNX Runtime's {_NAMES[provider][0]} on GPU {gpu.device}"
    return OpenGraphs(provider, details, sessions, packages=("onnxruntime-gpu",))


def _runtime(provider: str) -> ModuleType:
    """onnxruntime with the provider, its libraries loaded."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(f"onnxruntime is not installed; for GPUs, install it with `{_INSTALL}`") from None
    runtime: ModuleType = onnxruntime
    runtime.set_default_logger_severity(ERRORS_ONLY)  # every session warns that its provider is not a plugin
    for name in _NAMES[provider]:
        if name not in runtime.get_available_providers():
            raise BackendError(_without_provider(runtime, name))
    return runtime


def _without_provider(runtime: ModuleType, name: str) -> str:
    installed = [package for package in ("onnxruntime", "onnxruntime-gpu") if _is_installed(package)]
    again = f"`pip uninstall {' '.join(installed) or 'onnxruntime'}` and then `{_INSTALL}`"
    if len(installed) > 1:
        return (
            "onnxruntime and onnxruntime-gpu are both installed. They have the same files, and those of the one "
            f"for CPUs won: this onnxruntime has no {name}. Run {again}"
        )
    return f"this onnxruntime ({runtime.__version__}) has no {name}, because it is the build for CPUs; run {again}"


def _is_installed(package: str) -> bool:
    try:
        return distribution(package) is not None
    except PackageNotFoundError:
        return False


def _check_gpu(bundle: Bundle, runtime: ModuleType, device: int) -> None:
    """A GPU with a driver that this build of onnxruntime can use, and CUDA's libraries."""
    capability = compute_capability(device)
    built = str(getattr(runtime, "cuda_version", None) or "")
    major, supported = int(built.partition(".")[0] or 0), driver_cuda_version()
    if major > supported[0]:
        raise BackendError(
            f"onnxruntime-gpu {runtime.__version__} is built with CUDA {built}, and the driver supports CUDA "
            f"{supported[0]}.{supported[1]}; install a newer driver, which `nvidia-smi` shows"
        )
    computes = bundle.manifest.weights == "bf16"
    if computes and tuple(map(int, capability.split("."))) < _LEAST_BFLOAT16:
        raise BackendError(
            f"{bundle.path}: this bundle computes in bfloat16, and GPU {device} (compute capability {capability}) "
            "has no products in it; export with --weights fp16"
        )


def _session(runtime: ModuleType, path: Path, provider: str, threads: int | None, gpu: GpuOptions) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = int(threads or 1)
    # Version 1.31.1 lets the length of the past, which lies in the CPU's memory, be overwritten before the mask is
    # made from it, where it plans the reuse of memory over several devices (see microsoft/onnxruntime issue 21349).
    options.enable_mem_reuse = False
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    graph: str | bytes = str(path)
    if gpu.plugins is not None:
        graph = plugin_graph(path)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    cuda = {"device_id": str(gpu.device), "use_tf32": "0"}
    if gpu.memory_bytes is not None:
        cuda["gpu_mem_limit"] = str(gpu.memory_bytes)
    providers: list[Any] = [(_CUDA, cuda), _CPU]
    if provider == "ort-tensorrt":
        providers.insert(0, (_TENSORRT, tensorrt_options(gpu)))
    said = _preload(runtime)
    try:
        session = runtime.InferenceSession(graph, sess_options=options, providers=providers)
    except Exception as error:  # as above
        if said:  # the graph may have been refused by the CPU
            raise BackendError(_not_loaded(runtime, _NAMES[provider][0], said)) from None
        raise BackendError(
            f"{path}: onnxruntime {runtime.__version__} cannot load this graph on GPU {gpu.device} "
            f"({error}); check the bundle with `zreward verify`, and the GPU with `nvidia-smi`"
        ) from None
    _check_providers(runtime, session, _NAMES[provider], said)
    _check_assignment(session, path)
    return session


def _preload(runtime: ModuleType) -> str:
    """Load CUDA's libraries from where pip puts them; what could not be loaded, in onnxruntime's words."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # stdout is for results
        getattr(runtime, "preload_dlls", lambda: None)()
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in said.getvalue().splitlines()]
    return "; ".join(line for line in lines if line.startswith("Failed"))


def _check_providers(runtime: ModuleType, session: Any, names: Sequence[str], said: str) -> None:
    missing = [name for name in names if name not in session.get_providers()]
    if missing:
        raise BackendError(_not_loaded(runtime, missing[0], said or "it does not say why"))


def _not_loaded(runtime: ModuleType, name: str, reason: str) -> str:
    return (
        f"onnxruntime {runtime.__version__} could not load its {name} and would run on the CPU ({reason}); it needs "
        f"CUDA {getattr(runtime, 'cuda_version', None) or 'libraries'}, which `{_INSTALL}` installs"
    )


def _check_assignment(session: Any, path: Path) -> None:
    """Refuse a session that multiplies on the CPU."""
    left = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
        if node.op_type in _HEAVY
    }
    if left:
        raise BackendError(
            f"{path}: this onnxruntime has no kernels for GPUs for {', '.join(sorted(left))}, and would run them on "
            f"the CPU; upgrade it with `{_INSTALL} --upgrade`, or use --provider cpu"
        )

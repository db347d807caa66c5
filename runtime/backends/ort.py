"""ONNX Runtime on the CPU."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from zreward.errors import BackendError
from zreward.runtime.kernels import DISABLE, compiled_library
from zreward.stand_ins import needs_stand_ins, with_stand_ins

ERRORS_ONLY = 3
"""Of onnxruntime's severity scale: 2 warns about every initializer that it folds."""

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the weights of a graph lie that is not read from a file of the bundle as it is."""

_WHOLE_NUMBER_PRODUCT = b"MatMulIntegerToFloat"
_FLOAT8_ZERO = b"zreward.float8_zero"
"""Name of the zero point of inputs that a graph rounds to floats of 8 bits (`zreward.export.passes.qdq_products`)."""


class OrtSession:
    """One graph in an onnxruntime.InferenceSession; weights are mapped from the external-data file.

    Args:
        path: see `open_session`.
        threads: see `open_session`.
        packed: see `open_session`.
        plain: run the graph as it is written, without ONNX Runtime's optimizations, packed weights and the compiled
            kernels: slow, and other code than what scores. Where sums are exact only with optimizations
            (`sum_exactly`), it has those that keep the layouts.
    """

    def __init__(self, path: Path, *, threads: int | None, packed: bool = True, plain: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                "onnxruntime is not installed; install it with `pip install 'zreward[cpu]'`"
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.inter_op_num_threads = 1
        # Threads that wait for more work would hold cores while another graph, or the caller, runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = int(threads)
        # Weights that a graph dequantizes are multiplied as floats; by default their inputs would be rounded too.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        graph: str | bytes = str(path)
        data = path.read_bytes()
        if needs_stand_ins(data):
            graph = with_stand_ins(data)
            options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
        if _FLOAT8_ZERO in data:  # version 1.31.1 would make whole-number products of them, and fail
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        kernels = None if plain else compiled_library()
        if plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        sum_exactly(options, data)
        # Without optimizations, version 1.31.1 packs weights of MatMulNBits without their scales: garbage.
        if not packed or plain:  # the kernels pack their weights too
            options.add_session_config_entry("session.disable_prepacking", "1")
        elif kernels is not None:
            _register(options, kernels)
        try:
            self._session = onnxruntime.InferenceSession(
                graph, sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises one class per status code, all bare Exceptions
            raise BackendError(
                f"{path}: onnxruntime {onnxruntime.__version__} refuses this graph ({error}); "
                "check the bundle with `zreward verify`, or upgrade onnxruntime"
            ) from None
        self.inputs = frozenset(value.name for value in self._session.get_inputs())

    def run(self, outputs: list[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            results: list[NDArray[Any]] = self._session.run(outputs, inputs)
        except Exception as error:  # as above; out of memory comes this way too
            raise BackendError(f"onnxruntime failed while running a graph ({error})") from None
        return results


def _register(options: Any, kernels: Path) -> None:
    try:
        options.register_custom_ops_library(str(kernels))
    except Exception as error:  # as above
        raise BackendError(
            f"{kernels}: this library of kernels cannot be loaded ({error}); install zreward again, or set "
            f"{DISABLE}=1 to score without it"
        ) from None


def sum_exactly(options: Any, graph: bytes) -> None:
    """Have products of codes in a serialized graph summed in 32 bits; x86 without VNNI saturates in 16.

    ONNX Runtime has an exact way there, which it takes when asked. It is one of the extended optimizations, so a
    session without optimizations gets those.
    """
    if _WHOLE_NUMBER_PRODUCT not in graph or _sums_exactly():
        return
    options.add_session_config_entry("session.x64quantprecision", "1")
    levels = type(options.graph_optimization_level)
    if options.graph_optimization_level == levels.ORT_DISABLE_ALL:
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED


def _sums_exactly() -> bool:
    """Whether this processor sums uint8 × int8 products in 32 bits; False where /proc/cpuinfo does not tell."""
    try:
        flags = Path("/proc/cpuinfo").read_text().lower()
    except OSError:
        return platform.machine().lower() in ("arm64", "aarch64")
    return "vnni" in flags or "flags" not in flags  # Arm lists "features"

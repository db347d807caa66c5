"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from zreward.errors import BackendError

_ERRORS_ONLY = 3  # onnxruntime's severity scale: 2 warns about every initializer that it folds

_PRECISE = {
    # Weights that a graph dequantizes are multiplied as floats; by default their inputs would be rounded too.
    "session.qdq_matmulnbits_accuracy_level": "0",
    # Without VNNI, sums of uint8 × int8 products saturate in 16 bits; this takes the exact way there.
    "session.x64quantprecision": "1",
}


class OrtSession:
    """One graph in an onnxruntime.InferenceSession; weights are mapped from the external-data file."""

    def __init__(self, path: Path, *, threads: int | None, frugal: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                "onnxruntime is not installed; install it with `pip install 'zreward[cpu]'`"
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = int(threads)
        for key, value in _PRECISE.items():
            options.add_session_config_entry(key, value)
        if frugal:
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises one class per status code, all bare Exceptions
            raise BackendError(
                f"{path}: onnxruntime {onnxruntime.__version__} refuses this graph ({error}); "
                "check the bundle with `zreward verify`, or upgrade onnxruntime"
            ) from None

    def run(self, outputs: list[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            results: list[NDArray[Any]] = self._session.run(outputs, inputs)
        except Exception as error:  # as above; out of memory comes this way too
            raise BackendError(f"onnxruntime failed while running a graph ({error})") from None
        return results

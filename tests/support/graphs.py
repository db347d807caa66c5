"""Small ONNX graphs for tests of passes: written as text, bound to weights on disk, run by two evaluators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from zreward.checkpoint import Checkpoint
from zreward.export.weights import CheckpointTensor, Layout
from zreward.runtime.backends.ort import sum_exactly
from zreward.runtime.kernels import compiled_library
from zreward.safetensors_file import TensorInfo

Arrays = dict[str, NDArray[Any]]

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def checkpoint_of(folder: Path, tensors: Mapping[str, NDArray[Any]]) -> Checkpoint:
    """A checkpoint of nothing but `tensors` (uint16 stands for bfloat16), as plain bytes in one file."""
    file, infos = folder / "weights.bin", {}
    with file.open("wb") as out:
        for name, values in tensors.items():
            kind = _SAFETENSORS_NAMES[values.dtype.name]
            infos[name] = TensorInfo(name, kind, values.shape, file, out.tell())
            out.write(values.tobytes())
    return Checkpoint(folder, {}, infos)


def model_from_text(text: str, checkpoint: Checkpoint | None = None) -> ir.Model:
    """The graph in onnx.parser's syntax; inputs that `checkpoint` has become its lazy weights."""
    model = ir.from_proto(onnx.parser.parse_model(f"<ir_version: 10, opset_import: {OPSETS}>\n{text}"))
    for value in list(model.graph.inputs):
        if checkpoint is not None and value.name in checkpoint.tensors:
            model.graph.inputs.remove(value)
            value.const_value = CheckpointTensor(checkpoint, Layout(str(value.name)), str(value.name))
            model.graph.register_initializer(value)
    return model


OPSETS = '["": 24, "com.microsoft": 1]'


class SkipSimplifiedLayerNormalization(OpRun):  # type: ignore[misc]  # onnx is not annotated
    """ONNX Runtime's fused residual and RMS norm, for the reference evaluator."""

    op_domain = "com.microsoft"

    def _run(
        self, x: NDArray[Any], skip: NDArray[Any], weight: NDArray[Any], epsilon: float
    ) -> tuple[NDArray[Any], ...]:
        total = x + skip
        inverse = 1 / np.sqrt((total**2).mean(axis=-1, keepdims=True) + np.float32(epsilon))
        return total * inverse * weight, np.zeros_like(inverse), inverse, total


def checked_proto(model: ir.Model) -> onnx.ModelProto:
    """The model with its weights inside, once onnx.checker has accepted it."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto


def run_onnxruntime(
    model: ir.Model,
    inputs: Mapping[str, NDArray[Any]],
    *,
    optimized: bool = False,
    kernels: bool = False,
    outputs: Sequence[str] | None = None,
    **config: str,
) -> Arrays:
    """Outputs by name, all or those named, from ONNX Runtime without its own simplifications unless `optimized`.

    `kernels` has zreward's own operators run by `zreward.runtime.kernels` instead of their bodies. `config` are
    entries of the session's configuration, with "__" for the dot in their names.
    """
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if kernels:
        options.register_custom_ops_library(str(compiled_library()))
    graph = checked_proto(model).SerializeToString()
    sum_exactly(options, graph)
    for name, value in config.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = list(outputs) if outputs else [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def run_reference(model: ir.Model, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Outputs by name, from the ONNX reference evaluator."""
    has_body = any(name == SkipSimplifiedLayerNormalization.__name__ for _, name, _ in model.functions)
    evaluator = ReferenceEvaluator(
        checked_proto(model), new_ops=None if has_body else [SkipSimplifiedLayerNormalization]
    )
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))


def op_types(model: ir.Model) -> Sequence[str]:
    return [node.op_type for node in model.graph]


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Standard normal float32 values of `shape`."""
    return rng.standard_normal(shape).astype(np.float32)

"""Weights stored in 16 bits and computed in 32.

Each large matrix is stored as float16 or bfloat16 and followed by a Cast, which runtimes fold at load.
Disk and download halve; vectors, norms and the score rows stay in float32.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.export.weights import CheckpointTensor

STORED_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

_MIN_ELEMENTS = 4096


def store_weights(model: ir.Model, dtype: ir.DataType) -> int:
    """Store every checkpoint matrix of 4,096 elements or more as `dtype`."""
    if dtype is ir.DataType.FLOAT:
        return 0
    changes = 0
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if not isinstance(tensor, CheckpointTensor) or tensor.layout.rows is not None:
            continue
        if len(tensor.shape) < 2 or tensor.size < _MIN_ELEMENTS:
            continue
        builder = tape.Tape()
        cast = builder.op("Cast", [value], attributes={"to": ir.DataType.FLOAT})
        cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        convenience.replace_all_uses_with(value, cast)
        builder.nodes[0].replace_input_with(0, value)
        model.graph.insert_before(next(iter(model.graph)), builder.nodes)
        value.const_value = tensor.with_layout(name, dtype=dtype)
        value.type = ir.TensorType(dtype)
        changes += 1
    return changes

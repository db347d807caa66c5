"""The epsilon of Gated DeltaNet's key and query normalization.

transformers normalizes with x · rsqrt(Σx² + 1e-6); mobius divides by √Σx², which is NaN for a head whose
activations are all zero and differs where they are small.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import add_initializer, input_of, integers

EPSILON = 1e-6  # transformers.models.qwen3_5.modeling_qwen3_5.l2norm


def add_delta_norm_epsilon(model: ir.Model) -> int:
    """Insert `+ 1e-6` between each ReduceSumSquare and its Sqrt."""
    roots = [node for node in model.graph if node.op_type == "Sqrt" and _is_sum_of_squares(input_of(node, 0))]
    if not roots:
        if any(node.op_type == "LinearAttention" for node in model.graph):
            raise ExportError(
                "delta norm: found DeltaNet layers, but not the norms of their keys and queries"
            )
        return 0
    epsilon = add_initializer(model.graph, ir.tensor(np.float32(EPSILON), name="zreward.delta_norm_epsilon"))
    for root in roots:
        builder = tape.Tape()
        total = builder.op("Add", [input_of(root, 0), epsilon])
        model.graph.insert_before(root, builder.nodes)
        root.replace_input_with(0, total)
    return len(roots)


def normalized_heads(builder: tape.Tape, x: ir.Value, heads: int, width: int, epsilon: ir.Value) -> ir.Value:
    """x · rsqrt(Σx² + epsilon) of each head of x [B, S, heads · width]."""
    parted = builder.op("Reshape", [x, integers(builder, 0, 0, heads, width)])
    square = builder.op("ReduceSumSquare", [parted, integers(builder, -1)], attributes={"keepdims": 1})
    length = builder.op("Sqrt", [builder.op("Add", [square, epsilon])])
    row = builder.op("Div", [parted, length])
    joined: ir.Value = builder.op("Reshape", [row, integers(builder, 0, 0, heads * width)])
    return joined


def _is_sum_of_squares(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "ReduceSumSquare"

"""Matrix products of checkpoint weights in 16 bits, and everything between them in 32.

In front of each product its input is cast to the type of its weight, and behind it the result is cast back. A builder
of engines fuses the casts with the sums, norms and activations around them, which it runs in registers anyway;
between two products, 16 bits are written and read. The operators between the products of a DeltaNet take and give 16
bits, which docs/tensorrt.md allows them. What is summed over all layers (the residual stream) or over all tokens (the
state of a DeltaNet) stays in float32, and so do the two small products that set a DeltaNet's decay and write
strength.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.export.irtools import input_of, remove_unread, take_over
from zreward.export.passes.causal_conv import CAUSAL_CONV_1D
from zreward.export.passes.delta_rule import GATED_DELTA_RULE
from zreward.export.passes.score_head import LABEL_MASS
from zreward.export.weights import CheckpointTensor

_KEPT = (".linear_attn.in_proj_a.weight", ".linear_attn.in_proj_b.weight")


class Casts:
    """Values of one graph in the type of its products; a value that several products read is cast once."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self._made: dict[ir.Value, ir.Value] = {}

    def narrowed(self, builder: tape.Tape, x: ir.Value) -> ir.Value:
        """`x` in the type of the products. What `builder` holds must be inserted before the next call."""
        if self.dtype is ir.DataType.FLOAT:
            return x
        producer = x.producer()
        if producer is not None and producer.op_type == "Cast" and input_of(producer, 0).dtype is self.dtype:
            return input_of(producer, 0)
        if x not in self._made:
            cast = builder.op("Cast", [x], attributes={"to": self.dtype})
            cast.shape, cast.type = x.shape, ir.TensorType(self.dtype)
            self._made[x] = cast
        return self._made[x]

    def widened(self, builder: tape.Tape, y: ir.Value) -> ir.Value:
        """`y`, which is in the type of the products, as float32."""
        y.type = ir.TensorType(self.dtype)
        if self.dtype is ir.DataType.FLOAT:
            return y
        wide: ir.Value = builder.op("Cast", [y], attributes={"to": ir.DataType.FLOAT})
        wide.shape, wide.type = y.shape, ir.TensorType(ir.DataType.FLOAT)
        return wide


def compute_products_in(model: ir.Model, dtype: ir.DataType) -> int:
    """Compute every MatMul with a weight of the checkpoint in `dtype`, float16 or bfloat16; float32 changes nothing.

    Returns:
        How many products were changed.
    """
    if dtype is ir.DataType.FLOAT:
        return 0
    graph, casts, changes = model.graph, Casts(dtype), 0
    for node in list(graph):
        if node.op_type == LABEL_MASS:
            _store(input_of(node, 3), dtype)  # its body casts the vocabulary back
        weight = input_of(node, 1) if node.op_type == "MatMul" else None
        if weight is None or not isinstance(weight.const_value, CheckpointTensor):
            continue
        if weight.const_value.layout.source.endswith(_KEPT):
            continue
        _store(weight, dtype)
        builder = tape.Tape()
        product = builder.op("MatMul", [casts.narrowed(builder, input_of(node, 0)), weight])
        product.shape = node.outputs[0].shape
        result = casts.widened(builder, product)
        graph.insert_before(node, builder.nodes)
        take_over(graph, node.outputs, [result])
        graph.remove(node, safe=True)
        changes += 1
    _narrow_recurrence(graph, casts)
    remove_unread(graph)
    return changes


def _narrow_recurrence(graph: ir.Graph, casts: Casts) -> None:
    """Give the operators of DeltaNet layers what their projections made, and cast what they give."""
    for node in [n for n in graph if n.op_type in (CAUSAL_CONV_1D, GATED_DELTA_RULE)]:
        before, after = tape.Tape(), tape.Tape()
        node.replace_input_with(0, casts.narrowed(before, input_of(node, 0)))
        graph.insert_before(node, before.nodes)
        y = node.outputs[0]
        uses = [(use.node, use.idx) for use in y.uses()]
        wide = casts.widened(after, y)
        for user, index in uses:
            user.replace_input_with(index, wide)
        graph.insert_after(node, after.nodes)


def _store(weight: ir.Value, dtype: ir.DataType) -> None:
    tensor = weight.const_value
    assert isinstance(tensor, CheckpointTensor)
    weight.const_value = tensor.with_layout(str(tensor.name), dtype=dtype)
    weight.type = ir.TensorType(dtype)

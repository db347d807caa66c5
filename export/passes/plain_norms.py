"""ONNX Runtime's fused residual sums and norms as the standard operators that they stand for.

    SkipSimplifiedLayerNormalization(x, skip, weight)  ->  Add, RMSNormalization
    SkipLayerNormalization(x, skip, weight, bias)      ->  Add, LayerNormalization

The bodies that mobius gives them have an epsilon of their own, 1e-5, whatever the node says; here the node's counts.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import take_over

_NORMS = {
    "SkipSimplifiedLayerNormalization": ("RMSNormalization", 3),
    "SkipLayerNormalization": ("LayerNormalization", 4),
}
_SUM = 3  # position of the sum among the outputs of ONNX Runtime's operators


def unfuse_skip_norms(model: ir.Model) -> int:
    """Replace every SkipLayerNormalization and SkipSimplifiedLayerNormalization, after `remove_dead_outputs`.

    Raises:
        ExportError: one of them has other inputs than mobius gives it, or its statistics are read.
    """
    graph, changes = model.graph, 0
    for node in list(graph):
        if node.op_type not in _NORMS:
            continue
        norm, n_inputs = _NORMS[node.op_type]
        inputs = [value for value in node.inputs if value is not None]
        if len(inputs) != n_inputs or any(output.name for output in node.outputs[1:_SUM]):
            raise ExportError(f"plain norms: {node.op_type} {node.name!r} is not as expected")
        builder = tape.Tape()
        total = builder.op("Add", inputs[:2])
        for value in (total, *node.outputs[_SUM:]):  # shape inference does not know the operator's sum
            value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
        normed = builder.op(norm, [total, *inputs[2:]], attributes=attributes)
        total.name = f"{node.outputs[0].name}.sum"
        replaced = [(node.outputs[0], normed), *((old, total) for old in node.outputs[_SUM:])]
        take_over(graph, *zip(*replaced, strict=True))
        graph.insert_after(node, builder.nodes)
        graph.remove(node, safe=True)
        changes += 1
    return changes

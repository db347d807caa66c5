"""Linear weights are stored the way the product reads them.

Checkpoints hold [out, in]; a MatMul reads [in, out]. Left to the runtime, the transpose is folded at every
load, into a second copy of all weights.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience

from zreward.errors import ExportError
from zreward.export.irtools import add_initializer
from zreward.export.weights import CheckpointTensor


def transpose_weights(model: ir.Model) -> int:
    """Fold each Transpose of a checkpoint weight into the weight's layout."""
    changes = 0
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not isinstance(source.const_value, CheckpointTensor):
            continue
        permutation = node.attributes.get("perm")  # where absent, all dimensions are reversed
        matrix = len(source.const_value.shape) == 2
        if not matrix or (permutation is not None and list(permutation.as_ints()) != [1, 0]):
            raise ExportError(f"weight layout: {source.name!r} is transposed by an unexpected permutation")
        tensor = source.const_value.with_layout(f"{source.name}.transposed", transpose=True)
        convenience.replace_all_uses_with(node.outputs[0], add_initializer(model.graph, tensor))
        model.graph.remove(node, safe=True)
        changes += 1
    return changes

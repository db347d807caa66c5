"""Removal of what nobody reads: nodes, initializers, functions and optional outputs.

The score head orphans the full language head, and fused norms list statistics that only training reads;
a runtime computes an output that has a name.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

_OPTIONAL_OUTPUTS = {
    "SkipSimplifiedLayerNormalization": (1, 2, 3),
    "SkipLayerNormalization": (1, 2, 3),
    "Attention": (1, 2, 3),
}


def remove_dead_outputs(model: ir.Model) -> int:
    """Drop unread optional outputs, then unread nodes, initializers and functions."""
    changes = sum(_drop_optional_outputs(node, model.graph) for node in model.graph)
    before = len(model.graph) + len(model.graph.initializers) + len(model.functions)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    after = len(model.graph) + len(model.graph.initializers) + len(model.functions)
    return changes + before - after


def _drop_optional_outputs(node: ir.Node, graph: ir.Graph) -> int:
    dropped = 0
    for index in _OPTIONAL_OUTPUTS.get(node.op_type, ()):
        if index < len(node.outputs):
            output = node.outputs[index]
            if not output.uses() and output not in graph.outputs and output.name:
                output.name = ""  # an empty name is ONNX's mark of an absent optional output
                dropped += 1
    while len(node.outputs) > 1 and node.outputs[-1].name == "":
        node.resize_outputs(len(node.outputs) - 1)
    return dropped

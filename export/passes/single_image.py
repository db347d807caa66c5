"""What a vision tower simplifies to when it sees one image at a time.

mobius builds for a list of images: Scans over the list compute positions, results are padded to the
largest image and compacted again, and a mask keeps the images of one sequence apart. For one image a Scan
is its body, compaction keeps everything, and every patch attends to every patch.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.errors import ExportError
from zreward.export.irtools import input_of

_MASK_INPUT = 3  # of ai.onnx Attention: Q, K, V, attn_mask


def specialize_single_image(model: ir.Model) -> int:
    """Fix `image_grid_thw` to int64 [1, 3] and remove Scans, compaction and attention masks."""
    grid = next((v for v in model.graph.inputs if v.name == "image_grid_thw"), None)
    if grid is None:
        raise ExportError("single image: the vision tower has no input 'image_grid_thw'")
    grid.shape = ir.Shape([1, 3])
    changes = 0
    for node in list(model.graph):
        if node.op_type == "Scan":
            _inline_scan(model.graph, node)
        elif node.op_type == "Compress":
            convenience.replace_all_uses_with(node.outputs[0], input_of(node, 0))
            model.graph.remove(node, safe=True)
        elif node.op_type == "Attention" and _has_mask(node):
            node.replace_input_with(_MASK_INPUT, None)
        else:
            continue
        changes += 1
    if not changes:
        raise ExportError(
            "single image: the vision tower has neither Scans nor masks; was it simplified before?"
        )
    return changes


def _has_mask(attention: ir.Node) -> bool:
    return len(attention.inputs) > _MASK_INPUT and attention.inputs[_MASK_INPUT] is not None


def _inline_scan(graph: ir.Graph, scan: ir.Node) -> None:
    """Replace a Scan over one element by its body: squeeze the element in, unsqueeze the results out."""
    body = scan.attributes["body"].as_graph()
    if len(scan.inputs) != 1 or len(body.inputs) != 1:
        raise ExportError(
            f"single image: Scan {scan.name!r} carries states, which no vision tower did so far"
        )
    builder = tape.Tape()
    zero = builder.op("Constant", [], attributes={"value_ints": [0]})
    element = builder.op("Squeeze", [scan.inputs[0], zero])
    convenience.replace_all_uses_with(body.inputs[0], element)
    outputs = list(body.outputs)
    body.outputs.clear()
    for name in list(body.initializers):
        graph.register_initializer(body.initializers.pop(name))
    nodes = list(body)
    body.remove(nodes)
    results = tape.Tape()
    for old, new in zip(scan.outputs, outputs, strict=True):
        convenience.replace_all_uses_with(old, results.op("Unsqueeze", [new, zero]))
    graph.insert_before(scan, [*builder.nodes, *nodes, *results.nodes])
    graph.remove(scan, safe=True)

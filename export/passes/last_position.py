"""What only the score head reads is computed for the positions that it reads.

The head looks at one position of each row. Behind the last layer's attention nothing mixes positions any more, so the
output projection, the norm and the feed-forward network of that layer are needed there alone: for one token of a
prefix, whose other tokens only leave their states, and for the last token of each question.

    GatherND(f(x), last) = f(GatherND(x, last))    where f treats every position by itself

The pass moves the head's gathers in front of such operators, as long as nothing else reads their results.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import input_of, integers, remove_unread

_MICROSOFT = "com.microsoft"
_SUM = 3  # position of the sum among the outputs of a fused norm
_BY_POSITION = {
    ("", "Add"),
    ("", "Mul"),
    ("", "Sigmoid"),
    ("", "MatMul"),
    ("", "RMSNormalization"),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"),
}


def read_last_positions(model: ir.Model) -> int:
    """Move the gathers of `fuse_score_head` as far to the front as they can go.

    Returns:
        How many operators work on the last position alone now.

    Raises:
        ExportError: the graph does not gather the last position of [rows, tokens, width].
    """
    graph = model.graph
    last = next((value for value in graph.inputs if value.name == "last_index"), None)
    if last is None:
        raise ExportError("last position: the decoder has no input 'last_index'")
    _name_shapes_of_sums(graph)
    gathers = [node for node in graph if node.op_type == "GatherND" and _reads_index(node, last)]
    narrow = _narrow_nodes(graph, gathers)
    if not narrow:
        return 0
    builder = tape.Tape()
    index = builder.op("Unsqueeze", [last, integers(builder, 1, 2)])
    graph.insert_before(narrow[0], builder.nodes)
    results = {output for node in narrow for output in node.outputs}
    gathered: dict[ir.Value, ir.Value] = {}
    for node in narrow:
        for position, value in enumerate(node.inputs):
            if value is None or value in results or not _has_positions(value):
                continue
            if value not in gathered:
                gather = ir.Node("", "GatherND", [value, index], [ir.AttrInt64("batch_dims", 1)])
                gathered[value] = gather.outputs[0]
                gathered[value].shape, gathered[value].type = _narrowed(value), value.type
                graph.insert_before(node, gather)
            node.replace_input_with(position, gathered[value])
    for value in results:
        if _has_positions(value):
            value.shape = _narrowed(value)
    for gather in gathers:
        whole = input_of(gather, 0)
        if whole in results:
            squeeze = tape.Tape()
            flat = squeeze.op("Squeeze", [whole, integers(squeeze, 1)])
            ir.convenience.replace_all_uses_with(gather.outputs[0], flat)
            graph.insert_before(gather, squeeze.nodes)
    remove_unread(graph)
    return len(narrow)


def _name_shapes_of_sums(graph: ir.Graph) -> None:
    """The residual sum that a fused norm returns has the shape of its input, which shape inference does not know."""
    for node in graph:
        if node.op_type == "SkipSimplifiedLayerNormalization" and len(node.outputs) > _SUM:
            total, normed = node.outputs[_SUM], node.outputs[0]
            total.shape, total.type = total.shape or normed.shape, total.type or normed.type


def _reads_index(gather: ir.Node, last: ir.Value) -> bool:
    producer = input_of(gather, 1).producer()
    return producer is not None and input_of(producer, 0) is last


def _narrow_nodes(graph: ir.Graph, gathers: list[ir.Node]) -> list[ir.Node]:
    """Operators that only the gathers read, directly or through one another, in the graph's order."""
    found: set[ir.Node] = set(gathers)
    narrow: list[ir.Node] = []
    for node in reversed(list(graph)):
        uses = [use for output in node.outputs for use in output.uses()]
        if (node.domain, node.op_type) not in _BY_POSITION or not uses:
            continue
        if any(output.is_graph_output() for output in node.outputs):
            continue
        if not all(use.node in found and (use.node not in gathers or use.idx == 0) for use in uses):
            continue
        if _treats_positions_alike(node):
            found.add(node)
            narrow.append(node)
    return narrow[::-1]


def _treats_positions_alike(node: ir.Node) -> bool:
    """Whether each input has positions or is the same for all of them, and the result has them."""
    output = node.outputs[0]
    if not _has_positions(output):
        return False
    first, *rest = [value for value in node.inputs if value is not None]
    if not _has_positions(first):
        return False
    if node.op_type == "MatMul":
        return rest[0].shape is not None and len(rest[0].shape) == 2
    return all(_has_positions(value) or _is_vector(value) for value in rest)


def _has_positions(value: ir.Value) -> bool:
    """[rows, tokens, width], both of the first two not known before the graph runs."""
    shape = value.shape
    return shape is not None and len(shape) == 3 and not any(isinstance(size, int) for size in shape[:2])


def _is_vector(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) <= 1


def _narrowed(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([value.shape[0], 1, value.shape[2]])

"""Where each patch lies, as an input of the vision tower instead of a computation of it.

mobius computes the places of the patches from `image_grid_thw`, so that the shapes inside the tower depend on the
values of an input. TensorRT would have to take that input for a shape tensor, which may not have two axes, and could
not know that its product is the number of patches. Here the tower is given

    patch_positions  int64 [patches, 2]: row and column of each patch, in the order of `pixel_values`

and the number of patches is the only size that varies. Rotations are looked up by it as before. The learned
positions, on a grid of side G, are interpolated between the four neighbours of each patch; an image of h rows
stretches over the grid, so row r lies at r · (G − 1) / (h − 1), where h − 1 is the last row that occurs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.errors import ExportError
from zreward.export.irtools import input_of, integers, producer_of, remove_unread, width_of
from zreward.export.passes.position_table import INTERPOLATE_POSITIONS

PATCH_POSITIONS = "patch_positions"

_GRID_INPUT = "image_grid_thw"
_ROTARY_TABLES = (".rotary_pos_emb.cos_table", ".rotary_pos_emb.sin_table")
_REARRANGING = ("Pad", "Reshape", "Tile", "Transpose", "Unsqueeze")


def take_patch_positions(model: ir.Model, *, without_reduction: bool = False) -> int:
    """Replace the input `image_grid_thw` by `patch_positions`, after `interpolate_positions`.

    Args:
        without_reduction: take the last row and column from the last patch, which lies there in the order of
            `pixel_values`, in place of a maximum over all patches. ONNX Runtime's CUDA provider asks for cuDNN to find
            a maximum.

    Returns:
        How many look-ups read the new input.

    Raises:
        ExportError: positions are used in another way than mobius uses them.
    """
    graph = model.graph
    pixels = next((v for v in graph.inputs if v.name == "pixel_values"), None)
    if pixels is None or pixels.shape is None:
        raise ExportError("patch positions: the vision tower has no input 'pixel_values'")
    positions = ir.Value(
        name=PATCH_POSITIONS,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([pixels.shape[0], 2]),
    )
    graph.inputs.append(positions)
    builder = tape.Tape()
    places = [
        builder.op("Gather", [positions, _scalar(builder, index)], attributes={"axis": 1}) for index in (0, 1)
    ]
    graph.insert_before(graph[0], builder.nodes)
    changes = _look_up_rotations(graph, places)
    changes += _interpolate(graph, places, pixels.shape[0], without_reduction)
    model.functions.pop(("zreward", INTERPOLATE_POSITIONS, ""), None)
    remove_unread(graph)
    for value in list(graph.inputs):
        if value.name == _GRID_INPUT:
            if value.uses():
                raise ExportError(
                    f"patch positions: {_GRID_INPUT!r} is read by more than look-ups of positions"
                )
            graph.inputs.remove(value)
    return changes


def _look_up_rotations(graph: ir.Graph, places: list[ir.Value]) -> int:
    """Each table is read by rows and by columns."""
    changes = 0
    for name, table in graph.initializers.items():
        if not name.endswith(_ROTARY_TABLES):
            continue
        for node in [use.node for use in table.uses()]:
            if node.op_type != "Gather":
                raise ExportError(f"patch positions: {name!r} is read by {node.op_type}")
            chosen = producer_of(input_of(producer_of(input_of(node, 1), "Squeeze"), 0), "Gather")
            index = input_of(chosen, 1).const_value
            if index is None or index.size != 1 or chosen.attributes["axis"].as_int() != 1:
                raise ExportError("patch positions: rotations are not looked up by a column of the positions")
            node.replace_input_with(1, places[int(index.numpy().item())])
            changes += 1
    if not changes:
        raise ExportError("patch positions: the vision tower has no table of rotations")
    return changes


def _interpolate(
    graph: ir.Graph, places: list[ir.Value], patches: int | ir.SymbolicDim, without_reduction: bool
) -> int:
    """The learned positions, in the order of the patches; a tower without them keeps none."""
    nodes = [node for node in graph if node.op_type == INTERPOLATE_POSITIONS]
    for node in nodes:
        table, side = input_of(node, 0), node.attributes["side"].as_int()
        last = _rearranged(node.outputs[0])
        builder = tape.Tape()
        found = _four_neighbours(builder, table, side, places, without_reduction)
        found.type = ir.TensorType(ir.DataType.FLOAT)
        found.shape = ir.Shape([patches, width_of(table)])
        graph.insert_before(node, builder.nodes)
        convenience.replace_all_uses_with(last, found)
    return len(nodes)


def _rearranged(value: ir.Value) -> ir.Value:
    """What becomes of `value` before it is used in arithmetic."""
    while True:
        uses = [use for use in value.uses() if use.node.op_type != "Shape"]
        if len(uses) != 1:
            raise ExportError("patch positions: the learned positions are read by more than one operator")
        if uses[0].node.op_type not in _REARRANGING:
            return value
        value = uses[0].node.outputs[0]


def _four_neighbours(
    builder: tape.Tape, table: ir.Value, side: int, places: list[ir.Value], without_reduction: bool
) -> ir.Value:
    """Σ over the two neighbours on both axes of weight · table row, [patches, D]."""
    neighbours = [_neighbours(builder, place, side, without_reduction) for place in places]
    total: ir.Value | None = None
    for row, row_weight in neighbours[0]:
        first = builder.op("Mul", [row, _scalar(builder, side)])
        for column, column_weight in neighbours[1]:
            found = builder.op("Gather", [table, builder.op("Add", [first, column])])
            weight = builder.op("Mul", [row_weight, column_weight])
            term = builder.op("Mul", [found, builder.op("Unsqueeze", [weight, integers(builder, 1)])])
            total = term if total is None else builder.op("Add", [total, term])
    assert total is not None
    return total


def _neighbours(
    builder: tape.Tape, place: ir.Value, side: int, without_reduction: bool
) -> list[tuple[ir.Value, ir.Value]]:
    """Indices int64 [patches] on one axis of the grid, and weights float32 [patches]."""

    def constant(value: float) -> ir.Value:
        made: ir.Value = builder.op("Constant", [], attributes={"value_float": value})
        return made

    index = builder.op("Cast", [place], attributes={"to": ir.DataType.FLOAT})
    if without_reduction:
        largest = builder.op("Gather", [index, _scalar(builder, -1)])
    else:
        largest = builder.op("ReduceMax", [index], attributes={"keepdims": 0})
    last = builder.op("Max", [largest, constant(1.0)])
    where = builder.op("Div", [builder.op("Mul", [index, constant(side - 1.0)]), last])
    low = builder.op("Floor", [where])
    high = builder.op("Min", [builder.op("Add", [low, constant(1.0)]), constant(side - 1.0)])
    share = builder.op("Sub", [where, low])
    rest = builder.op("Sub", [constant(1.0), share])
    return [
        (builder.op("Cast", [neighbour], attributes={"to": ir.DataType.INT64}), weight)
        for neighbour, weight in ((low, rest), (high, share))
    ]


def _scalar(builder: tape.Tape, value: int) -> ir.Value:
    made: ir.Value = builder.op("Constant", [], attributes={"value": ir.tensor(np.int64(value))})
    return made

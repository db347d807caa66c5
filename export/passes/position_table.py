"""The vision tower's table of positions, interpolated by two small products.

The tower learns positions on a square grid of side G and interpolates bilinearly between the four neighbours of each
patch. mobius gathers the four rows of the table for every patch, weighs them and adds them: eleven passes over
[patches, D]. The weights of one axis are a hat, which makes the whole a product from either side:

    InterpolatePositions(table [G·G, D], rows [h], columns [w]; side G) -> [h·w, D]
        R[i, j] = max(0, 1 − |rows[i] − j|),   C likewise,   y[i, k] = Σ_j Σ_l R[i, j] C[k, l] table[j, l]

rows and columns are places on the grid, from 0 to G − 1. The products run along the rows first, for all columns of the
grid at once.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import (
    DOMAIN,
    add_function,
    input_of,
    integers,
    only_user,
    producer_of,
    remove_unread,
    take_over,
)

INTERPOLATE_POSITIONS = "InterpolatePositions"

_TABLE = ".pos_embed.weight"


def interpolate_positions(model: ir.Model) -> int:
    """Replace the four gathers of a tower's table, after `specialize_single_image`.

    Returns:
        How many tables were found: one, or none where a tower has no table.

    Raises:
        ExportError: the table is read in another way than mobius reads it.
    """
    graph = model.graph
    tables = [v for name, v in graph.initializers.items() if name.endswith(_TABLE)]
    for table in tables:
        gathers = [use.node for use in table.uses()]
        if len(gathers) != 4 or any(node.op_type != "Gather" for node in gathers):
            raise ExportError(f"positions: {table.name!r} is not read by four Gathers")
        total = _sum_of(gathers)
        rows, columns = _places(gathers)
        n_places, width = ir.Shape(table.shape or ()).numpy()
        side = round(n_places**0.5)
        if side * side != n_places:
            raise ExportError(f"positions: {table.name!r} has {n_places} rows, which are no square")
        builder = tape.Tape()
        result = builder.op(
            INTERPOLATE_POSITIONS, [table, rows, columns], attributes={"side": side}, domain=DOMAIN
        )
        graph.insert_before(total, builder.nodes)
        take_over(graph, total.outputs, [result])
        add_function(model, _function(side, width, graph.opset_imports[""]))
    remove_unread(graph)
    return len(tables)


def _sum_of(gathers: list[ir.Node]) -> ir.Node:
    """The node that adds up the four gathered and weighted rows."""
    products = [only_user(node.outputs[0], "Mul").outputs[0] for node in gathers]
    pairs = [only_user(product, "Add") for product in products]
    if len(set(pairs)) != 2:
        raise ExportError("positions: the four neighbours are not added in pairs")
    totals = {only_user(pair.outputs[0], "Add") for pair in pairs}
    if len(totals) != 1:
        raise ExportError("positions: the four neighbours are not added up")
    return totals.pop()


def _places(gathers: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """Rows and columns on the grid, whose whole parts are the place of the first neighbour."""
    for gather in gathers:
        place = producer_of(input_of(producer_of(input_of(gather, 1), "Reshape"), 0), "Add")
        row, column = (input_of(producer_of(input_of(place, i), "Unsqueeze"), 0) for i in (0, 1))
        floors = _floor(input_of(producer_of(row, "Mul"), 0)), _floor(column)
        if floors[0] is not None and floors[1] is not None:
            return floors[0], floors[1]
    raise ExportError("positions: no neighbour is the whole part of a place")


def _floor(value: ir.Value) -> ir.Value | None:
    """x of Cast(Floor(x))."""
    node = value.producer()
    floor = input_of(node, 0).producer() if node is not None and node.op_type == "Cast" else None
    return input_of(floor, 0) if floor is not None and floor.op_type == "Floor" else None


def _function(side: int, width: int, opset: int) -> ir.Function:
    table, rows, columns = (ir.Value(name=name) for name in ("table", "rows", "columns"))
    builder = tape.Tape()
    grid = builder.op("Constant", [], attributes={"value_floats": [float(i) for i in range(side)]})
    one = builder.op("Constant", [], attributes={"value_float": 1.0})
    zero = builder.op("Constant", [], attributes={"value_float": 0.0})

    def hat(places: ir.Value) -> ir.Value:
        distances = builder.op("Sub", [builder.op("Unsqueeze", [places, integers(builder, 1)]), grid])
        made: ir.Value = builder.op("Max", [builder.op("Sub", [one, builder.op("Abs", [distances])]), zero])
        return made

    flat = builder.op("Reshape", [table, integers(builder, side, side * width)])
    along = builder.op("MatMul", [hat(rows), flat])
    parted = builder.op("Reshape", [along, integers(builder, -1, side, width)])
    across = builder.op("MatMul", [hat(columns), parted])
    result = builder.op("Reshape", [across, integers(builder, -1, width)])
    graph = ir.Graph(
        [table, rows, columns],
        [result],
        nodes=builder.nodes,
        opset_imports={"": opset},
        name=INTERPOLATE_POSITIONS,
    )
    return ir.Function(
        DOMAIN, INTERPOLATE_POSITIONS, "", graph=graph, attributes=[ir.AttrInt64("side", side)]
    )

"""States that serve several rows of tokens, and states that nobody reads.

The questions about an image run as one batch from one state. Where the operators of a graph take fewer states than
rows, state i serves rows i · n to (i + 1) · n − 1, n being the ratio of the two, and nobody has to copy it n times.
After the questions nothing follows: where the input `keep_states` is 0, kernels need not write the new states, which
must not be asked for then.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import integers

Repeat = Callable[[tape.Tape, ir.Value, ir.Value, int], ir.Value]
"""How a state is repeated: arguments and result as of `repeated_to`."""

STATE_BATCH = "state_batch"
"""Name of the first axis of a state input that may be shorter than the batch."""

KEEP_STATES = "keep_states"
"""Name of the graph input, int64 [], that is 0 where the new states are not read."""


def keep_states_input(graph: ir.Graph) -> ir.Value:
    """The graph input of this name, which is added where it is missing."""
    for value in graph.inputs:
        if value.name == KEEP_STATES:
            return value
    flag = ir.Value(name=KEEP_STATES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs.append(flag)
    return flag


def share_states(*states: ir.Value) -> None:
    """Name the first axis of graph inputs, which an operator reads that takes fewer states than rows."""
    for state in states:
        if not state.is_graph_input() or state.shape is None:
            raise ExportError(f"shared states: {state.name!r} is not a state that the graph is given")
        state.shape = ir.Shape([STATE_BATCH, *list(state.shape)[1:]])


def repeated_to(builder: tape.Tape, state: ir.Value, rows: ir.Value, rank: int) -> ir.Value:
    """The state [n, …] of `rank` axes with each of its rows repeated, as many in all as `rows` [B, …] has."""

    batch = builder.op("Shape", [rows], attributes={"end": 1})
    times = builder.op("Div", [batch, builder.op("Shape", [state], attributes={"end": 1})])
    ones = integers(builder, *[1] * (rank - 1))
    shape = builder.op("Concat", [integers(builder, 1), times, ones], attributes={"axis": 0})
    wide = builder.op("Expand", [builder.op("Unsqueeze", [state, integers(builder, 1)]), shape])
    rest = builder.op("Shape", [state], attributes={"start": 1})
    final = builder.op("Concat", [batch, rest], attributes={"axis": 0})
    # A past of no tokens has a size of zero, which Reshape would otherwise read as "as before".
    result: ir.Value = builder.op("Reshape", [wide, final], attributes={"allowzero": 1})
    return result


class RowLookups:
    """Repeats states by one Gather each: which state serves which row is computed once for a graph.

    In ONNX Runtime's CUDA provider every small operator costs a launch, or a step on the CPU that the GPU waits for.

    Args:
        graph: gets the nodes that number the rows, in front of all others.
        rows: a graph input whose first axis has the rows.
        state: a graph input whose first axis has the states.
    """

    def __init__(self, graph: ir.Graph, rows: ir.Value, state: ir.Value) -> None:
        builder = tape.Tape()
        zero, one = (builder.op("Constant", [], attributes={"value_int": number}) for number in (0, 1))
        batch = builder.op("Squeeze", [builder.op("Shape", [rows], attributes={"end": 1})])
        states = builder.op("Shape", [state], attributes={"end": 1})
        numbers = builder.op("Range", [zero, batch, one])
        self._index = builder.op("Div", [builder.op("Mul", [numbers, states]), batch])
        graph.insert_before(graph[0], builder.nodes)

    def __call__(self, builder: tape.Tape, state: ir.Value, rows: ir.Value, rank: int) -> ir.Value:
        """See `repeated_to`; `rows` and `rank` are known here."""
        result: ir.Value = builder.op("Gather", [state, self._index], attributes={"axis": 0})
        result.type = state.type
        if state.shape is not None:
            result.shape = ir.Shape(["batch", *list(state.shape)[1:]])
        return result

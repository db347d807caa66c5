"""States that are fewer than rows, repeated in the two ways that targets have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import tape

from tests.support.graphs import normal, op_types, run_onnxruntime, run_reference
from zreward.export.passes.state_rows import RowLookups, repeated_to

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def graph(*, looked_up: bool) -> ir.Model:
    """Two states of other shapes, both repeated to as many as `x` has rows."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["batch", 3]))
    states = [
        ir.Value(name=name, type=FLOAT, shape=ir.Shape(["state_batch", *rest]))
        for name, rest in (("a", (2, "past", 4)), ("b", (5,)))
    ]
    model = ir.Model(ir.Graph([x, *states], [], nodes=[], opset_imports={"": 24}, name="g"), ir_version=10)
    builder = tape.Tape()
    kept = builder.op("Identity", [x])
    model.graph.extend(builder.nodes)
    repeat = RowLookups(model.graph, x, states[1]) if looked_up else repeated_to
    builder = tape.Tape()
    outputs = [repeat(builder, state, x, len(state.shape or ())) for state in states]
    model.graph.extend(builder.nodes)
    for value, name, like in zip((kept, *outputs), ("y", "a_rows", "b_rows"), (x, *states), strict=True):
        value.name, value.type, value.shape = name, FLOAT, ir.Shape([None, *list(like.shape or ())[1:]])
        model.graph.outputs.append(value)
    return model


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize(("states", "rows", "past"), [(1, 1, 3), (1, 4, 0), (2, 8, 3), (3, 3, 1), (3, 12, 0)])
def test_state_i_serves_consecutive_rows(looked_up: bool, states: int, rows: int, past: int) -> None:
    rng = np.random.default_rng(rows)
    inputs = {
        "x": normal(rng, rows, 3),
        "a": normal(rng, states, 2, past, 4),
        "b": normal(rng, states, 5),
    }
    model = graph(looked_up=looked_up)
    for found in (run_onnxruntime(model, inputs), run_reference(model, inputs)):
        for name in ("a", "b"):
            np.testing.assert_array_equal(
                found[f"{name}_rows"], np.repeat(inputs[name], rows // states, axis=0)
            )
    if looked_up:
        assert list(op_types(model)).count("Gather") == 2
        assert list(op_types(model)).count("Range") == 1

"""What only the score head reads is computed at the positions that it reads, and has the same values there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import Arrays, checkpoint_of, model_from_text, normal, run_onnxruntime
from zreward.errors import ExportError
from zreward.export.passes.last_position import read_last_positions

LAYER = """
g (float[b, s, 8] x, float[b, s, 8] mixed, float[b, s, 8] gate, int64[b] last_index, float[8, 8] out_weight,
   float[8] norm_weight, float[8, 12] up_weight, float[12, 8] down_weight) => ({outputs})
<float[b, s, 8] open, float[b, s, 8] gated, float[b, s, 8] branch, float[b, s, 8] normed, float[b, s, 12] up,
 float[b, s, 12] rate, float[b, s, 12] active, float[b, s, 8] down>
{{
    open = Sigmoid (gate)
    gated = Mul (mixed, open)
    branch = MatMul (gated, out_weight)
    normed, mean, inverse, total =
        com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, branch, norm_weight)
    up = MatMul (normed, up_weight)
    rate = Sigmoid (up)
    active = Mul (up, rate)
    down = MatMul (active, down_weight)
    one = Constant <value_ints = [1]> ()
    index = Unsqueeze (last_index, one)
    a = GatherND <batch_dims = 1> (total, index)
    b = GatherND <batch_dims = 1> (down, index)
    y = Add (a, b)
}}
"""


def layer(folder: Path, outputs: str = "float[b, 8] y") -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {"out_weight": (8, 8), "norm_weight": (8,), "up_weight": (8, 12), "down_weight": (12, 8)}
    weights = checkpoint_of(folder, {name: normal(rng, *shape) for name, shape in shapes.items()})
    return model_from_text(LAYER.format(outputs=outputs), weights)


def inputs() -> Arrays:
    rng = np.random.default_rng(1)
    feed: Arrays = {name: normal(rng, 3, 5, 8) for name in ("x", "mixed", "gate")}
    return feed | {"last_index": np.array([4, 0, 2])}


def shapes(model: ir.Model, op_type: str) -> list[str]:
    return [str(node.outputs[0].shape) for node in model.graph if node.op_type == op_type]


def test_the_last_layer_works_on_one_position(tmp_path: Path) -> None:
    model = layer(tmp_path)
    expected = run_onnxruntime(layer(tmp_path), inputs())
    assert read_last_positions(model) == 8
    assert shapes(model, "MatMul") == ["[b,1,8]", "[b,1,12]", "[b,1,8]"]
    gathered = [node.inputs[0].name for node in model.graph if node.op_type == "GatherND" and node.inputs[0]]
    assert sorted(map(str, gathered)) == ["gate", "mixed", "x"]
    for optimized in (False, True):
        found = run_onnxruntime(model, inputs(), optimized=optimized)
        np.testing.assert_allclose(found["y"], expected["y"], atol=1e-6)


def test_what_is_read_elsewhere_keeps_its_positions(tmp_path: Path) -> None:
    """The feed-forward network moves, and what comes before a value that is a result of the graph does not."""
    outputs = "float[b, 8] y, float[b, s, 8] branch"
    model, expected = layer(tmp_path, outputs), run_onnxruntime(layer(tmp_path, outputs), inputs())
    assert read_last_positions(model) == 5
    assert shapes(model, "MatMul") == ["[b,s,8]", "[b,1,12]", "[b,1,8]"]
    found = run_onnxruntime(model, inputs())
    np.testing.assert_allclose(found["y"], expected["y"], atol=1e-6)
    np.testing.assert_array_equal(found["branch"], expected["branch"])


def test_a_result_of_the_last_operator_leaves_the_graph_as_it_is(tmp_path: Path) -> None:
    outputs = "float[b, 8] y, float[b, s, 8] down, float[b, s, 8] total"
    model = layer(tmp_path, outputs)
    before = [node.op_type for node in model.graph]
    assert read_last_positions(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_a_decoder_without_a_score_head(tmp_path: Path) -> None:
    model = model_from_text("g (float[b, s, 8] x) => (float[b, s, 8] y) { y = Sigmoid (x) }")
    with pytest.raises(ExportError, match="last_index"):
        read_last_positions(model)

"""Transposes of weights folded into the layout that the weights are stored in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.graphs import checkpoint_of, model_from_text, normal, op_types, run_onnxruntime
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.weight_layout import transpose_weights

LINEAR = """
linear (float[n, 6] x, float[4, 6] weight) => (float[n, 4] y, float[n, 4] z, float[6, n] columns)
{
    matrix = Transpose <perm = [1, 0]> (weight)
    again = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, matrix)
    z = MatMul (x, again)
    columns = Transpose <perm = [1, 0]> (x)
}
"""


def test_products_keep_their_values_and_share_one_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, x = normal(rng, 4, 6), normal(rng, 3, 6)
    model = model_from_text(LINEAR, checkpoint_of(tmp_path, {"weight": weight}))
    assert transpose_weights(model) == 2
    remove_dead_outputs(model)
    assert list(model.graph.initializers) == ["weight.transposed"]
    assert list(op_types(model)).count("Transpose") == 1  # the one of an activation
    outputs = run_onnxruntime(model, {"x": x})
    expected = x.astype(np.float64) @ weight.T
    np.testing.assert_allclose(outputs["y"], expected, atol=1e-5)
    np.testing.assert_allclose(outputs["z"], expected, atol=1e-5)
    np.testing.assert_array_equal(outputs["columns"], x.T)


def test_a_transpose_without_permutation_reverses_a_matrix(tmp_path: Path) -> None:
    weight = normal(np.random.default_rng(0), 4, 6)
    text = "g (float[4, 6] weight, float[2, 6] x) => (float[2, 4] y) { m = Transpose (weight) y = MatMul (x, m) }"
    model = model_from_text(text, checkpoint_of(tmp_path, {"weight": weight}))
    assert transpose_weights(model) == 1
    np.testing.assert_array_equal(model.graph.initializers["weight.transposed"].const_value.numpy(), weight.T)


def test_no_weight_of_the_real_decoder_is_transposed_at_run_time(graphs: Graphs) -> None:
    assert transpose_weights(graphs.decoder) > 20
    weights = graphs.decoder.graph.initializers
    for node in graphs.decoder.graph:
        assert node.op_type != "Transpose" or node.inputs[0].name not in weights


@pytest.mark.parametrize(
    ("shape", "attribute"), [("4, 6", "<perm = [0, 1]>"), ("2, 3, 4", "<perm = [2, 0, 1]>"), ("2, 3, 4", "")]
)
def test_unexpected_permutations_are_refused(tmp_path: Path, shape: str, attribute: str) -> None:
    text = f"g (float[{shape}] weight) => (float[a, b] y) {{ m = Transpose {attribute} (weight) y = Identity (m) }}"
    values = normal(np.random.default_rng(0), *(int(n) for n in shape.split(",")))
    model = model_from_text(text, checkpoint_of(tmp_path, {"weight": values}))
    with pytest.raises(ExportError, match="unexpected permutation"):
        transpose_weights(model)

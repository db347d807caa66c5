"""Weights stored in 16 bits: rounded as ml_dtypes rounds, computed in float32, and never out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.support.graphs import checkpoint_of, model_from_text, normal, op_types, run_onnxruntime
from zreward.errors import ExportError
from zreward.export.passes.weight_storage import STORED_TYPES, store_weights

GRAPH = """
g (float[n, 64] x, float[64, 64] matrix, float[64] bias, float[64, 4] small) => (float[n, 64] y, float[n, 4] z)
{
    product = MatMul (x, matrix)
    y = Add (product, bias)
    z = MatMul (y, small)
}
"""
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {"matrix": normal(rng, 64, 64), "bias": normal(rng, 64), "small": normal(rng, 64, 4)}


def model_of(folder: Path, values: dict[str, NDArray[Any]]) -> ir.Model:
    return model_from_text(GRAPH, checkpoint_of(folder, values))


@pytest.mark.parametrize("name", NUMPY)
def test_large_matrices_round_as_ml_dtypes_does(tmp_path: Path, name: str) -> None:
    values = weights()
    model = model_of(tmp_path, values)
    assert store_weights(model, STORED_TYPES[name]) == 1
    stored = model.graph.initializers["matrix"]
    rounded = values["matrix"].astype(NUMPY[name])
    assert stored.dtype == STORED_TYPES[name] and stored.const_value.nbytes == 64 * 64 * 2
    np.testing.assert_array_equal(
        np.asarray(stored.const_value.numpy()).view(np.uint16), rounded.view(np.uint16)
    )
    assert (
        model.graph.initializers["bias"].dtype == model.graph.initializers["small"].dtype == ir.DataType.FLOAT
    )
    x = normal(np.random.default_rng(1), 3, 64)
    expected = x.astype(np.float64) @ rounded.astype(np.float64) + values["bias"]
    outputs = run_onnxruntime(model, {"x": x})
    np.testing.assert_allclose(outputs["y"], expected, atol=1e-4)
    np.testing.assert_allclose(outputs["z"], expected @ values["small"], atol=1e-3)


def test_fp32_leaves_the_graph_alone(tmp_path: Path) -> None:
    model = model_of(tmp_path, weights())
    assert store_weights(model, ir.DataType.FLOAT) == 0
    assert "Cast" not in op_types(model)


def test_selected_rows_of_the_head_stay_in_float32(tmp_path: Path) -> None:
    model = model_of(tmp_path, weights())
    matrix = model.graph.initializers["matrix"]
    matrix.const_value = matrix.const_value.with_layout(rows=tuple(range(64)))
    assert store_weights(model, ir.DataType.FLOAT16) == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", 70000.0, "range of float16.*bf16"),
        ("bf16", 3.4e38, "range of bfloat16.*fp32"),
        ("fp16", np.nan, "NaN or infinity"),
        ("bf16", np.inf, "NaN or infinity"),
        ("fp32", -np.inf, "NaN or infinity"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path: Path, name: str, value: float, message: str) -> None:
    values = weights()
    values["matrix"][5, 7] = value
    model = model_of(tmp_path, values)
    store_weights(model, STORED_TYPES[name])
    with pytest.raises(ExportError, match=message) as caught:
        model.graph.initializers["matrix"].const_value.numpy()
    assert "'matrix'" in str(caught.value)

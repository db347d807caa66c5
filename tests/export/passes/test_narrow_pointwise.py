"""What stands between products in the type of the products."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import checkpoint_of, model_from_text, normal, op_types, run_onnxruntime
from zreward.export.passes.compute_type import compute_products_in
from zreward.export.passes.narrow_pointwise import narrow_pointwise

HALF = ir.DataType.FLOAT16
TEXT = """g (float[n, 8] x, float[n, 8] skip, float[8, 16] gate, float[8, 16] up, float[16, 8] down, float[8, 16] both,
            float[16] bias) => (float[n, 8] y, float[n, 8] z, float[n, 8] s) {
  g = MatMul(x, gate)
  a = Sigmoid(g)
  b = Mul(g, a)
  u = MatMul(x, up)
  c = Add(u, bias)
  d = Mul(b, c)
  e = MatMul(d, down)
  y = Add(e, skip)
  p = MatMul(x, both)
  q, r = Split <axis = -1, num_outputs = 2> (p)
  s = Neg(q)
  t = Sigmoid(r)
  v = Mul(e, t)
  z = Neg(v)
}"""


def built(folder: Path) -> tuple[ir.Model, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {"gate": (8, 16), "up": (8, 16), "down": (16, 8), "both": (8, 16), "bias": (16,)}
    weights = {name: normal(rng, *shape) for name, shape in shapes.items()}
    model = model_from_text(TEXT, checkpoint_of(folder, weights))
    return model, {"x": normal(rng, 5, 8), "skip": normal(rng, 5, 8)}


def test_casts_between_products_go(tmp_path: Path) -> None:
    model, inputs = built(tmp_path)
    expected = run_onnxruntime(model, inputs)
    compute_products_in(model, HALF)
    before = Counter(op_types(model))
    assert narrow_pointwise(model, HALF) == 7  # both Sigmoids, three Muls, the bias, and Split
    after = Counter(op_types(model))
    # x to 16 bits; back for the residual sum, for the part that only Split gives, and for the last factor's Neg.
    assert (before["Cast"], after["Cast"]) == (6, 4)
    types = {node.outputs[0].name: node.op_type for node in model.graph if node.outputs[0].dtype is HALF}
    assert Counter(types.values()) == {"Cast": 1, "MatMul": 4, "Sigmoid": 2, "Mul": 3, "Add": 1, "Split": 1}
    assert {name: v.dtype for name, v in model.graph.initializers.items() if "bias" in name} == {
        "bias.float16": HALF
    }
    found = run_onnxruntime(model, inputs)
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, rtol=5e-3, atol=3e-2)


def test_float32_is_left_alone(tmp_path: Path) -> None:
    model, _ = built(tmp_path)
    before = list(op_types(model))
    assert narrow_pointwise(model, ir.DataType.FLOAT) == 0
    assert list(op_types(model)) == before


def test_what_would_cast_every_part_back_is_not_moved(tmp_path: Path) -> None:
    """Two readers in float32 behind a Split: one cast in front of it, not two behind it."""
    text = TEXT.replace("t = Sigmoid(r)", "t = Exp(r)").replace("v = Mul(e, t)", "v = Add(e, t)")
    model = model_from_text(text, checkpoint_of(tmp_path, {"both": normal(np.random.default_rng(1), 8, 16)}))
    compute_products_in(model, HALF)
    narrow_pointwise(model, HALF)
    assert next(node for node in model.graph if node.op_type == "Split").outputs[0].dtype is not HALF


@pytest.mark.parametrize("operator", ["Exp", "RMSNormalization"])
def test_other_operators_stay_in_float32(tmp_path: Path, operator: str) -> None:
    second = ", w" if operator == "RMSNormalization" else ""
    text = f"""g (float[n, 8] x, float[8, 8] m, float[8] w) => (float[n, 8] y) {{
      a = MatMul(x, m)
      b = {operator}(a{second})
      y = MatMul(b, m)
    }}"""
    rng = np.random.default_rng(2)
    model = model_from_text(text, checkpoint_of(tmp_path, {"m": normal(rng, 8, 8), "w": normal(rng, 8)}))
    compute_products_in(model, HALF)
    assert narrow_pointwise(model, HALF) == 0

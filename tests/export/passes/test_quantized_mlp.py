"""Feed-forward networks in one node against the same products in a node each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.support.graphs import checkpoint_of, model_from_text, normal, op_types, run_onnxruntime
from tests.support.quantized import Format, quantized_checkpoint
from zreward.export.passes import quantized_products
from zreward.export.passes.quantized_products import quantize_products_for_onnxruntime
from zreward.export.passes.weight_layout import transpose_weights
from zreward.export.work import graph_work
from zreward.quant.tensor import WeightFormat
from zreward.runtime import kernels

Array = NDArray[Any]

K, M, N = 96, 144, 37
GATED = f"""
g (float[b, t, {K}] x, float[{M}, {K}] gate, float[{M}, {K}] up, float[{N}, {M}] down)
    => (float[b, t, {N}] y{{outputs}})
{{{{
    a = Transpose (gate)
    c = Transpose (up)
    d = Transpose (down)
    p = MatMul (x, a)
    q = MatMul ({{source}}, c)
    s = Sigmoid (p)
    r = Mul (p, s)
    h = Mul (r, q)
    y = MatMul (h, d)
    z = Relu (x)
}}}}
"""
GELU = f"""
g (float[t, {K}] x, float[{M}, {K}] up, float[{N}, {M}] down, float[{M}] up_bias, float[{N}] down_bias)
    => (float[t, {N}] y)
{{
    a = Transpose (up)
    d = Transpose (down)
    p = MatMul (x, a)
    q = Add (p, up_bias)
    h = Gelu <approximate = "tanh"> (q)
    o = MatMul (h, d)
    y = Add (o, down_bias)
}}
"""
INT8 = WeightFormat(8, activations="int8")
INT4 = WeightFormat(4, 16)
ASYMMETRIC = WeightFormat(4, 16, symmetric=False)
BYTES = WeightFormat(8, 16)
SHAPES = {"gate": (M, K), "up": (M, K), "down": (N, M), "up_bias": (M,), "down_bias": (N,)}


def quantized(
    folder: Path,
    text: str,
    formats: dict[str, Format],
    monkeypatch: pytest.MonkeyPatch,
    *,
    fused: bool = True,
) -> ir.Model:
    """The graph with products of codes, which are joined or not."""
    rng = np.random.default_rng(0)
    names = [name for name in SHAPES if f"] {name}" in text]
    floats = checkpoint_of(folder, {name: normal(rng, *SHAPES[name]) for name in names})
    checkpoint, weights = quantized_checkpoint(floats, formats)
    model = model_from_text(text, checkpoint)
    transpose_weights(model)
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(quantized_products, "fuse_mlps", lambda model: 0)
        quantize_products_for_onnxruntime(model, weights)
    return model


def gated(source: str = "x", outputs: str = "") -> str:
    return GATED.format(source=source, outputs=outputs)


@pytest.mark.parametrize(
    ("formats", "name"),
    [
        ({"gate": INT8, "up": INT8, "down": INT8}, "SwiGluInt8Mlp"),
        ({"gate": INT4, "up": INT4, "down": INT4}, "SwiGluBlockMlp"),
        ({"gate": INT4, "up": ASYMMETRIC, "down": BYTES}, "SwiGluBlockMlp"),
        ({"gate": ASYMMETRIC, "up": BYTES, "down": INT4}, "SwiGluBlockMlp"),
    ],
    ids=str,
)
def test_gate_up_and_down_are_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: dict[str, Format], name: str
) -> None:
    joined = quantized(tmp_path, gated(), formats, monkeypatch)
    assert set(op_types(joined)) - {"Relu"} == {name}
    assert_same(
        joined, quantized(tmp_path, gated(), formats, monkeypatch, fused=False), (2, 1), (1, 9), (3, 100)
    )


@pytest.mark.parametrize(("chosen", "name"), [(INT8, "GeluInt8Mlp"), (ASYMMETRIC, "GeluBlockMlp")], ids=str)
def test_up_and_down_with_biases_are_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Format, name: str
) -> None:
    formats = {"up": chosen, "down": chosen}
    joined = quantized(tmp_path, GELU, formats, monkeypatch)
    assert set(op_types(joined)) == {name}
    apart = quantized(tmp_path, GELU, formats, monkeypatch, fused=False)
    assert_same(joined, apart, (1,), (112,), (113,), (300,))


def assert_same(joined: ir.Model, apart: ir.Model, *shapes: tuple[int, ...]) -> None:
    """Bit for bit where kernels run; where the bodies do, an activation may be rounded to another code."""
    assert graph_work(joined) == graph_work(apart)
    for shape in shapes:
        feed = {"x": normal(np.random.default_rng(1), *shape, K)}
        expected = run_onnxruntime(apart, feed, optimized=True)["y"]
        found = run_onnxruntime(joined, feed, optimized=True)["y"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
        if kernels.compiled_library() is not None:
            expected = run_onnxruntime(apart, feed, kernels=True)["y"]
            np.testing.assert_array_equal(run_onnxruntime(joined, feed, kernels=True)["y"], expected)


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        (gated(), {"gate": INT8, "up": INT8, "down": INT4}),  # families differ
        (gated(), {"gate": INT4, "up": WeightFormat(4, 32), "down": INT4}),
        (gated(), {"gate": INT4, "up": INT4, "down": WeightFormat(4, 16, act_order=True)}),
        (gated(source="z"), {"gate": INT8, "up": INT8, "down": INT8}),  # two inputs
        (
            gated(outputs=f", float[b, t, {M}] q"),
            {"gate": INT8, "up": INT8, "down": INT8},
        ),  # something reads it
    ],
    ids=["families", "blocks", "order", "inputs", "output"],
)
def test_other_products_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, formats: dict[str, Format]
) -> None:
    model = quantized(tmp_path, text, formats, monkeypatch)
    assert not any(name.endswith("Mlp") for name in op_types(model))

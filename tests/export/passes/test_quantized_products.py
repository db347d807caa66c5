"""Products of codes against float64 products of the weights that the codes stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.support.graphs import (
    checkpoint_of,
    model_from_text,
    normal,
    op_types,
    run_onnxruntime,
    run_reference,
)
from tests.support.quantized import Format, WeightsInMemory, quantized_checkpoint
from zreward.errors import ExportError
from zreward.export.irtools import add_initializer
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.quantized_products import (
    dequantized_weights,
    quantize_products_for_onnxruntime,
    quantize_products_portably,
)
from zreward.export.passes.weight_layout import transpose_weights
from zreward.quant.tensor import CodebookFormat, WeightFormat

Array = NDArray[Any]

# Two products read x, as gate and up do; the third reads a matrix of another rank.
GRAPH = """
g (float[b, m, {k}] x, float[m, {k}] flat, float[{n}, {k}] first, float[9, {k}] second)
    => (float[b, m, {n}] y, float[b, m, 9] z, float[m, {n}] w)
{{
    a = Transpose (first)
    c = Transpose (second)
    y = MatMul (x, a)
    z = MatMul (x, c)
    w = MatMul (flat, a)
}}
"""
INT8_ROWS = WeightFormat(8, activations="int8")
FLOAT_FORMATS = [
    (WeightFormat(4, 128), 256),
    (WeightFormat(4, 32), 96),  # three blocks: an odd number of zero points
    (WeightFormat(4, 32, symmetric=False), 96),
    (WeightFormat(4, 16, symmetric=False), 64),
    (WeightFormat(8, 128), 256),
    (WeightFormat(8, 16, symmetric=False), 48),
    (WeightFormat(4), 96),  # one scale a row: blocks of 32 repeat it
    (WeightFormat(8, symmetric=False), 96),
    (WeightFormat(4), 40),  # no block divides: the last one is a part
    (WeightFormat(4, symmetric=False), 40),
    (WeightFormat(8), 512),
    (WeightFormat(4, 32, act_order=True), 96),
    (WeightFormat(8, 16, symmetric=False, act_order=True), 64),
    (WeightFormat(4, act_order=True), 96),
]
NO_ROUNDING = {"optimized": True, "session__qdq_matmulnbits_accuracy_level": "0"}


def built(
    folder: Path, chosen: Format, k: int, n: int = 7
) -> tuple[ir.Model, WeightsInMemory, dict[str, Array], dict[str, Array]]:
    """The graph with quantized weights, inputs for it, and its outputs in float64."""
    rng = np.random.default_rng(0)
    floats = checkpoint_of(folder, {"first": normal(rng, n, k), "second": normal(rng, 9, k)})
    checkpoint, weights = quantized_checkpoint(floats, {"first": chosen, "second": chosen})
    model = model_from_text(GRAPH.format(k=k, n=n), checkpoint)
    transpose_weights(model)
    remove_dead_outputs(model)
    inputs = {"x": normal(rng, 2, 3, k), "flat": normal(rng, 3, k)}
    first, second = (weights.matrices[name].dequantized().astype(np.float64) for name in ("first", "second"))
    outputs = {"y": inputs["x"] @ first.T, "z": inputs["x"] @ second.T, "w": inputs["flat"] @ first.T}
    return model, weights, inputs, outputs


def assert_close(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    """Equal within `tolerance` of the largest value."""
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance * np.abs(values).max())


def emulated_rows(x: Array, weight: Array) -> Array:
    """y = s · round(x / s) Wᵀ with s a 127th of each row's largest magnitude, row by row."""
    result = np.zeros((*x.shape[:-1], weight.shape[0]))
    for index in np.ndindex(*x.shape[:-1]):
        scale = np.float32(np.abs(x[index]).max()) * np.float32(1 / 127)
        if scale > 0:
            codes = np.clip(np.round(x[index] / scale), -128, 127)
            result[index] = weight.astype(np.float64) @ (codes * np.float64(scale))
    return result


@pytest.mark.parametrize(("chosen", "k"), FLOAT_FORMATS, ids=str)
def test_blocks_of_codes_are_exact_at_level_0(tmp_path: Path, chosen: WeightFormat, k: int) -> None:
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    assert quantize_products_for_onnxruntime(model, weights, accuracy_level=0) == 3
    assert set(op_types(model)) - {"Gather", "Cast"} == {"MatMulNBits"}
    assert dequantized_weights(model, weights) == []
    for optimized in (False, True):
        assert_close(run_onnxruntime(model, inputs, optimized=optimized), expected, 1e-6)


@pytest.mark.parametrize(("chosen", "k"), FLOAT_FORMATS, ids=str)
def test_level_4_rounds_activations(tmp_path: Path, chosen: WeightFormat, k: int) -> None:
    """8 bits a block of inputs: half a step of 1/127 of the largest input, and its square root of many."""
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    quantize_products_for_onnxruntime(model, weights)
    found = run_onnxruntime(model, inputs, optimized=True)
    assert_close(found, expected, 2e-2)
    assert np.abs(found["y"] - expected["y"]).max() > 1e-5 * np.abs(expected["y"]).max()


@pytest.mark.parametrize(("chosen", "k"), FLOAT_FORMATS, ids=str)
def test_the_portable_form_is_exact(tmp_path: Path, chosen: WeightFormat, k: int) -> None:
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    assert quantize_products_portably(model, weights) == 3
    assert all(node.domain == "" for node in model.graph)
    assert_close(run_reference(model, inputs), expected, 1e-6)
    assert_close(run_onnxruntime(model, inputs), expected, 1e-6)
    assert_close(run_onnxruntime(model, inputs, **NO_ROUNDING), expected, 1e-6)


def test_products_share_the_gather_of_their_order(tmp_path: Path) -> None:
    """Two products of one input with the same order; a whole row needs no order at all."""
    chosen = WeightFormat(4, 32, act_order=True)
    model, weights, _, _ = built(tmp_path, chosen, 96)
    first, second = weights.matrices["first"], weights.matrices["second"]
    assert not np.array_equal(first.order, second.order)
    weights.matrices["second"] = dataclasses.replace(second, order=first.order)
    quantize_products_for_onnxruntime(model, weights)
    assert list(op_types(model)).count("Gather") == 2  # of x, and of flat

    model, weights, _, _ = built(tmp_path, WeightFormat(4, act_order=True), 96)
    quantize_products_for_onnxruntime(model, weights)
    assert "Gather" not in op_types(model)


def give_own_codes(model: ir.Model, output: str) -> None:
    """Codes that no other product has: without VNNI, ONNX Runtime 1.31.1 rewrites them and fails on shared ones."""
    (node,) = (node for node in model.graph if node.outputs[0].name == output)
    (place,) = (i for i, value in enumerate(node.inputs) if value is not None and value.name == "first.codes")
    codes = model.graph.initializers["first.codes"].const_value
    assert codes is not None
    own = add_initializer(model.graph, ir.tensor(codes.numpy(), name=f"{output}.codes"))
    node.replace_input_with(place, own)


@pytest.mark.parametrize("k", [40, 96, 256])
def test_int8_rows_equal_their_emulation(tmp_path: Path, k: int) -> None:
    model, weights, inputs, exact = built(tmp_path, INT8_ROWS, k)
    inputs["x"][0, 1] = 0
    inputs["x"][1, 2, 5] = 1e4
    inputs["x"][1, 0] *= 1e-6
    assert quantize_products_for_onnxruntime(model, weights) == 3
    assert set(op_types(model)) == {"Int8Linear"}
    give_own_codes(model, "w")
    found = run_onnxruntime(model, inputs)
    first, second = (weights.matrices[name].dequantized() for name in ("first", "second"))
    assert_close({"w": found["w"]}, {"w": emulated_rows(inputs["flat"], first)}, 1e-6)
    for name, weight in (("y", first), ("z", second)):
        expected = emulated_rows(inputs["x"], weight)
        for row in np.ndindex(2, 3):  # each row by its own magnitude: they differ by ten decades
            assert_close({"row": found[name][row]}, {"row": expected[row]}, 1e-6)
        np.testing.assert_array_equal(found[name][0, 1], 0)
    assert_close({"w": found["w"]}, {"w": exact["w"]}, 2e-2)


def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    model, weights, inputs, _ = built(tmp_path, INT8_ROWS, 96)
    quantize_products_for_onnxruntime(model, weights)
    give_own_codes(model, "w")
    together = run_onnxruntime(model, inputs)["y"]
    alone = run_onnxruntime(model, inputs | {"x": inputs["x"][:1, 1:2]})["y"]
    np.testing.assert_array_equal(alone[0, 0], together[0, 1])
    inputs["x"][1, 1, 3] = np.inf
    inputs["x"][1, 2] = np.nan
    disturbed = run_onnxruntime(model, inputs)["y"]
    np.testing.assert_array_equal(disturbed[0], together[0])
    assert not np.isfinite(disturbed[1, 1:]).any()


def test_int8_rows_are_dequantized_weights_where_only_standard_operators_run(tmp_path: Path) -> None:
    model, weights, inputs, expected = built(tmp_path, INT8_ROWS, 96)
    assert quantize_products_portably(model, weights) == 3
    stored = model.graph.initializers["first.codes"]
    assert (stored.dtype, stored.shape) == (ir.DataType.INT8, ir.Shape([96, 7]))
    assert_close(run_reference(model, inputs), expected, 1e-6)
    assert_close(run_onnxruntime(model, inputs, **NO_ROUNDING), expected, 1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize(("k", "block"), [(96, 64), (64, 64), (35, 16)])
def test_codebooks(tmp_path: Path, name: str, k: int, block: int) -> None:
    model, weights, inputs, expected = built(tmp_path, CodebookFormat(name, block), k)
    assert quantize_products_for_onnxruntime(model, weights) == 3
    assert set(op_types(model)) == {"MatMulBnb4"}
    assert_close(run_onnxruntime(model, inputs), expected, 1e-5)


def test_a_codebook_stays_dequantized_where_only_standard_operators_run(tmp_path: Path) -> None:
    model, weights, inputs, expected = built(tmp_path, CodebookFormat("nf4", 64), 64)
    assert quantize_products_portably(model, weights) == 0
    assert dequantized_weights(model, weights) == ["first", "second"]
    assert_close(run_onnxruntime(model, inputs), expected, 1e-6)


def test_other_tables_than_the_operators_are_refused(tmp_path: Path) -> None:
    model, weights, _, _ = built(tmp_path, CodebookFormat("nf4", 64), 64)
    weight = weights.matrices["first"]
    weights.matrices["first"] = dataclasses.replace(weight, table=np.linspace(-1, 1, 16, dtype=np.float32))
    quantize_products_for_onnxruntime(model, weights)
    with pytest.raises(ExportError, match=r"'first'.*table of 16 values is not nf4's"):
        model.graph.initializers["first.codes"].const_value.numpy()


def test_weights_that_are_not_quantized_are_left_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    floats = checkpoint_of(tmp_path, {"first": normal(rng, 7, 64), "second": normal(rng, 9, 64)})
    checkpoint, weights = quantized_checkpoint(floats, {"first": WeightFormat(4, 32)})
    model = model_from_text(GRAPH.format(k=64, n=7), checkpoint)
    transpose_weights(model)
    assert quantize_products_for_onnxruntime(model, weights) == 2
    kept = model.graph.initializers["second.transposed"].const_value
    np.testing.assert_array_equal(kept.numpy(), floats.read("second").T)
    assert list(op_types(model)).count("MatMul") == 1


def test_scales_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    model, weights, _, _ = built(tmp_path, WeightFormat(4, 32), 64)
    weight = weights.matrices["first"]
    weights.matrices["first"] = dataclasses.replace(weight, scales=weight.scales * np.float32(1.0001))
    quantize_products_for_onnxruntime(model, weights)
    with pytest.raises(ExportError, match=r"'first'.*not float16 values"):
        model.graph.initializers["first.scales"].const_value.numpy()


def test_a_weight_that_is_not_what_its_format_announced_is_refused(tmp_path: Path) -> None:
    model, weights, _, _ = built(tmp_path, WeightFormat(4, 32), 64)
    quantize_products_for_onnxruntime(model, weights)
    order = np.arange(64)[::-1].copy()
    weights.matrices["first"] = dataclasses.replace(weights.matrices["first"], order=order)
    with pytest.raises(ExportError, match=r"'first'.*act_order"):
        model.graph.initializers["first.codes"].const_value.numpy()


def test_a_weight_in_an_unexpected_layout_is_refused(tmp_path: Path) -> None:
    floats = checkpoint_of(tmp_path, {"weight": normal(np.random.default_rng(0), 64, 64)})
    checkpoint, weights = quantized_checkpoint(floats, {"weight": WeightFormat(4, 32)})
    text = "g (float[m, 64] x, float[64, 64] weight) => (float[m, 64] y) { y = MatMul (x, weight) }"
    with pytest.raises(ExportError, match="'weight' is laid out unexpectedly"):
        quantize_products_for_onnxruntime(model_from_text(text, checkpoint), weights)

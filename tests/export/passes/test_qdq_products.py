"""Products in explicit QuantizeLinear and DequantizeLinear against float64 products of what the codes stand for."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tests.export.passes.test_quantized_products import assert_close, built
from tests.support.graphs import op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.passes.qdq_products import TENSORRT_GROUPS, can_multiply, quantize_products_with_qdq
from zreward.export.storage import write_graph
from zreward.quant.scheme import parse_format
from zreward.quant.tensor import CodebookFormat, WeightFormat
from zreward.runtime.backends import open_session

FLOAT8 = WeightFormat(8, activations="fp8-static")
STATIC = WeightFormat(8, activations="int8-static")
FORMATS = [
    (WeightFormat(4, 128), 256),
    (WeightFormat(4, 32), 96),
    (WeightFormat(4), 96),  # one scale a row is one block
    (WeightFormat(8), 40),
    (WeightFormat(4, 32, act_order=True), 96),
]


@pytest.mark.parametrize(("chosen", "k"), FORMATS, ids=str)
def test_weights_of_codes_are_exact(tmp_path: Path, chosen: WeightFormat, k: int) -> None:
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    assert quantize_products_with_qdq(model, weights, ir.DataType.FLOAT) == 3
    assert set(op_types(model)) - {"Gather"} == {"DequantizeLinear", "MatMul"}
    assert_close(run_reference(model, inputs), expected, 1e-6)
    assert_close(run_onnxruntime(model, inputs), expected, 1e-6)


@pytest.mark.parametrize(("chosen", "k"), FORMATS[:1] + FORMATS[3:4], ids=str)
def test_in_16_bits_scales_and_products_are_of_that_type(
    tmp_path: Path, chosen: WeightFormat, k: int
) -> None:
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    quantize_products_with_qdq(model, weights, ir.DataType.FLOAT16)
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert node.inputs[1].dtype is ir.DataType.FLOAT16
    found = run_onnxruntime(model, inputs)
    assert all(values.dtype == np.float32 for values in found.values())
    assert_close(found, expected, 2e-3)
    assert list(op_types(model)).count("Cast") == 5  # each input once, and each result


def test_static_inputs_are_rounded_on_one_grid(tmp_path: Path) -> None:
    model, weights, inputs, _ = built(tmp_path, STATIC, 40)
    weights.scales = {"first": 0.02, "second": 0.02}
    inputs["x"][0, 0, 0] = 50.0  # beyond the grid
    assert quantize_products_with_qdq(model, weights, ir.DataType.FLOAT) == 3
    assert list(op_types(model)).count("QuantizeLinear") == 2  # x, which two products read, and flat
    x, flat = (np.clip(np.rint(inputs[n] / np.float32(0.02)), -128, 127) * 0.02 for n in ("x", "flat"))
    first, second = (weights.matrices[name].dequantized().astype(np.float64) for name in ("first", "second"))
    expected = {"y": x @ first.T, "z": x @ second.T, "w": flat @ first.T}
    for found in (run_reference(model, inputs), run_onnxruntime(model, inputs)):
        assert_close(found, expected, 1e-5)
    assert_close(run_onnxruntime(model, inputs, optimized=True), expected, 1e-5)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_floats_of_8_bits_are_products_of_the_nearest_ones(tmp_path: Path, dtype: ir.DataType) -> None:
    model, weights, inputs, _ = built(tmp_path, FLOAT8, 40)
    weights.scales = {"first": 0.25, "second": 0.25}
    inputs["x"][0, 0, 0] = 1000.0  # beyond the largest float
    assert quantize_products_with_qdq(model, weights, dtype) == 3
    assert list(op_types(model)).count("QuantizeLinear") == 2
    codes = [value for value in model.graph.initializers.values() if value.name.endswith(".codes")]
    assert {value.dtype for value in codes} == {ir.DataType.FLOAT8E4M3FN} and len(codes) == 2
    x, flat = (
        (inputs[n] / 0.25).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * 0.25
        for n in ("x", "flat")
    )
    first, second = (weights.matrices[name].dequantized().astype(np.float64) for name in ("first", "second"))
    expected = {"y": x @ first.T, "z": x @ second.T, "w": flat @ first.T}
    close = 1e-5 if dtype is ir.DataType.FLOAT else 4e-3
    for found in (run_reference(model, inputs), run_onnxruntime(model, inputs)):
        assert_close(found, expected, close)
    path = tmp_path / "graph.onnx"
    write_graph(model, path, lambda _: None)
    session = open_session(path, provider="cpu", threads=1)  # with its optimizations
    assert_close(dict(zip(expected, session.run(list(expected), inputs), strict=True)), expected, close)


def test_static_inputs_need_a_scale_that_the_type_holds(tmp_path: Path) -> None:
    model, weights, _, _ = built(tmp_path, STATIC, 40)
    with pytest.raises(ExportError, match=r"calibration must find.*--calibration FILE"):
        quantize_products_with_qdq(model, weights, ir.DataType.FLOAT)
    for scale in (1e-9, 1e6, float("inf")):
        model, weights, _, _ = built(tmp_path, STATIC, 40)
        weights.scales = {"first": scale, "second": scale}
        with pytest.raises(ExportError, match="does not fit float16"):
            quantize_products_with_qdq(model, weights, ir.DataType.FLOAT16)


@pytest.mark.parametrize(
    "chosen",
    [WeightFormat(4, 32, symmetric=False), WeightFormat(8, 32), CodebookFormat("nf4", 32)],
    ids=str,
)
def test_what_tensorrt_cannot_multiply_stays_floats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, chosen: WeightFormat | CodebookFormat
) -> None:
    model, weights, inputs, expected = built(tmp_path, chosen, 64)
    assert not can_multiply(chosen)
    with caplog.at_level(logging.WARNING):
        assert quantize_products_with_qdq(model, weights, ir.DataType.FLOAT) == 0
    assert "2 such matrices stay floats" in caplog.text
    assert_close(run_onnxruntime(model, inputs), expected, 1e-6)


def test_formats_without_a_group_get_one_that_tensorrt_multiplies() -> None:
    for name in ("int8-static", "int8-weight", "int4", "fp8"):
        chosen = parse_format(name, TENSORRT_GROUPS)
        assert chosen is not None and can_multiply(chosen)
    assert TENSORRT_GROUPS["int4"] == 128

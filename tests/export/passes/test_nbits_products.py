"""Products in MatMulNBits and MatMulBnb4 of one type against float64 products of what the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.export.passes.test_quantized_products import assert_close, built
from tests.support.cuda_stubs import cuda_child, needs_wheel
from tests.support.graphs import checked_proto, op_types, run_onnxruntime
from zreward.errors import ExportError
from zreward.export.passes.nbits_products import quantize_products_with_nbits
from zreward.quant.tensor import CodebookFormat, WeightFormat

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
FORMATS = [
    (WeightFormat(4, 16), 48),
    (WeightFormat(4, 64, symmetric=False), 128),
    (WeightFormat(4, 256), 512),  # stored in blocks of 128
    (WeightFormat(4, 256, symmetric=False), 512),
    (WeightFormat(4), 256),  # one scale a row
    (WeightFormat(8, 256), 256),
    (WeightFormat(8), 40),
    (WeightFormat(8, 32, symmetric=False), 96),
    (WeightFormat(4, 32, act_order=True), 96),
    (CodebookFormat("nf4", 32), 64),
    (CodebookFormat("fp4", 64), 64),
]


@pytest.mark.parametrize(("chosen", "k"), FORMATS, ids=str)
def test_products_are_those_of_the_codes(
    tmp_path: Path, chosen: WeightFormat | CodebookFormat, k: int
) -> None:
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    assert quantize_products_with_nbits(model, weights, FLOAT) == 3
    operator = "MatMulBnb4" if isinstance(chosen, CodebookFormat) else "MatMulNBits"
    assert set(op_types(model)) - {"Gather"} == {operator}
    assert_close(run_onnxruntime(model, inputs), expected, 1e-5)
    model, weights, inputs, expected = built(tmp_path, chosen, k)
    quantize_products_with_nbits(model, weights, HALF)
    assert {v.dtype for v in model.graph.initializers.values()} <= {
        ir.DataType.UINT8,
        HALF,
        ir.DataType.INT64,
    }
    reordered = int("Gather" in op_types(model))  # one of two products that share an input then has its own
    assert list(op_types(model)).count("Cast") == 5 + reordered  # each input once, and each result
    assert_close(run_onnxruntime(model, inputs, optimized=True), expected, 4e-3)


def test_no_block_is_larger_than_the_provider_multiplies(tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 8):
        model, weights, _, _ = built(tmp_path, WeightFormat(bits, 256), 512)
        quantize_products_with_nbits(model, weights, HALF)
        sizes[bits] = {n.attributes["block_size"].as_int() for n in model.graph if n.op_type == "MatMulNBits"}
    assert sizes == {4: {128}, 8: {256}}


def test_scales_must_fit_the_type(tmp_path: Path) -> None:
    for scale in (1e6, 1e-9):
        model, weights, _, _ = built(tmp_path, WeightFormat(8, scale_bits=32), 40)
        for name, weight in weights.matrices.items():
            weights.matrices[name] = replace(weight, scales=np.full_like(weight.scales, scale))
        quantize_products_with_nbits(model, weights, HALF)
        with pytest.raises(ExportError, match=r"its scales do not fit float16; .*--weights bf16"):
            for value in model.graph.initializers.values():
                list(value.const_value.blocks())


@needs_wheel
def test_the_provider_takes_every_format(cuda_stubs: Path, tmp_path: Path) -> None:
    """L2: single rows too, for which the provider has other kernels."""
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    for number, (chosen, k) in enumerate(FORMATS):
        for dtype in (FLOAT, HALF, BFLOAT):
            model, weights, _, _ = built(tmp_path, chosen, k)
            quantize_products_with_nbits(model, weights, dtype)
            name = f"{number}-{dtype.name}.onnx"
            (graphs / name).write_bytes(checked_proto(model).SerializeToString())
    found = cuda_child(cuda_stubs, "graphs", graphs)
    assert len(found) == 3 * len(FORMATS)
    assert {name: outcome for name, outcome in found.items() if outcome.get("cpu") != []} == {}

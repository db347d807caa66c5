"""Products with quantized weights in explicit QuantizeLinear and DequantizeLinear, as TensorRT reads them.

    4 bits               DequantizeLinear by blocks of inputs → MatMul
    8 bits               DequantizeLinear by outputs → MatMul
    8 bits, inputs too   the same, and QuantizeLinear → DequantizeLinear with one static scale on the input
    floats of 8 bits     the same in FLOAT8E4M3FN

A DequantizeLinear gives the type of its scales, so these are stored in the type that the product is computed in, as
constants: TensorRT takes no scale that is computed, and no zero points. In bfloat16 a scale keeps 8 bits, which
changes a weight by up to 0.2 %. Formats that TensorRT cannot read, because they have zero points, tables, or 8 bits
in blocks, stay dequantized and are products of floats.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export import packed_weights as packed
from zreward.export.irtools import add_initializer
from zreward.export.passes.compute_type import Casts
from zreward.export.passes.quantized_products import Products
from zreward.export.weights import CheckpointTensor
from zreward.quant.source import QuantizedWeights
from zreward.quant.tensor import CodebookFormat, WeightFormat

TENSORRT_GROUPS = {"int8": 0, "int8-static": 0, "int8-weight": 0, "int4": 128, "fp8": 0}
"""Inputs that share a scale where a scheme does not say it: what TensorRT has kernels for."""

FLOAT8_ZERO = "zreward.float8_zero"
"""Zero point of inputs that are rounded to floats of 8 bits. ONNX Runtime's session looks for the name: on CPUs its
optimizer would make whole-number products of these."""

_log = logging.getLogger(__name__)


def quantize_products_with_qdq(model: ir.Model, weights: QuantizedWeights, dtype: ir.DataType) -> int:
    """Multiply by codes with DequantizeLinear and MatMul, computed in `dtype`.

    Args:
        model: weights laid out by `transpose_weights`.
        weights: the quantized matrices of the checkpoint that the model's weights are bound to.
        dtype: float32, float16 or bfloat16.

    Raises:
        ExportError: a quantized matrix has a layout that the operators cannot express, or inputs of 8 bits that
            calibration found no scale for.
    """
    return _QdqProducts(model.graph, weights, dtype).lower()


def can_multiply(chosen: WeightFormat | CodebookFormat) -> bool:
    """Whether TensorRT multiplies codes of this format; it takes others dequantized."""
    if isinstance(chosen, CodebookFormat) or not chosen.symmetric:
        return False
    return chosen.bits == 4 or chosen.group_size == 0


class _QdqProducts(Products):
    """Products in standard operators, of one type."""

    def __init__(self, graph: ir.Graph, weights: QuantizedWeights, dtype: ir.DataType) -> None:
        super().__init__(graph, weights)
        self.dtype, self.casts = dtype, Casts(dtype)
        self._rounded: dict[tuple[ir.Value, float], ir.Value] = {}
        left = [name for name, chosen in self.formats.items() if not can_multiply(chosen)]
        if left:
            _log.warning(
                "TensorRT multiplies no codes of the format of %s; %d such matrices stay floats",
                left[0],
                len(left),
            )

    def _product(self, builder: tape.Tape, x: ir.Value, tensor: CheckpointTensor) -> ir.Value | None:
        source, (inputs, out) = tensor.layout.source, tensor.shape.numpy()
        chosen = self.formats[source]
        if isinstance(chosen, CodebookFormat) or not can_multiply(chosen):
            return None
        codes = self._part(source, "codes", packed.matrix_codes, _code_type(chosen), (inputs, out))
        if chosen.bits == 4:
            groups = chosen.n_groups(inputs)
            shape: tuple[int, ...] = (groups, out)
            attributes = {"axis": 0, "block_size": inputs // groups}
        else:
            shape, attributes = (out,), {"axis": 1}
        scales = self._part(source, "scales", packed.matrix_float_scales, self.dtype, shape)
        weight = builder.op("DequantizeLinear", [codes, scales], attributes=attributes)
        weight.type, weight.shape = ir.TensorType(self.dtype), tensor.shape
        factor = self.casts.narrowed(builder, self._in_order(builder, x, source, chosen, inputs))
        if chosen.rounds_inputs:
            factor = self._rounded_input(builder, factor, source, _code_type(chosen))
        product = builder.op("MatMul", [factor, weight])
        if x.shape is not None:
            product.shape = ir.Shape([*list(x.shape)[:-1], out])
        return self.casts.widened(builder, product)

    def _rounded_input(
        self, builder: tape.Tape, x: ir.Value, source: str, code_type: ir.DataType
    ) -> ir.Value:
        """`x` through 8 bits with the static scale of the layer; layers that read it with one scale share the nodes."""
        found = self.reader.weights.input_scale(source)
        if found is None:
            raise ExportError(
                f"weight {source!r}: TensorRT rounds inputs to 8 bits with a scale that calibration must find, and "
                "none did; calibrate with --method gptq --calibration FILE, or keep the inputs with int8-weight"
            )
        name = FLOAT8_ZERO if code_type is ir.DataType.FLOAT8E4M3FN else "zreward.int8_zero"
        scale = _representable(found, self.dtype)
        if (x, scale) not in self._rounded:
            operands = [
                add_initializer(self.graph, _scalar(f"{source}.input_scale", scale, self.dtype)),
                add_initializer(self.graph, _scalar(name, 0, code_type)),
            ]
            codes = builder.op("QuantizeLinear", [x, *operands])
            codes.type, codes.shape = ir.TensorType(code_type), x.shape
            values = builder.op("DequantizeLinear", [codes, *operands])
            values.type, values.shape = x.type, x.shape
            self._rounded[x, scale] = values
        return self._rounded[x, scale]


def _code_type(chosen: WeightFormat) -> ir.DataType:
    if chosen.is_float8:
        return ir.DataType.FLOAT8E4M3FN
    return ir.DataType.INT4 if chosen.bits == 4 else ir.DataType.INT8


def _representable(scale: float, dtype: ir.DataType) -> float:
    """The scale as `dtype` holds it, which the quantization and its inverse share.

    Raises:
        ExportError: it is zero or infinite there.
    """
    with np.errstate(over="ignore", under="ignore"):
        stored = float(np.float32(scale).astype(dtype.numpy()))
    if not 0 < stored < float("inf"):
        raise ExportError(
            f"a scale of {scale:.3g} for the inputs of a layer does not fit {dtype.name.lower()}"
        )
    return stored


def _scalar(name: str, value: float, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype, name=name)

"""Products with quantized weights in the operators of ONNX Runtime's CUDA provider, in the type of the products.

    4 or 8 bits     MatMulNBits
    NF4, FP4        MatMulBnb4

Inputs stay as they are: the provider has no product that would round them to 8 bits. Scales are stored in the type of
the products, which both operators want; in bfloat16 a scale keeps 8 bits, which changes a weight by up to 0.2 %.
For single rows the provider has no product of 4 bits in blocks of more than 128 inputs, so larger blocks are stored
as blocks of 128 with equal scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from zreward.export import packed_weights as packed
from zreward.export.passes.compute_type import Casts
from zreward.export.passes.quantized_products import Products
from zreward.export.weights import CheckpointTensor
from zreward.quant.source import QuantizedWeights
from zreward.quant.tensor import CodebookFormat, QuantizedWeight, WeightFormat

_MS = "com.microsoft"
_LARGEST_BLOCK = {4: 128, 8: packed.MAX_BLOCK}


def quantize_products_with_nbits(model: ir.Model, weights: QuantizedWeights, dtype: ir.DataType) -> int:
    """Multiply by codes in `dtype`: float32, float16 or bfloat16.

    Args:
        model: weights laid out by `transpose_weights`.
        weights: the quantized matrices of the checkpoint that the model's weights are bound to.
        dtype: of inputs, scales and results.

    Raises:
        ExportError: a quantized matrix has a layout that the operators cannot express, or its scales do not fit.
    """
    return _NBitsProducts(model.graph, weights, dtype).lower()


class _NBitsProducts(Products):
    """Products of one graph."""

    def __init__(self, graph: ir.Graph, weights: QuantizedWeights, dtype: ir.DataType) -> None:
        super().__init__(graph, weights)
        self.dtype, self.casts = dtype, Casts(dtype)

    def _product(self, builder: tape.Tape, x: ir.Value, tensor: CheckpointTensor) -> ir.Value:
        source, (inputs, out) = tensor.layout.source, tensor.shape.numpy()
        chosen = self.formats[source]
        if isinstance(chosen, CodebookFormat):
            narrow = self.casts.narrowed(builder, x)
            result = self._codebook_product(builder, narrow, source, chosen, inputs, out)
        else:
            narrow = self.casts.narrowed(builder, self._in_order(builder, x, source, chosen, inputs))
            result = self._block_product(builder, narrow, source, chosen, inputs, out)
        if x.shape is not None:
            result.shape = ir.Shape([*list(x.shape)[:-1], out])
        return self.casts.widened(builder, result)

    def _block_product(
        self, builder: tape.Tape, x: ir.Value, source: str, chosen: WeightFormat, inputs: int, out: int
    ) -> ir.Value:
        whole = packed.block_size(chosen.group_size, inputs)
        size = min(whole, _LARGEST_BLOCK[chosen.bits])
        times = whole // size
        blocks = times * -(-inputs // whole)

        def scales(weight: QuantizedWeight) -> NDArray[Any]:
            return packed.fitting_scales(packed.block_float_scales(weight).repeat(times, axis=1), self.dtype)

        operands = [
            x,
            self._part(
                source, "codes", packed.block_codes, ir.DataType.UINT8, (out, blocks, size * chosen.bits // 8)
            ),
            self._part(source, "scales", scales, self.dtype, (out, blocks)),
        ]
        if not chosen.symmetric:

            def zeros(weight: QuantizedWeight) -> NDArray[np.uint8]:
                return packed.block_zeros(weight, times)

            shape = (out, -(-blocks * chosen.bits // 8))
            operands.append(self._part(source, "zeros", zeros, ir.DataType.UINT8, shape))
        attributes = {"K": inputs, "N": out, "bits": chosen.bits, "block_size": size}
        result: ir.Value = builder.op("MatMulNBits", operands, attributes=attributes, domain=_MS)
        return result

    def _codebook_product(
        self,
        builder: tape.Tape,
        x: ir.Value,
        source: str,
        chosen: CodebookFormat,
        inputs: int,
        out: int,
    ) -> ir.Value:
        size = inputs * out

        def scales(weight: Any) -> NDArray[Any]:
            return packed.fitting_scales(packed.codebook_scales(weight), self.dtype)

        operands = [
            x,
            self._part(source, "codes", packed.codebook_codes, ir.DataType.UINT8, (-(-size // 2),)),
            self._part(source, "scales", scales, self.dtype, (-(-size // chosen.block_size),)),
        ]
        attributes = {
            "K": inputs,
            "N": out,
            "block_size": chosen.block_size,
            "quant_type": packed.BNB4_TYPES[chosen.name],
        }
        result: ir.Value = builder.op("MatMulBnb4", operands, attributes=attributes, domain=_MS)
        return result

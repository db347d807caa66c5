"""Products with quantized weights, in the operators that multiply codes.

Each MatMul whose weight the checkpoint holds quantized is replaced, by the weight's format:

    format              ONNX Runtime on CPUs                            portable
    4 or 8 bits         zreward::BlockLinear, see quantized_linear.py   DequantizeLinear → MatMul
    int8 activations    zreward::Int8Linear                             DequantizeLinear → MatMul
    NF4, FP4            MatMulBnb4                                      stays dequantized

Where activations are not to be rounded (`accuracy_level` 0), 4 and 8 bits are MatMulNBits.

**16-bit scales.** Scales are stored as float16. In front of MatMulNBits, also where it is the body of a function,
stands a Cast, which ONNX Runtime folds when it loads the graph. It must: without its optimizations (ORT_DISABLE_ALL),
MatMulNBits of accuracy level 4 packs its weights before it knows the scales, and version 1.31.1 then returns wrong
numbers instead of an error.

**Portable.** Standard operators only, for TensorRT and others. There, weights with int8 activations are
dequantized per output: TensorRT refuses DynamicQuantizeLinear, and static scales of activations are a matter of
its own target. It also refuses zero points and UINT4, so asymmetric weights are for other runtimes. ONNX
Runtime turns DequantizeLinear → MatMul into MatMulNBits of accuracy level 4, which rounds the activations to 8
bits, unless the session's option `session.qdq_matmulnbits_accuracy_level` is "0".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.errors import ExportError
from zreward.export import packed_weights as packed
from zreward.export.irtools import add_initializer, input_of
from zreward.export.packed_weights import Pack, PackedTensor, WeightReader
from zreward.export.passes.quantized_linear import ROUNDING_LEVEL, block_linear, fuse_linears, int8_linear
from zreward.export.passes.quantized_mlp import fuse_mlps
from zreward.export.weights import CheckpointTensor
from zreward.quant.source import QuantizedWeights
from zreward.quant.tensor import CodebookFormat, QuantizedWeight, WeightFormat

_MS = "com.microsoft"
_CODE_TYPES = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}


def quantize_products_for_onnxruntime(
    model: ir.Model, weights: QuantizedWeights, *, accuracy_level: int = ROUNDING_LEVEL
) -> int:
    """Multiply by codes with the operators of com.microsoft that have CPU kernels.

    Args:
        model: weights laid out by `transpose_weights`.
        weights: the quantized matrices of the checkpoint that the model's weights are bound to.
        accuracy_level: 4 rounds activations to 8 bits per block, 0 keeps them.

    Raises:
        ExportError: a quantized matrix has a layout that the operators cannot express.
    """
    changes = _OnnxRuntimeProducts(model.graph, weights, accuracy_level).lower()
    fuse_linears(model)
    fuse_mlps(model)
    return changes


def quantize_products_portably(model: ir.Model, weights: QuantizedWeights) -> int:
    """Multiply by codes with DequantizeLinear and MatMul; arguments and errors as above."""
    return _PortableProducts(model.graph, weights).lower()


def dequantized_weights(model: ir.Model, weights: QuantizedWeights) -> list[str]:
    """Quantized matrices that the lowered graph holds as floats, because its target cannot multiply them."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    sources = {t.layout.source for t in tensors if isinstance(t, CheckpointTensor)}
    return sorted(sources & set(weights.formats))


class Products:
    """One graph's quantized products: what they share, and the walk that replaces them."""

    def __init__(self, graph: ir.Graph, weights: QuantizedWeights) -> None:
        self.graph = graph
        self.formats: Mapping[str, WeightFormat | CodebookFormat] = weights.formats
        self.reader = WeightReader(weights)
        self._reordered: dict[tuple[ir.Value, bytes], ir.Value] = {}

    def lower(self) -> int:
        """Replace every product that can be; returns how many."""
        changes = 0
        for node in list(self.graph):
            tensor = quantized_weight(node, self.formats)
            if tensor is None:
                continue
            builder = tape.Tape()
            result = self._product(builder, input_of(node, 0), tensor)
            if result is None:
                continue
            weight = input_of(node, 1)
            self.graph.insert_before(node, builder.nodes)
            convenience.replace_nodes_and_values(self.graph, node, [node], [], [node.outputs[0]], [result])
            if not weight.uses():
                del self.graph.initializers[str(weight.name)]
            changes += 1
        if changes:
            self.graph.opset_imports.setdefault(_MS, 1)
        return changes

    def _product(self, builder: tape.Tape, x: ir.Value, tensor: CheckpointTensor) -> ir.Value | None:
        """Nodes that compute x · W, or None where the target has none for the format."""
        raise NotImplementedError

    def _part(
        self, source: str, part: str, pack: Pack, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """The initializer of one part of a weight."""
        tensor = PackedTensor(self.reader, source, pack, dtype, shape, f"{source}.{part}")
        return add_initializer(self.graph, tensor)

    def _scales(self, builder: tape.Tape, source: str, pack: Pack, shape: tuple[int, ...]) -> ir.Value:
        """Scales as float32, whatever they are stored in."""
        stored = self._stored_scales(source, pack, shape)
        if stored.dtype is ir.DataType.FLOAT:
            return stored
        scales: ir.Value = builder.op("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
        return scales

    def _stored_scales(self, source: str, pack: Pack, shape: tuple[int, ...]) -> ir.Value:
        """Scales as they are stored, in float32 or float16."""
        chosen = self.reader.weights.formats[source]
        is_wide = isinstance(chosen, WeightFormat) and chosen.scale_bits == 32
        dtype = ir.DataType.FLOAT if is_wide else ir.DataType.FLOAT16
        return self._part(source, "scales", pack, dtype, shape)

    def _constant(self, name: str, values: Any) -> ir.Value:
        return add_initializer(self.graph, ir.tensor(values, name=f"zreward.{name}"))

    def _in_order(
        self, builder: tape.Tape, x: ir.Value, source: str, chosen: WeightFormat, in_features: int
    ) -> ir.Value:
        """The input in the order of the codes: products with the same input and order share the Gather."""
        if not chosen.act_order or chosen.n_groups(in_features) == 1:
            return x
        weight = self.reader.read(source)
        if not isinstance(weight, QuantizedWeight) or weight.order is None:
            raise ExportError(f"weight {source!r}: its format says act_order, but it has no order of inputs")
        order = weight.order.astype(np.int64)
        key = (x, order.tobytes())
        if key not in self._reordered:
            indices = self._constant(f"order.{source}", order)
            self._reordered[key] = builder.op("Gather", [x, indices], attributes={"axis": -1})
        return self._reordered[key]


class _OnnxRuntimeProducts(Products):
    """Products in the operators of com.microsoft."""

    def __init__(self, graph: ir.Graph, weights: QuantizedWeights, accuracy_level: int) -> None:
        super().__init__(graph, weights)
        self.accuracy_level = accuracy_level

    def _product(self, builder: tape.Tape, x: ir.Value, tensor: CheckpointTensor) -> ir.Value:
        source, (inputs, out) = tensor.layout.source, tensor.shape.numpy()
        chosen = self.formats[source]
        if isinstance(chosen, CodebookFormat):
            return self._codebook_product(builder, x, source, chosen, inputs, out)
        if chosen.activations == "int8":
            return self._integer_product(builder, x, source, inputs, out)
        return self._block_product(builder, x, source, chosen, inputs, out)

    def _block_product(
        self, builder: tape.Tape, x: ir.Value, source: str, chosen: WeightFormat, inputs: int, out: int
    ) -> ir.Value:
        size = packed.block_size(chosen.group_size, inputs)
        blocks = -(-inputs // size)
        uint8 = ir.DataType.UINT8
        codes_shape = (out, blocks, size * chosen.bits // 8)
        ordered = self._in_order(builder, x, source, chosen, inputs)
        codes = self._part(source, "codes", packed.block_codes, uint8, codes_shape)
        zeros = []
        if not chosen.symmetric:
            shape = (out, -(-blocks * chosen.bits // 8))
            zeros.append(self._part(source, "zeros", packed.block_zeros, uint8, shape))
        attributes = {"K": inputs, "N": out, "bits": chosen.bits, "block_size": size}
        if self.accuracy_level == ROUNDING_LEVEL:
            scales = self._stored_scales(source, packed.block_scales, (out, blocks))
            return block_linear(builder, self.graph, ordered, [codes, scales, *zeros], attributes)
        attributes["accuracy_level"] = self.accuracy_level
        operands = [ordered, codes, self._scales(builder, source, packed.block_scales, (out, blocks)), *zeros]
        result: ir.Value = builder.op("MatMulNBits", operands, attributes=attributes, domain=_MS)
        return result

    def _integer_product(
        self, builder: tape.Tape, x: ir.Value, source: str, inputs: int, out: int
    ) -> ir.Value:
        codes = self._part(source, "codes", packed.signed_columns, ir.DataType.INT8, (inputs, out))
        return int8_linear(
            builder, self.graph, x, codes, self._stored_scales(source, packed.matrix_scales, (out,))
        )

    def _codebook_product(
        self, builder: tape.Tape, x: ir.Value, source: str, chosen: CodebookFormat, inputs: int, out: int
    ) -> ir.Value:
        size, blocks = inputs * out, -(-inputs * out // chosen.block_size)
        operands = [
            x,
            self._part(source, "codes", packed.codebook_codes, ir.DataType.UINT8, (-(-size // 2),)),
            self._part(source, "scales", packed.codebook_scales, ir.DataType.FLOAT, (blocks,)),
        ]
        attributes = {
            "K": inputs,
            "N": out,
            "block_size": chosen.block_size,
            "quant_type": packed.BNB4_TYPES[chosen.name],
        }
        result: ir.Value = builder.op("MatMulBnb4", operands, attributes=attributes, domain=_MS)
        return result


class _PortableProducts(Products):
    """Products in standard operators."""

    def _product(self, builder: tape.Tape, x: ir.Value, tensor: CheckpointTensor) -> ir.Value | None:
        source, (inputs, out) = tensor.layout.source, tensor.shape.numpy()
        chosen = self.formats[source]
        if isinstance(chosen, CodebookFormat):
            return None
        dtype, groups = _CODE_TYPES[chosen.bits, chosen.symmetric], chosen.n_groups(inputs)
        shape = (groups, out) if groups > 1 else (out,)
        attributes = {"axis": 0, "block_size": inputs // groups} if groups > 1 else {"axis": 1}
        operands = [
            self._part(source, "codes", packed.matrix_codes, dtype, (inputs, out)),
            self._scales(builder, source, packed.matrix_scales, shape),
        ]
        if not chosen.symmetric:
            operands.append(self._part(source, "zeros", packed.matrix_zeros, dtype, shape))
        weight = builder.op("DequantizeLinear", operands, attributes=attributes)
        ordered = self._in_order(builder, x, source, chosen, inputs)
        result: ir.Value = builder.op("MatMul", [ordered, weight])
        return result


def quantized_weight(node: ir.Node, formats: Mapping[str, Any]) -> CheckpointTensor | None:
    """The weight [K, N] of a MatMul, where the checkpoint holds it quantized."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    weight = input_of(node, 1).const_value
    if not isinstance(weight, CheckpointTensor) or weight.layout.source not in formats:
        return None
    layout = weight.layout
    if layout.rows is not None or layout.flatten or not layout.transpose:
        raise ExportError(f"quantized products: {layout.source!r} is laid out unexpectedly in the graph")
    return weight

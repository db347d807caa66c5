"""The multiply-adds of the lowered graphs, counted from their matrices; the manifest keeps them.

`zreward bench` sets its measurements beside the time that the machine would need for these alone. Counted are products
of matrices, attention, and what a DeltaNet layer does to its state and in its convolution. Norms, activations,
rotations and look-ups are not: they are a few per cent of the operations, and a bound may be too low, not too high.

An operator that may multiply matrices and is not known here is an error rather than a zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from zreward.bundle import GraphWork, Work
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.irtools import DOMAIN, input_of, width_of
from zreward.export.passes import quantized_linear as linear
from zreward.export.passes import quantized_mlp as mlp
from zreward.export.passes.causal_conv import CAUSAL_CONV_1D
from zreward.export.passes.delta_rule import GATED_DELTA_RULE
from zreward.export.passes.packed_delta_net import GATED_DELTA_NET
from zreward.export.passes.plain_attention import PRODUCTS_PER_PAIR

_STATE_PRODUCTS = 3  # of every element of a DeltaNet state for a token: with the key, the value and the query
_MICROSOFT = "com.microsoft"
_PASSES_WEIGHT = ("Cast", "DequantizeLinear")
_READS_TABLES = ("Add", "Cast", "DequantizeLinear", "Gather", "Mul")
_COMPUTES_MORE = ("Conv", "ConvTranspose", "Einsum", "If", "Loop", "MatMulInteger", "QLinearMatMul", "Scan")
_FREE = (
    "AddLayerNorm",
    "AddRmsNorm",
    "GatedRMSNorm",
    "InterpolatePositions",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
"""Operators outside the standard ones that multiply no matrices, or next to nothing."""

_log = logging.getLogger(__name__)


class UncountedError(ExportError):
    """A graph has an operator whose work is not known."""


def work_or_none(graphs: Graphs) -> Work | None:
    """`work_of`, or None with a warning: a bundle without the count scores as well."""
    try:
        return work_of(graphs)
    except UncountedError as error:
        _log.warning("%s; benchmarks of this bundle will show no bound", error)
        return None


def work_of(graphs: Graphs) -> Work:
    """Count both graphs, after they were lowered to a target.

    Raises:
        UncountedError: an operator that may multiply matrices is not known, or the shape of a matrix is not.
    """
    return Work(graph_work(graphs.vision), graph_work(graphs.decoder))


def graph_work(model: ir.Model) -> GraphWork:
    """Count one graph; errors as `work_of`."""
    count = _Count()
    for node in model.graph:
        merged = _patches_a_row(node, count.merged)
        count.merged.update(dict.fromkeys(node.outputs, merged))
        counted = _COUNTED.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        if counted is not None:
            counted(node, count)
        else:
            _check_free(node)
    return GraphWork(
        integer_per_row=count.integer,
        float_per_row=count.floating,
        recurrent_per_row=count.recurrent,
        attention_per_pair=count.attention,
        rounded_attention_per_pair=count.rounded_attention,
        integer_per_sequence=count.last_integer,
        float_per_sequence=count.last_floating,
    )


@dataclass
class _Count:
    """Sums so far, and how many patches of the tower one row of each value stands for, where it is not one."""

    integer: int = 0
    floating: int = 0
    recurrent: int = 0
    attention: int = 0
    rounded_attention: int = 0
    last_integer: int = 0
    last_floating: int = 0
    merged: dict[ir.Value, int] = field(default_factory=dict)

    def add_linear(self, node: ir.Node, products: int, *, integer: bool) -> None:
        """A linear layer: of every row, of every few rows, or of the one position that the head reads."""
        shape = node.outputs[0].shape
        is_last = shape is not None and len(shape) == 3 and shape[1] == 1
        products //= self.merged[node.outputs[0]]
        if integer and is_last:
            self.last_integer += products
        elif integer:
            self.integer += products
        elif is_last:
            self.last_floating += products
        else:
            self.floating += products


def _matmul(node: ir.Node, count: _Count) -> None:
    if PRODUCTS_PER_PAIR in node.metadata_props:  # of two activations
        count.attention += int(node.metadata_props[PRODUCTS_PER_PAIR])
        return
    count.add_linear(node, math.prod(_matrix(node, 1)), integer=_is_rounded(input_of(node, 0)))


def _is_rounded(value: ir.Value) -> bool:
    """Whether a value comes from codes of 8 bits, which a runtime multiplies in place of it."""
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _int8_linear(node: ir.Node, count: _Count) -> None:
    """Whatever the operator fuses, each of its matrices of 8-bit codes is one product."""
    matrices = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.INT8 and _is_matrix(v)]
    if not matrices:
        raise UncountedError(f"{node.op_type} {node.name!r} has no matrix of 8-bit codes")
    count.add_linear(node, sum(math.prod(_shape(v)) for v in matrices), integer=True)


def _block_mlp(node: ir.Node, count: _Count) -> None:
    inputs, hidden, outputs = (node.attributes[name].as_int() for name in "KMN")
    products = 2 if "gate_bits" in node.attributes else 1
    count.add_linear(node, hidden * (products * inputs + outputs), integer=True)


def _block_product(node: ir.Node, count: _Count) -> None:
    products = math.prod(node.attributes[name].as_int() for name in "KN")
    level = node.attributes.get("accuracy_level")
    is_rounded = level is not None and level.as_int() == linear.ROUNDING_LEVEL
    count.add_linear(node, products, integer=is_rounded or node.domain == DOMAIN)


def _attention(node: ir.Node, count: _Count) -> None:
    queries, keys = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    count.attention += queries * sum(_width(input_of(node, i)) for i in (1, 2)) // keys


def _rotary_attention(node: ir.Node, count: _Count) -> None:
    _add_attention(node, count, 2 * _width(input_of(node, 0)) // 3)


def _causal_attention(node: ir.Node, count: _Count) -> None:
    heads = node.attributes["query_heads"].as_int()
    _add_attention(node, count, heads * sum(_width(input_of(node, i)) for i in (4, 5)))


def _add_attention(node: ir.Node, count: _Count, products: int) -> None:
    if node.attributes["bfloat16"].as_int():
        count.rounded_attention += products
    else:
        count.attention += products


def _gated_delta_net(node: ir.Node, count: _Count) -> None:
    count.recurrent += math.prod(_matrix(node, 4)) + _state_products(input_of(node, 9))


def _packed_delta_net(node: ir.Node, count: _Count) -> None:
    count.recurrent += _state_products(input_of(node, 6))


def _linear_attention(node: ir.Node, count: _Count) -> None:
    count.recurrent += _state_products(input_of(node, 3))


def _convolution(node: ir.Node, count: _Count) -> None:
    count.recurrent += math.prod(_matrix(node, 1))


def _score_head(node: ir.Node, count: _Count) -> None:
    matrices = [_source(v) for v in node.inputs if v is not None]
    count.last_floating += sum(math.prod(_shape(v)) for v in matrices if _is_matrix(v))


_COUNTED: Mapping[tuple[str, str], Callable[[ir.Node, _Count], None]] = {
    ("", "MatMul"): _matmul,
    ("", "Attention"): _attention,
    (_MICROSOFT, "MatMulNBits"): _block_product,
    (_MICROSOFT, "MatMulBnb4"): _block_product,
    (_MICROSOFT, "LinearAttention"): _linear_attention,
    (_MICROSOFT, GATED_DELTA_NET): _packed_delta_net,
    (_MICROSOFT, "CausalConvWithState"): _convolution,
    (DOMAIN, linear.INT8_LINEAR): _int8_linear,
    (DOMAIN, linear.GELU_INT8_LINEAR): _int8_linear,
    (DOMAIN, linear.SWIGLU_INT8_LINEAR): _int8_linear,
    (DOMAIN, linear.BLOCK_LINEAR): _block_product,
    (DOMAIN, linear.GELU_BLOCK_LINEAR): _block_product,
    (DOMAIN, linear.SWIGLU_BLOCK_LINEAR): _block_product,
    (DOMAIN, mlp.GELU_INT8_MLP): _int8_linear,
    (DOMAIN, mlp.SWIGLU_INT8_MLP): _int8_linear,
    (DOMAIN, mlp.GELU_BLOCK_MLP): _block_mlp,
    (DOMAIN, mlp.SWIGLU_BLOCK_MLP): _block_mlp,
    (DOMAIN, "RotaryAttention"): _rotary_attention,
    (DOMAIN, "CausalAttention"): _causal_attention,
    (DOMAIN, "GatedDeltaNet"): _gated_delta_net,
    (DOMAIN, GATED_DELTA_RULE): _linear_attention,
    (DOMAIN, CAUSAL_CONV_1D): _convolution,
    (DOMAIN, "RubricExpectation"): _score_head,
    (DOMAIN, "LabelMass"): _score_head,
}


def _check_free(node: ir.Node) -> None:
    """Refuse a node that may multiply matrices."""
    standard = node.domain in ("", "ai.onnx")
    has_matrix = any(v is not None and _is_matrix(v) for v in node.inputs)
    known = node.op_type in _READS_TABLES or not has_matrix if standard else node.op_type in _FREE
    if not known or node.op_type in _COMPUTES_MORE:
        raise UncountedError(
            f"the work of {node.domain or 'ai.onnx'}::{node.op_type} {node.name!r} is not known; "
            "count it in export/work.py"
        )


def _patches_a_row(node: ir.Node, merged: Mapping[ir.Value, int]) -> int:
    """How many patches a row of the node's results holds: more than one behind the merger's Reshape."""
    rows = max((merged.get(v, 1) for v in node.inputs if v is not None), default=1)
    if node.op_type != "Reshape":
        return rows
    before, after = input_of(node, 0).shape, node.outputs[0].shape
    if before is None or after is None or len(before) != 2 or len(after) != 2:
        return rows  # heads are parted and joined, which moves no row
    widths = before[1], after[1]
    if not isinstance(widths[0], int) or not isinstance(widths[1], int) or widths[1] % widths[0]:
        return rows
    return rows * (widths[1] // widths[0])


def _state_products(state: ir.Value) -> int:
    """Of one token, with a state [rows, heads, key width, value width]."""
    sizes = [size for size in list(state.shape or ())[1:] if isinstance(size, int)]
    if len(sizes) != 3:
        raise UncountedError(f"the shape of the state {state.name!r} is not known")
    return _STATE_PRODUCTS * math.prod(sizes)


def _width(value: ir.Value) -> int:
    try:
        return width_of(value)
    except ExportError as error:
        raise UncountedError(str(error)) from None


def _matrix(node: ir.Node, index: int) -> tuple[int, ...]:
    """The shape of a weight; a product of two activations has none."""
    weight = _source(input_of(node, index))
    if weight.const_value is None:
        raise UncountedError(
            f"{node.op_type} {node.name!r} multiplies by {weight.name!r}, which is no weight"
        )
    return _shape(weight)


def _source(value: ir.Value) -> ir.Value:
    """The initializer that `value` is computed from, where it is stored in another type."""
    producer = value.producer()
    while producer is not None and producer.op_type in _PASSES_WEIGHT:
        value = input_of(producer, 0)
        producer = value.producer()
    return value


def _is_matrix(value: ir.Value) -> bool:
    return value.const_value is not None and sum(size > 1 for size in _shape(value)) > 1


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())

"""Linear layers whose weights are codes, as local functions of the domain zreward.

    Int8Linear(x [..., K], codes int8 [K, N], scales [N], bias [N] or [1], zero) -> y [..., N]
    BlockLinear(x [..., K], codes uint8 [N, blocks, bytes], scales [N, blocks], bias [N] or [1],
                optional zeros uint8 [N, bytes]; K, N, bits, block_size, symmetric) -> y [..., N]
    GeluInt8Linear, GeluBlockLinear(x, ...)               the same of gelu(x), tanh approximation
    SwiGluInt8Linear, SwiGluBlockLinear(gate, x, ...)     the same of silu(gate) · x

A runtime that has registered the kernels of `zreward.runtime.kernels` runs those; any other runs the body, which is
ONNX Runtime's own operators. Both compute the same, up to the rounding of sums.

**Int8Linear: per-token activations.** DynamicQuantizeMatMul finds one scale for all rows, and one outlier row takes the
precision of the others. Here each row x is divided by its largest magnitude m, which puts it on the 8-bit grid of
[−1, 1] whatever the other rows hold, and its result is multiplied back:

    s = m / 127,   codes = round(x / s) + 128,   y = s · (codes − 128) Wᵀ + bias

QuantizeLinear with one scale per row does the division and the rounding in one pass over the input. A row's result is
the same alone and among others. A row of zeros gives the bias; one with an infinite value gives no finite one, and
cannot be taken for an answer.

Codes of activations are uint8 and those of weights int8; int8 by int8 is 12 times slower on AVX512-VNNI. On x86 without
VNNI, ONNX Runtime sums two products of uint8 by int8 in 16 bits, which saturate, unless the session's option
`session.x64quantprecision` is "1". `zero` is the scalar 128, the zero point of the codes of x. It is an input, so that
ONNX Runtime finds products of one input to share its codes: of two equal constants in two bodies it would not know.

**BlockLinear: a scale for each block of inputs**, of weights of 4 or 8 bits and of the activations, which are rounded
to 8 bits. The body is MatMulNBits of accuracy level 4, whose layouts the inputs have; without zero points (`symmetric`
1) codes stand around the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.export.irtools import DOMAIN, add_function, add_initializer, input_of

INT8_LINEAR = "Int8Linear"
GELU_INT8_LINEAR = "GeluInt8Linear"
SWIGLU_INT8_LINEAR = "SwiGluInt8Linear"
BLOCK_LINEAR = "BlockLinear"
GELU_BLOCK_LINEAR = "GeluBlockLinear"
SWIGLU_BLOCK_LINEAR = "SwiGluBlockLinear"

ROUNDING_LEVEL = 4
"""MatMulNBits's accuracy_level that rounds activations to 8 bits a block; 0 keeps them."""

_NO_BIAS = "zreward.no_bias"
_MS = "com.microsoft"
_CODE_MAX, _CODE_ZERO = 127.0, 128
_SMALLEST_PEAK = 1e-30  # of a row; divided by 127 it is still a normal float32


def int8_linear(
    builder: tape.Tape, graph: ir.Graph, x: ir.Value, codes: ir.Value, scales: ir.Value
) -> ir.Value:
    """A node for x · W without bias; `fuse_linears` must follow."""
    point = add_initializer(graph, ir.tensor(np.uint8(_CODE_ZERO), name="zreward.code_zero"))
    result: ir.Value = builder.op(INT8_LINEAR, [x, codes, scales, _no_bias(graph), point], domain=DOMAIN)
    return result


def block_linear(
    builder: tape.Tape,
    graph: ir.Graph,
    x: ir.Value,
    parts: Sequence[ir.Value],
    attributes: Mapping[str, int],
) -> ir.Value:
    """A node for x · W without bias; `fuse_linears` must follow.

    Args:
        parts: codes, scales and, of an asymmetric format, zero points, as MatMulNBits takes them.
        attributes: K, N, bits and block_size of MatMulNBits.
    """
    inputs = [x, *parts[:2], _no_bias(graph), *parts[2:]]
    attributes = {**attributes, "symmetric": int(len(parts) == 2)}
    result: ir.Value = builder.op(BLOCK_LINEAR, inputs, attributes=attributes, domain=DOMAIN)
    return result


def fuse_linears(model: ir.Model) -> int:
    """Move biases behind the layers and activations in front of them into the node; add the functions that are used."""
    changes = 0
    for node in list(model.graph):
        if node.op_type not in _FUSED or node.domain != DOMAIN:
            continue
        gelu_linear, swiglu_linear = _FUSED[node.op_type]
        changes += _fuse_bias(model.graph, node)
        changes += _fuse_gelu(model.graph, node, gelu_linear) or _fuse_swiglu(
            model.graph, node, swiglu_linear
        )
    add_functions(model)
    return changes


def add_functions(model: ir.Model) -> None:
    """Give the model the bodies of the operators of this module that it uses."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name, (activation, product) in _BODIES.items():
        if name in used:
            add_function(model, _function(name, model.graph.opset_imports[""], activation, product))


def _no_bias(graph: ir.Graph) -> ir.Value:
    return add_initializer(graph, ir.tensor(np.zeros(1, dtype=np.float32), name=_NO_BIAS))


def _fuse_bias(graph: ir.Graph, node: ir.Node) -> int:
    if input_of(node, 3).name != _NO_BIAS:
        return 0
    add = _only_user(node.outputs[0], "Add")
    if add is None:
        return 0
    first, second = input_of(add, 0), input_of(add, 1)
    bias = second if first is node.outputs[0] else first
    if bias.name not in graph.initializers or ir.Shape(bias.shape or ()).numpy() != (_n_outputs(node),):
        return 0
    node.replace_input_with(3, bias)
    convenience.replace_nodes_and_values(graph, add, [add], [], [add.outputs[0]], [node.outputs[0]])
    return 1


def _fuse_gelu(graph: ir.Graph, node: ir.Node, fused: str) -> int:
    gelu = input_of(node, 0).producer()
    if gelu is None or gelu.op_type != "Gelu" or not _has_one_use(gelu.outputs[0]):
        return 0
    approximation = gelu.attributes.get("approximate")
    if approximation is None or approximation.as_string() != "tanh":
        return 0
    return _replace(graph, node, fused, [input_of(gelu, 0), *node.inputs[1:]], [gelu])


def _fuse_swiglu(graph: ir.Graph, node: ir.Node, fused: str) -> int:
    """x = (gate · sigmoid(gate)) · up, each of which nothing else reads."""
    outer = input_of(node, 0).producer()
    if outer is None or outer.op_type != "Mul" or not _has_one_use(outer.outputs[0]):
        return 0
    for index in (0, 1):
        inner = input_of(outer, index).producer()
        if inner is None or inner.op_type != "Mul" or not _has_one_use(inner.outputs[0]):
            continue
        for side in (0, 1):
            sigmoid, gate = input_of(inner, side).producer(), input_of(inner, 1 - side)
            if sigmoid is None or sigmoid.op_type != "Sigmoid" or input_of(sigmoid, 0) is not gate:
                continue
            if not _has_one_use(sigmoid.outputs[0]):
                continue
            inputs = [gate, input_of(outer, 1 - index), *node.inputs[1:]]
            return _replace(graph, node, fused, inputs, [outer, inner, sigmoid])
    return 0


def _n_outputs(node: ir.Node) -> int:
    if "N" in node.attributes:
        return node.attributes["N"].as_int()
    return int(ir.Shape(input_of(node, 1).shape or ()).numpy()[-1])


def _replace(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], obsolete: list[ir.Node]
) -> int:
    builder = tape.Tape()
    result = builder.op(op_type, inputs, attributes=node.attributes, domain=DOMAIN)
    convenience.replace_nodes_and_values(graph, node, [node], builder.nodes, [node.outputs[0]], [result])
    graph.remove(obsolete, safe=True)
    return 1


def _has_one_use(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    if not _has_one_use(value):
        return None
    node = next(iter(value.uses())).node
    return node if node.op_type == op_type else None


# The functions


def _plain(builder: tape.Tape, x: ir.Value) -> ir.Value:
    return x


def _gelu(builder: tape.Tape, x: ir.Value) -> ir.Value:
    result: ir.Value = builder.op("Gelu", [x], attributes={"approximate": "tanh"})
    return result


def _swiglu(builder: tape.Tape, gate: ir.Value, x: ir.Value) -> ir.Value:
    silu = builder.op("Mul", [gate, builder.op("Sigmoid", [gate])])
    result: ir.Value = builder.op("Mul", [silu, x])
    return result


@dataclass(frozen=True)
class _Body:
    """A body under construction: its nodes so far, and the inputs that follow x."""

    builder: tape.Tape
    operands: list[ir.Value]

    def constant(self, value: float | int | list[int]) -> ir.Value:
        kind = "value_ints" if isinstance(value, list) else "value_float"
        made: ir.Value = self.builder.op("Constant", [], attributes={kind: value})
        return made

    def as_float(self, scales: ir.Value) -> ir.Value:
        made: ir.Value = self.builder.op("Cast", [scales], attributes={"to": ir.DataType.FLOAT})
        return made


def _integer_product(body: _Body, x: ir.Value) -> ir.Value:
    """8-bit codes per row, one whole-number product, the row's scale, the bias."""
    builder, (codes, scales, bias, zero) = body.builder, body.operands
    rows = builder.op("Flatten", [x], attributes={"axis": -1})
    axis = body.constant([-1])
    bottom = builder.op("Neg", [builder.op("ReduceMin", [rows, axis])])
    peak = builder.op("Max", [builder.op("ReduceMax", [rows, axis]), bottom, body.constant(_SMALLEST_PEAK)])
    scale = builder.op("Mul", [peak, body.constant(1 / _CODE_MAX)])
    steps = builder.op("Squeeze", [scale, axis])
    zeros = builder.op("Expand", [zero, builder.op("Shape", [steps])])
    row_codes = builder.op("QuantizeLinear", [rows, steps, zeros], attributes={"axis": 0})
    operands = [row_codes, codes, body.constant(1.0), body.as_float(scales), zero]
    product = builder.op("MatMulIntegerToFloat", operands, domain=_MS)
    y = builder.op("Add", [builder.op("Mul", [product, scale]), bias])
    leading = builder.op("Shape", [x], attributes={"end": -1})
    shape = builder.op(
        "Concat", [leading, builder.op("Shape", [codes], attributes={"start": 1})], attributes={"axis": 0}
    )
    result: ir.Value = builder.op("Reshape", [y, shape])
    return result


def _block_product(body: _Body, x: ir.Value) -> ir.Value:
    """MatMulNBits, and the bias."""
    codes, scales, bias, zeros = body.operands
    attributes: dict[str, Any] = {
        name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in _BLOCK_ATTRIBUTES
    }
    attributes["accuracy_level"] = ROUNDING_LEVEL
    operands = [x, codes, body.as_float(scales), zeros]
    product = body.builder.op("MatMulNBits", operands, attributes=attributes, domain=_MS)
    result: ir.Value = body.builder.op("Add", [product, bias])
    return result


_BLOCK_ATTRIBUTES = ("K", "N", "bits", "block_size")
_FUSED = {
    INT8_LINEAR: (GELU_INT8_LINEAR, SWIGLU_INT8_LINEAR),
    BLOCK_LINEAR: (GELU_BLOCK_LINEAR, SWIGLU_BLOCK_LINEAR),
}
_ACTIVATIONS: tuple[Callable[..., ir.Value], ...] = (_plain, _gelu, _swiglu)
_BODIES: dict[str, tuple[Callable[..., ir.Value], Callable[[_Body, ir.Value], ir.Value]]] = {
    name: (activation, product)
    for plain, product in ((INT8_LINEAR, _integer_product), (BLOCK_LINEAR, _block_product))
    for name, activation in zip((plain, *_FUSED[plain]), _ACTIVATIONS, strict=True)
}


def _function(
    name: str,
    opset: int,
    activation: Callable[..., ir.Value],
    product: Callable[[_Body, ir.Value], ir.Value],
) -> ir.Function:
    is_block = product is _block_product
    sources = [ir.Value(name=n) for n in (("gate", "x") if activation is _swiglu else ("x",))]
    operands = [ir.Value(name=n) for n in ("codes", "scales", "bias", "zeros" if is_block else "zero")]
    builder = tape.Tape()
    result = product(_Body(builder, operands), activation(builder, *sources))
    inputs = [*sources, *operands]
    graph = ir.Graph(inputs, [result], nodes=builder.nodes, opset_imports={"": opset, _MS: 1}, name=name)
    required = [ir.Attr(n, ir.AttributeType.INT, None) for n in (*_BLOCK_ATTRIBUTES, "symmetric")]
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=required if is_block else [])

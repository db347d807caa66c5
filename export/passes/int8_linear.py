"""Linear layers with weights and inputs of 8 bits, as local functions of the domain zreward.

    Int8Linear(x [..., K], codes int8 [K, N], scales [N], bias [N] or [1], zero) -> y [..., N]
    GeluInt8Linear(x, codes, scales, bias, zero)             the same of gelu(x), tanh approximation
    SwiGluInt8Linear(gate, x, codes, scales, bias, zero)     the same of silu(gate) · x

`zero` is the scalar 128, the zero point of the codes of x. It is an input, so that ONNX Runtime finds products of one
input to share its codes: of two equal constants in two bodies it would not know.

A runtime that has registered the kernels of `zreward.runtime.kernels` runs those; any other runs the body, which is
ONNX Runtime's own operators. Both compute the same, up to the rounding of sums.

**Per-token activations.** DynamicQuantizeMatMul finds one scale for all rows, and one outlier row takes the precision
of the others. Here each row x is divided by its largest magnitude m, which puts it on the 8-bit grid of [−1, 1]
whatever the other rows hold, and its result is multiplied back:

    s = m / 127,   codes = round(x / s) + 128,   y = s · (codes − 128) Wᵀ + bias

QuantizeLinear with one scale per row does the division and the rounding in one pass over the input. A row's result is
the same alone and among others. A row of zeros gives the bias; one with an infinite value gives no finite one, and
cannot be taken for an answer.

Codes of activations are uint8 and those of weights int8; int8 by int8 is 12 times slower on AVX512-VNNI. On x86 without
VNNI, ONNX Runtime sums two products of uint8 by int8 in 16 bits, which saturate, unless the session's option
`session.x64quantprecision` is "1".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.export.irtools import DOMAIN, add_function, add_initializer, input_of

INT8_LINEAR = "Int8Linear"
GELU_INT8_LINEAR = "GeluInt8Linear"
SWIGLU_INT8_LINEAR = "SwiGluInt8Linear"

_NO_BIAS = "zreward.no_bias"
_MS = "com.microsoft"
_CODE_MAX, _CODE_ZERO = 127.0, 128
_SMALLEST_PEAK = 1e-30  # of a row; divided by 127 it is still a normal float32


def int8_linear(
    builder: tape.Tape, graph: ir.Graph, x: ir.Value, codes: ir.Value, scales: ir.Value
) -> ir.Value:
    """A node for x · W without bias; `fuse_int8_linears` must follow."""
    bias = add_initializer(graph, ir.tensor(np.zeros(1, dtype=np.float32), name=_NO_BIAS))
    point = add_initializer(graph, ir.tensor(np.uint8(_CODE_ZERO), name="zreward.code_zero"))
    result: ir.Value = builder.op(INT8_LINEAR, [x, codes, scales, bias, point], domain=DOMAIN)
    return result


def fuse_int8_linears(model: ir.Model) -> int:
    """Move biases behind Int8Linear and activations in front of it into the node; add the functions that are used."""
    changes = 0
    for node in list(model.graph):
        if node.op_type != INT8_LINEAR or node.domain != DOMAIN:
            continue
        changes += _fuse_bias(model.graph, node)
        changes += _fuse_gelu(model.graph, node) or _fuse_swiglu(model.graph, node)
    add_functions(model)
    return changes


def add_functions(model: ir.Model) -> None:
    """Give the model the bodies of the operators of this module that it uses."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name, activation in _ACTIVATIONS.items():
        if name in used:
            add_function(model, _function(name, model.graph.opset_imports[""], activation))


def _fuse_bias(graph: ir.Graph, node: ir.Node) -> int:
    if input_of(node, 3).name != _NO_BIAS:
        return 0
    add = _only_user(node.outputs[0], "Add")
    if add is None:
        return 0
    first, second = input_of(add, 0), input_of(add, 1)
    bias = second if first is node.outputs[0] else first
    n_outputs = ir.Shape(input_of(node, 1).shape or ()).numpy()[-1]
    if bias.name not in graph.initializers or ir.Shape(bias.shape or ()).numpy() != (n_outputs,):
        return 0
    node.replace_input_with(3, bias)
    convenience.replace_nodes_and_values(graph, add, [add], [], [add.outputs[0]], [node.outputs[0]])
    return 1


def _fuse_gelu(graph: ir.Graph, node: ir.Node) -> int:
    gelu = input_of(node, 0).producer()
    if gelu is None or gelu.op_type != "Gelu" or not _has_one_use(gelu.outputs[0]):
        return 0
    approximation = gelu.attributes.get("approximate")
    if approximation is None or approximation.as_string() != "tanh":
        return 0
    return _replace(graph, node, GELU_INT8_LINEAR, [input_of(gelu, 0), *node.inputs[1:]], [gelu])


def _fuse_swiglu(graph: ir.Graph, node: ir.Node) -> int:
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
            return _replace(graph, node, SWIGLU_INT8_LINEAR, inputs, [outer, inner, sigmoid])
    return 0


def _replace(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], obsolete: list[ir.Node]
) -> int:
    builder = tape.Tape()
    result = builder.op(op_type, inputs, domain=DOMAIN)
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


_ACTIVATIONS: dict[str, Callable[..., ir.Value]] = {
    INT8_LINEAR: _plain,
    GELU_INT8_LINEAR: _gelu,
    SWIGLU_INT8_LINEAR: _swiglu,
}


def _function(name: str, opset: int, activation: Callable[..., ir.Value]) -> ir.Function:
    """The body: activation, 8-bit codes per row, one whole-number product, the row's scale, the bias."""
    names = ("gate", "x") if activation is _swiglu else ("x",)
    sources = [ir.Value(name=n) for n in names]
    codes, scales, bias, zero = (ir.Value(name=n) for n in ("codes", "scales", "bias", "zero"))
    builder = tape.Tape()

    def constant(value: float | int | list[int]) -> ir.Value:
        kind = "value_ints" if isinstance(value, list) else "value_float"
        made: ir.Value = builder.op("Constant", [], attributes={kind: value})
        return made

    x = activation(builder, *sources)
    rows = builder.op("Flatten", [x], attributes={"axis": -1})
    axis = constant([-1])
    bottom = builder.op("Neg", [builder.op("ReduceMin", [rows, axis])])
    peak = builder.op("Max", [builder.op("ReduceMax", [rows, axis]), bottom, constant(_SMALLEST_PEAK)])
    scale = builder.op("Mul", [peak, constant(1 / _CODE_MAX)])
    steps = builder.op("Squeeze", [scale, axis])
    zeros = builder.op("Expand", [zero, builder.op("Shape", [steps])])
    row_codes = builder.op("QuantizeLinear", [rows, steps, zeros], attributes={"axis": 0})
    column_scales = builder.op("Cast", [scales], attributes={"to": ir.DataType.FLOAT})
    operands = [row_codes, codes, constant(1.0), column_scales, zero]
    product = builder.op("MatMulIntegerToFloat", operands, domain=_MS)
    y = builder.op("Add", [builder.op("Mul", [product, scale]), bias])
    leading = builder.op("Shape", [x], attributes={"end": -1})
    shape = builder.op(
        "Concat", [leading, builder.op("Shape", [codes], attributes={"start": 1})], attributes={"axis": 0}
    )
    result = builder.op("Reshape", [y, shape])
    inputs = [*sources, codes, scales, bias, zero]
    graph = ir.Graph(inputs, [result], nodes=builder.nodes, opset_imports={"": opset, _MS: 1}, name=name)
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[])

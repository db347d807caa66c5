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

from collections.abc import Mapping, Sequence
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

BLOCK_ATTRIBUTES = ("K", "N", "bits", "block_size")
"""The attributes that a product of blocks has in common with MatMulNBits."""

_FUSED = {
    INT8_LINEAR: (GELU_INT8_LINEAR, SWIGLU_INT8_LINEAR),
    BLOCK_LINEAR: (GELU_BLOCK_LINEAR, SWIGLU_BLOCK_LINEAR),
}
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
    for family, fused in _FUSED.items():
        for name in sorted(used & {family, *fused}):
            add_function(model, _function(name, family, model.graph.opset_imports[""]))


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


class Body:
    """The body of a function under construction, in ONNX Runtime's own operators."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, tape.Tape()
        self._codes: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def gelu(self, x: ir.Value) -> ir.Value:
        """The approximation with tanh."""
        result: ir.Value = self.nodes.op("Gelu", [x], attributes={"approximate": "tanh"})
        return result

    def swiglu(self, gate: ir.Value, x: ir.Value) -> ir.Value:
        """silu(gate) · x."""
        silu = self.nodes.op("Mul", [gate, self.nodes.op("Sigmoid", [gate])])
        result: ir.Value = self.nodes.op("Mul", [silu, x])
        return result

    def integer_product(self, x: ir.Value, operands: Sequence[ir.Value]) -> ir.Value:
        """8-bit codes per row, one whole-number product, the row's scale, the bias.

        Args:
            operands: codes, scales, bias, and the scalar 128.
        """
        codes, scales, bias, zero = operands
        row_codes, scale = self._row_codes(x, zero)
        factors = [row_codes, codes, self._constant(1.0), self._as_float(scales), zero]
        product = self.nodes.op("MatMulIntegerToFloat", factors, domain=_MS)
        y = self.nodes.op("Add", [self.nodes.op("Mul", [product, scale]), bias])
        leading = self.nodes.op("Shape", [x], attributes={"end": -1})
        width = self.nodes.op("Shape", [codes], attributes={"start": 1})
        shape = self.nodes.op("Concat", [leading, width], attributes={"axis": 0})
        result: ir.Value = self.nodes.op("Reshape", [y, shape])
        return result

    def block_product(
        self, x: ir.Value, operands: Sequence[ir.Value], names: Sequence[str] = BLOCK_ATTRIBUTES
    ) -> ir.Value:
        """MatMulNBits, and the bias.

        Args:
            operands: codes, scales, bias, zero points or nothing.
            names: attributes of the function that hold `BLOCK_ATTRIBUTES`.
        """
        codes, scales, bias, zeros = operands
        attributes: dict[str, Any] = {
            name: ir.RefAttr(name, source, ir.AttributeType.INT)
            for name, source in zip(BLOCK_ATTRIBUTES, names, strict=True)
        }
        attributes["accuracy_level"] = ROUNDING_LEVEL
        product = self.nodes.op(
            "MatMulNBits", [x, codes, self._as_float(scales), zeros], attributes=attributes, domain=_MS
        )
        result: ir.Value = self.nodes.op("Add", [product, bias])
        return result

    def function(
        self, inputs: Sequence[ir.Value], result: ir.Value, attributes: Sequence[str], opset: int
    ) -> ir.Function:
        """The function, whose attributes are integers that a node must give."""
        opsets = {"": opset, _MS: 1}
        graph = ir.Graph(inputs, [result], nodes=self.nodes.nodes, opset_imports=opsets, name=self.name)
        required = [ir.Attr(name, ir.AttributeType.INT, None) for name in attributes]
        return ir.Function(DOMAIN, self.name, "", graph=graph, attributes=required)

    def _row_codes(self, x: ir.Value, zero: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Codes and scales of the rows of x: the same for all products of x."""
        if x not in self._codes:
            rows = self.nodes.op("Flatten", [x], attributes={"axis": -1})
            axis = self._constant([-1])
            bottom = self.nodes.op("Neg", [self.nodes.op("ReduceMin", [rows, axis])])
            top = self.nodes.op("ReduceMax", [rows, axis])
            peak = self.nodes.op("Max", [top, bottom, self._constant(_SMALLEST_PEAK)])
            scale = self.nodes.op("Mul", [peak, self._constant(1 / _CODE_MAX)])
            steps = self.nodes.op("Squeeze", [scale, axis])
            zeros = self.nodes.op("Expand", [zero, self.nodes.op("Shape", [steps])])
            codes = self.nodes.op("QuantizeLinear", [rows, steps, zeros], attributes={"axis": 0})
            self._codes[x] = codes, scale
        return self._codes[x]

    def _constant(self, value: float | list[int]) -> ir.Value:
        kind = "value_ints" if isinstance(value, list) else "value_float"
        made: ir.Value = self.nodes.op("Constant", [], attributes={kind: value})
        return made

    def _as_float(self, scales: ir.Value) -> ir.Value:
        made: ir.Value = self.nodes.op("Cast", [scales], attributes={"to": ir.DataType.FLOAT})
        return made


def _function(name: str, family: str, opset: int) -> ir.Function:
    body = Body(name)
    is_block, is_gated = family == BLOCK_LINEAR, name == _FUSED[family][1]
    sources = [ir.Value(name=n) for n in (("gate", "x") if is_gated else ("x",))]
    operands = [ir.Value(name=n) for n in ("codes", "scales", "bias", "zeros" if is_block else "zero")]
    x = body.swiglu(*sources) if is_gated else sources[0] if name == family else body.gelu(*sources)
    result = (body.block_product if is_block else body.integer_product)(x, operands)
    attributes = (*BLOCK_ATTRIBUTES, "symmetric") if is_block else ()
    return body.function([*sources, *operands], result, attributes, opset)

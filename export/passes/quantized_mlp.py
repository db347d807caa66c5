"""Feed-forward networks whose weights are codes, as one local function of the domain zreward.

    GeluInt8Mlp(x [..., K], (codes, scales, bias) of up and down, zero) -> y [..., N]
        down(gelu(up(x))), each product as in Int8Linear
    SwiGluInt8Mlp(x, (codes, scales, bias) of gate, up and down, zero) -> y
        down(silu(gate(x)) · up(x))
    GeluBlockMlp(x, (codes, scales, bias) of up and down, optional zeros of up and down;
                 K, M, N, and bits, block_size, symmetric of up and down) -> y
    SwiGluBlockMlp                                     the same of gate, up and down, as in BlockLinear

The hidden layer of M values is what a linear layer writes to memory and the next one reads again; a kernel that has
all products keeps it in the cache. Scores are the same, bit for bit.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.export.irtools import DOMAIN, add_function, input_of
from zreward.export.passes import quantized_linear as linear
from zreward.export.passes.quantized_linear import Body

GELU_INT8_MLP = "GeluInt8Mlp"
SWIGLU_INT8_MLP = "SwiGluInt8Mlp"
GELU_BLOCK_MLP = "GeluBlockMlp"
SWIGLU_BLOCK_MLP = "SwiGluBlockMlp"

_PARTS = 3  # of a product: codes, scales, bias
_PLAIN = {
    linear.GELU_INT8_LINEAR: (linear.INT8_LINEAR, GELU_INT8_MLP),
    linear.SWIGLU_INT8_LINEAR: (linear.INT8_LINEAR, SWIGLU_INT8_MLP),
    linear.GELU_BLOCK_LINEAR: (linear.BLOCK_LINEAR, GELU_BLOCK_MLP),
    linear.SWIGLU_BLOCK_LINEAR: (linear.BLOCK_LINEAR, SWIGLU_BLOCK_MLP),
}
_PRODUCTS = {
    GELU_INT8_MLP: ("up", "down"),
    GELU_BLOCK_MLP: ("up", "down"),
    SWIGLU_INT8_MLP: ("gate", "up", "down"),
    SWIGLU_BLOCK_MLP: ("gate", "up", "down"),
}
_FORMAT = ("bits", "block_size", "symmetric")


def fuse_mlps(model: ir.Model) -> int:
    """Join products of one input with the product of their activation, after `fuse_linears`.

    Products stay apart where something else reads the hidden layer, where an order of inputs stands between them, or
    where they are of different families or have different blocks of x.
    """
    changes = 0
    for down in list(model.graph):
        if down.domain == DOMAIN and down.op_type in _PLAIN:
            changes += _fuse(model.graph, down)
    add_functions(model)
    return changes


def add_functions(model: ir.Model) -> None:
    """Give the model the bodies of the operators of this module that it uses."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(used & set(_PRODUCTS)):
        add_function(model, _function(name, model.graph.opset_imports[""]))


def _fuse(graph: ir.Graph, down: ir.Node) -> int:
    family, name = _PLAIN[down.op_type]
    roles = _PRODUCTS[name]
    n_hidden = len(roles) - 1
    first = []
    for value in (input_of(down, i) for i in range(n_hidden)):
        node = value.producer()
        if node is None or node.op_type != family or node.domain != DOMAIN:
            return 0
        if len(list(value.uses())) != 1 or value.is_graph_output():
            return 0
        first.append(node)
    x = input_of(first[0], 0)
    blocks = {node.attributes["block_size"].as_int() for node in first if "block_size" in node.attributes}
    if any(input_of(node, 0) is not x for node in first) or len(blocks) > 1:
        return 0
    operands = [list(node.inputs[1:]) for node in first] + [list(down.inputs[n_hidden:])]
    inputs: list[ir.Value | None] = [x]
    for parts in operands:
        inputs.extend(parts[:_PARTS])
    attributes = {}
    if family == linear.BLOCK_LINEAR:
        inputs.extend(parts[_PARTS] if len(parts) > _PARTS else None for parts in operands)
        nodes = [*first, down]
        attributes = {
            f"{role}_{key}": node.attributes[key].as_int()
            for role, node in zip(roles, nodes, strict=True)
            for key in _FORMAT
        }
        for key, node, source in (("K", first[0], "K"), ("M", down, "K"), ("N", down, "N")):
            attributes[key] = node.attributes[source].as_int()
        while inputs[-1] is None:
            inputs.pop()
    else:
        inputs.append(operands[0][_PARTS])
    builder = tape.Tape()
    result = builder.op(name, inputs, attributes=attributes, domain=DOMAIN)
    convenience.replace_nodes_and_values(graph, down, [down], builder.nodes, [down.outputs[0]], [result])
    graph.remove(first, safe=True)
    return 1


def _function(name: str, opset: int) -> ir.Function:
    roles, body = _PRODUCTS[name], Body(name)
    x = ir.Value(name="x")
    is_block = name in (GELU_BLOCK_MLP, SWIGLU_BLOCK_MLP)
    parts = {r: [ir.Value(name=f"{r}_{n}") for n in ("codes", "scales", "bias")] for r in roles}
    zeros = [ir.Value(name=n) for n in ([f"{r}_zeros" for r in roles] if is_block else ["zero"])]
    points = dict(zip(roles, zeros if is_block else zeros * len(roles), strict=True))

    def product(role: str, value: ir.Value) -> ir.Value:
        operands = [*parts[role], points[role]]
        if not is_block:
            return body.integer_product(value, operands)
        sizes = ("M", "N") if role == "down" else ("K", "M")
        return body.block_product(value, operands, (*sizes, f"{role}_bits", f"{role}_block_size"))

    hidden = [product(role, x) for role in roles[:-1]]
    activated = body.gelu(*hidden) if len(hidden) == 1 else body.swiglu(*hidden)
    result = product("down", activated)
    inputs = [x, *(value for role in roles for value in parts[role]), *zeros]
    attributes = ["K", "M", "N", *(f"{r}_{key}" for r in roles for key in _FORMAT)] if is_block else []
    return body.function(inputs, result, attributes, opset)

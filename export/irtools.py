"""Small steps on onnx_ir graphs that every pass takes: what must be there, or an `ExportError`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.errors import ExportError

DOMAIN = "zreward"
"""Of the operators that are local functions, so that every runtime has them."""


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`, which must be present."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise ExportError(
            f"{node.op_type} {node.name!r} lacks its input {index}; the graph is not as expected"
        )
    return value


def producer_of(value: ir.Value, op_type: str) -> ir.Node:
    """The node that computes `value`, which must be an `op_type`."""
    node = value.producer()
    if node is None or node.op_type != op_type:
        found = "a graph input" if node is None else node.op_type
        raise ExportError(
            f"{value.name!r} comes from {found}, not from {op_type}; the graph is not as expected"
        )
    return node


def only_user(value: ir.Value, op_type: str) -> ir.Node:
    """The one node that reads `value`, which must be an `op_type`."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != op_type:
        raise ExportError(f"{value.name!r} is not read by one {op_type} alone; the graph is not as expected")
    return users[0]


def width_of(value: ir.Value) -> int:
    """The size of the last axis, which must be known; shape inference writes some as the text of a number."""
    size = str(value.shape[-1]) if value.shape else "unknown"
    if not size.isdecimal():
        raise ExportError(f"the width of {value.name!r} is not known; the graph is not as expected")
    return int(size)


def take_over(graph: ir.Graph, old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    """Let `new` stand for `old` everywhere, under the same names, also as outputs of the graph."""
    for value, successor in zip(old, new, strict=True):
        successor.name, successor.type, successor.shape = value.name, value.type, value.shape
        if value.is_graph_output():
            graph.outputs[list(graph.outputs).index(value)] = successor
        value.name = f"{value.name}.replaced"
    convenience.replace_all_uses_with(old, new)


def remove_unread(graph: ir.Graph) -> None:
    """Drop nodes whose results nothing reads, from the end of the graph on."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


def integers(builder: tape.Tape, *values: int) -> ir.Value:
    """A constant int64 [n]."""
    made: ir.Value = builder.op("Constant", [], attributes={"value_ints": list(values)})
    return made


def add_function(model: ir.Model, function: ir.Function) -> None:
    """Give the model a function of `DOMAIN`, and the opsets that its body takes."""
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    for domain, opset in function.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, opset)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` under its own name, or return the initializer that already has it."""
    name = str(tensor.name)
    if name not in graph.initializers:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]

"""Small steps on onnx_ir graphs that every pass takes: what must be there, or an `ExportError`."""

from __future__ import annotations

import onnx_ir as ir

from zreward.errors import ExportError


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


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` under its own name, or return the initializer that already has it."""
    name = str(tensor.name)
    if name not in graph.initializers:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]

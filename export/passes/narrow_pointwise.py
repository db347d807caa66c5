"""What stands between products in 16 bits, and works on each value by itself, in 16 bits too.

`compute_products_in` casts the result of every product back to float32. A runtime that fuses nothing, as ONNX Runtime's
CUDA provider, then reads and writes each value three times where once would do. Here biases are added and activations
are computed in the type of the products, as a model in 16 bits does it, and the casts between them go. A bias behind
its product can then become part of it.

Norms, rotations, and the residual stream with everything that is added to it stay in float32: one of their inputs
does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from zreward.export.irtools import add_initializer, input_of, remove_unread
from zreward.export.weights import CheckpointTensor

_POINTWISE = ("Add", "Gelu", "Mul", "Sigmoid")
_MOVING = ("GatherND", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")


def narrow_pointwise(model: ir.Model, dtype: ir.DataType) -> int:
    """Compute in `dtype` what needs nothing else, after `compute_products_in`; float32 changes nothing.

    Returns:
        How many operators were changed.
    """
    if dtype is ir.DataType.FLOAT:
        return 0
    rewriting = _Rewriting(model.graph, dtype)
    chosen = rewriting.choose()
    for node in chosen:
        rewriting.narrow(node)
    rewriting.drop_casts()
    remove_unread(model.graph)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return len(chosen)


class _Rewriting:
    """One graph; `narrow_of` has each float32 value that is known in the narrow type, and that."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self.narrow_of = {
            node.outputs[0]: input_of(node, 0)
            for node in graph
            if node.op_type == "Cast"
            and input_of(node, 0).dtype is dtype
            and _target(node) is ir.DataType.FLOAT
        }

    def choose(self) -> list[ir.Node]:
        """Operators all of whose inputs are narrow, or vectors; those that only move values if it saves a cast."""
        left_out: set[ir.Node] = set()
        while True:
            narrow = set(self.narrow_of)
            chosen: dict[ir.Node, None] = {}
            for node in self.graph:
                if node not in left_out and self._can_be_narrow(node, narrow):
                    chosen[node] = None
                    narrow.update(node.outputs)
            idle = {
                node for node in chosen if node.op_type in _MOVING and not self._saves_casts(node, chosen)
            }
            if not idle:
                return list(chosen)
            left_out |= idle

    def narrow(self, node: ir.Node) -> None:
        """Put a narrow copy of `node` beside it, and a cast for those who read float32."""
        builder = tape.Tape()
        inputs = [self._narrowed(value) if value is not None else None for value in node.inputs]
        outputs = builder.op_multi_out(
            node.op_type, inputs, attributes=dict(node.attributes), num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, outputs, strict=True):
            new.type, new.shape = ir.TensorType(self.dtype), old.shape
            self.narrow_of[old] = new
            wide = builder.op("Cast", [new], attributes={"to": ir.DataType.FLOAT})
            wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), old.shape
            self.narrow_of[wide] = new
            ir.convenience.replace_all_uses_with(old, wide)
        self.graph.insert_after(node, builder.nodes)

    def drop_casts(self) -> None:
        """Let readers of a value that was cast to float32 and back read what it was."""
        for node in list(self.graph):
            if self._is_narrowing(node) and input_of(node, 0) in self.narrow_of:
                ir.convenience.replace_all_uses_with(node.outputs[0], self.narrow_of[input_of(node, 0)])

    def _can_be_narrow(self, node: ir.Node, narrow: set[ir.Value]) -> bool:
        if node.domain not in ("", "ai.onnx") or any(value.is_graph_output() for value in node.outputs):
            return False
        if node.op_type in _MOVING:
            return input_of(node, 0) in narrow
        if node.op_type not in _POINTWISE:
            return False
        values = [value for value in node.inputs if value is not None]
        return any(v in narrow for v in values) and all(v in narrow or _is_vector(v) for v in values)

    def _saves_casts(self, node: ir.Node, chosen: dict[ir.Node, None]) -> bool:
        """Whether fewer results than all, and at most one, must be cast back for somebody."""
        wide = [
            value
            for value in node.outputs
            if not all(use.node in chosen or self._is_narrowing(use.node) for use in value.uses())
        ]
        return len(wide) < min(2, len(node.outputs))

    def _is_narrowing(self, node: ir.Node) -> bool:
        return node.op_type == "Cast" and _target(node) is self.dtype

    def _narrowed(self, value: ir.Value) -> ir.Value:
        if value in self.narrow_of:
            return self.narrow_of[value]
        if value.const_value is None or value.dtype is not ir.DataType.FLOAT:
            return value  # where to move to
        name = f"{value.name}.{self.dtype.name.lower()}"
        tensor = value.const_value
        if isinstance(tensor, CheckpointTensor):
            return add_initializer(self.graph, tensor.with_layout(name, dtype=self.dtype))
        values = np.asarray(tensor.numpy()).astype(self.dtype.numpy())
        return add_initializer(self.graph, ir.Tensor(values, dtype=self.dtype, name=name))


def _is_vector(value: ir.Value) -> bool:
    """A float32 constant of at most one axis: a bias, a factor."""
    is_float = value.const_value is not None and value.dtype is ir.DataType.FLOAT
    return is_float and value.is_initializer() and value.shape is not None and len(value.shape) <= 1


def _target(node: ir.Node) -> ir.DataType:
    return ir.DataType(node.attributes["to"].as_int())

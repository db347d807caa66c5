"""The vision tower's attention in two operators that ONNX Runtime's CUDA provider has: RotaryEmbedding and Attention.

Queries and keys are rotated in float32, and attention is computed in the type of the matrix products. Attention has
neither mask nor past here, which is what flash attention takes. MultiHeadAttention of com.microsoft would do as well,
but in 16 bits it asks for cuDNN, which nothing else in the graphs needs.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir import tape

from zreward.export.irtools import DOMAIN, input_of, integers, remove_unread, take_over, width_of
from zreward.export.passes.attention import ROTARY_ATTENTION, fuse_rotary_attention


def rotate_and_attend(model: ir.Model, dtype: ir.DataType) -> int:
    """Replace the attention of every block, after `specialize_single_image`.

    Args:
        dtype: that the products are computed in.

    Raises:
        ExportError: an attention stands in other surroundings than mobius gives it.
    """
    graph = model.graph
    fuse_rotary_attention(model, bfloat16=False)
    tables: dict[ir.Value, ir.Value] = {}
    nodes = [node for node in graph if node.op_type == ROTARY_ATTENTION]
    for node in nodes:
        builder = _Attention(node, dtype, tables)
        take_over(graph, node.outputs, [builder.build()])
        graph.insert_after(node, builder.tape.nodes)
    model.functions.pop((DOMAIN, ROTARY_ATTENTION, ""), None)
    remove_unread(graph)
    return len(nodes)


class _Attention:
    """Nodes in place of one RotaryAttention; `tables` are those that blocks before it have turned."""

    def __init__(self, node: ir.Node, dtype: ir.DataType, tables: dict[ir.Value, ir.Value]) -> None:
        self.tape, self.dtype, self.tables = tape.Tape(), dtype, tables
        self.qkv, self.cos, self.sin = (input_of(node, index) for index in range(3))
        self.heads = node.attributes["heads"].as_int()
        self.scale = node.attributes["scale"].as_float()
        self.width = width_of(self.qkv) // 3

    def build(self) -> ir.Value:
        """y [T, H·D], float32, of qkv [T, 3·H·D]."""
        parts = self.tape.op_multi_out(
            "Split",
            [self._cast(self.qkv, self.dtype)],
            attributes={"axis": -1, "num_outputs": 3},
            num_outputs=3,
        )
        query, key, value = (self._typed("Unsqueeze", [part, integers(self.tape, 0)]) for part in parts)
        y = self._typed(
            "Attention",
            [self._rotated(query), self._rotated(key), value],
            q_num_heads=self.heads,
            kv_num_heads=self.heads,
            scale=self.scale,
        )
        for part in (*parts, y):
            part.type = ir.TensorType(self.dtype)
        flat = self._typed("Squeeze", [y, integers(self.tape, 0)])
        flat.shape = ir.Shape([None, self.width])
        return self._cast(flat, ir.DataType.FLOAT)

    def _rotated(self, x: ir.Value) -> ir.Value:
        tables = [self._turned(table) for table in (self.cos, self.sin)]
        floats = self._cast(x, ir.DataType.FLOAT)
        rotated = self.tape.op(
            "RotaryEmbedding", [floats, *tables], attributes={"num_heads": self.heads, "interleaved": 0}
        )
        rotated.type, rotated.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
        return self._cast(rotated, self.dtype)

    def _turned(self, table: ir.Value) -> ir.Value:
        """[T, 1, D/2] as [1, T, D/2]."""
        if table not in self.tables:
            self.tables[table] = self.tape.op("Transpose", [table], attributes={"perm": [1, 0, 2]})
        return self.tables[table]

    def _typed(self, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        """A value [1, T, H·D] in the type of the products."""
        made: ir.Value = self.tape.op(op_type, inputs, attributes=attributes)
        made.type, made.shape = ir.TensorType(self.dtype), ir.Shape([1, None, self.width])
        return made

    def _cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        if self.dtype is ir.DataType.FLOAT:
            return x
        made: ir.Value = self.tape.op("Cast", [x], attributes={"to": dtype})
        made.type, made.shape = ir.TensorType(dtype), x.shape
        return made

"""Attention as two products and a softmax between them, which every builder of engines knows how to fuse.

ONNX's Attention is refused by TensorRT's parsers where it has several outputs, or a mask beside a causal one. Here

    y = softmax(scale · q kᵀ + mask) v        mask [S, P + S]: 0 where column ≤ P + row, else −32,768

with keys and values of the past in front of the new ones. Heads of queries that share a head of keys are laid along the
rows, so that keys and values are not repeated for them: [B, H, G·S, D] against [B, H, P + S, D], H heads of keys, G
heads of queries for each. All of it is computed in the type of the matrix products; queries are scaled before they are
rounded to it, so that the products stay in the range of float16. States are float32 on the outside; values that were
rounded once do not change when they come back.

The mask is made from the lengths of the inputs alone. Rows are padded to the right, where nothing that is read can see
the padding, so the decoder's input `attention_mask` has nothing to say and goes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import input_of, integers, remove_unread, take_over, width_of
from zreward.export.passes.state_rows import Repeat, repeated_to, share_states

PRODUCTS_PER_PAIR = "zreward.products_per_pair"
"""Metadata of a product of two activations: its multiply-adds for one token that looks at one token."""

_HIDDEN = -32768.0  # exact in every float type, and exp() of it is 0 in all of them
_MASK_INPUT = "attention_mask"


def unfuse_vision_attention(model: ir.Model, dtype: ir.DataType) -> int:
    """Replace the attention of a tower that sees one image, after `specialize_single_image`.

    Args:
        dtype: that the products are computed in.

    Raises:
        ExportError: an Attention has a mask or a past.
    """
    nodes = _attentions(model)
    for node in nodes:
        if len([v for v in node.inputs if v is not None]) != 3 or len(node.outputs) != 1:
            raise ExportError("plain attention: an attention of the tower has a mask or a past")
        builder = _Attention(node, dtype)
        key, value = (builder.heads_first(builder.cast(input_of(node, i))) for i in (1, 2))
        result = builder.attend(input_of(node, 0), key, value, mask=None)
        take_over(model.graph, node.outputs, [result])
        model.graph.insert_after(node, builder.tape.nodes)
    remove_unread(model.graph)
    return len(nodes)


def unfuse_causal_attention(model: ir.Model, dtype: ir.DataType, repeat: Repeat = repeated_to) -> int:
    """Replace the decoder's attention and drop its input `attention_mask`.

    Args:
        dtype: that the products are computed in.
        repeat: how states that are fewer than rows are repeated.

    Raises:
        ExportError: an Attention is not causal with a past, or `attention_mask` is read by something else.
    """
    graph = model.graph
    nodes = _attentions(model)
    masks: dict[int, ir.Value] = {}
    for node in nodes:
        if len(node.inputs) != 6 or len(node.outputs) != 3:
            raise ExportError(
                "plain attention: an attention of the decoder has no past, or does not return it"
            )
        past = [input_of(node, index) for index in (4, 5)]
        share_states(*past)
        builder = _Attention(node, dtype)
        if builder.group not in masks:
            mask = tape.Tape()
            masks[builder.group] = _causal_mask(mask, input_of(node, 0), past[0], builder.group, dtype)
            graph.insert_before(nodes[0], mask.nodes)
        rows = input_of(node, 0)
        key, value = (builder.continued(past[i], input_of(node, i + 1), rows, repeat) for i in (0, 1))
        result = builder.attend(input_of(node, 0), key, value, mask=masks[builder.group])
        take_over(graph, node.outputs, [result, builder.as_float(key), builder.as_float(value)])
        graph.insert_after(node, builder.tape.nodes)
    remove_unread(graph)
    for value in list(graph.inputs):
        if value.name == _MASK_INPUT:
            if value.uses():
                raise ExportError(f"plain attention: {_MASK_INPUT!r} is read by more than attention layers")
            graph.inputs.remove(value)
    return len(nodes)


def _attentions(model: ir.Model) -> list[ir.Node]:
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    for node in nodes:
        for name in ("softcap", "qk_matmul_output_mode"):
            if name in node.attributes and node.attributes[name].value:
                raise ExportError(f"plain attention: {name} is {node.attributes[name].value}")
    return nodes


class _Attention:
    """Nodes in place of one Attention."""

    def __init__(self, node: ir.Node, dtype: ir.DataType) -> None:
        self.tape, self.dtype = tape.Tape(), dtype
        query_heads, self.heads = (node.attributes[n].as_int() for n in ("q_num_heads", "kv_num_heads"))
        self.group = query_heads // self.heads
        self.scale = node.attributes["scale"].as_float()
        self.query_width = width_of(input_of(node, 0))
        self.value_width = self.group * width_of(input_of(node, 2))

    def cast(self, x: ir.Value) -> ir.Value:
        return x if self.dtype is ir.DataType.FLOAT else self._op("Cast", [x], to=self.dtype)

    def as_float(self, x: ir.Value) -> ir.Value:
        x.type = ir.TensorType(self.dtype)
        return x if self.dtype is ir.DataType.FLOAT else self._op("Cast", [x], to=ir.DataType.FLOAT)

    def heads_first(self, x: ir.Value) -> ir.Value:
        """[B, T, H·D] as [B, H, T, D]."""
        return self._op("Transpose", [self._reshape(x, 0, 0, self.heads, -1)], perm=[0, 2, 1, 3])

    def continued(self, past: ir.Value, new: ir.Value, rows: ir.Value, repeat: Repeat) -> ir.Value:
        """The past [n, H, P, D] of as many rows as `rows` has, with `new` [B, S, H·D] behind it: [B, H, P + S, D]."""
        before = repeat(self.tape, self.cast(past), rows, 4)
        return self._op("Concat", [before, self.heads_first(self.cast(new))], axis=2)

    def attend(self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None) -> ir.Value:
        """The output [B, S, Hq·D], float32, of query [B, S, Hq·D] on key and value [B, H, T, D]."""
        scale = self.tape.op("Constant", [], attributes={"value_float": self.scale})
        queries = self._rows(self.cast(self._op("Mul", [query, scale])))
        scores = self._product(queries, self._op("Transpose", [key], perm=[0, 1, 3, 2]), self.query_width)
        if mask is not None:
            scores = self._op("Add", [scores, mask])
        rows = self._product(self._op("Softmax", [scores], axis=-1), value, self.value_width)
        return self.as_float(self._columns(rows))

    def _product(self, left: ir.Value, right: ir.Value, width: int) -> ir.Value:
        """A product of two activations, of `width` in all heads of queries."""
        result = self._op("MatMul", [left, right])
        result.producer().metadata_props[PRODUCTS_PER_PAIR] = str(width)
        return result

    def _rows(self, query: ir.Value) -> ir.Value:
        """[B, S, H·G·D] as [B, H, G·S, D]."""
        if self.group == 1:
            return self.heads_first(query)
        parted = self._reshape(query, 0, 0, self.heads, self.group, -1)
        turned = self._op("Transpose", [parted], perm=[0, 2, 3, 1, 4])
        dim = self._op("Shape", [turned], start=4)
        shape = self._op("Concat", [integers(self.tape, 0, 0, -1), dim], axis=0)
        return self._op("Reshape", [turned, shape])

    def _columns(self, rows: ir.Value) -> ir.Value:
        """The way back: [B, H, G·S, D] as [B, S, H·G·D]."""
        if self.group == 1:
            turned = self._op("Transpose", [rows], perm=[0, 2, 1, 3])
        else:
            dim = self._op("Shape", [rows], start=3)
            shape = self._op("Concat", [integers(self.tape, 0, 0, self.group, -1), dim], axis=0)
            turned = self._op("Transpose", [self._op("Reshape", [rows, shape])], perm=[0, 3, 1, 2, 4])
        return self._reshape(turned, 0, 0, -1)

    def _reshape(self, x: ir.Value, *sizes: int) -> ir.Value:
        return self._op("Reshape", [x, integers(self.tape, *sizes)])

    def _op(self, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        made: ir.Value = self.tape.op(op_type, inputs, attributes=attributes)
        return made


def _causal_mask(
    builder: tape.Tape, query: ir.Value, past: ir.Value, group: int, dtype: ir.DataType
) -> ir.Value:
    """[group · S, P + S] for queries [B, S, …] and a past [n, H, P, D]; repeated for the heads that share keys."""
    zero, one = (builder.op("Constant", [], attributes={"value_int": i}) for i in (0, 1))
    tokens = builder.op("Squeeze", [builder.op("Shape", [query], attributes={"start": 1, "end": 2})])
    length = builder.op("Squeeze", [builder.op("Shape", [past], attributes={"start": 2, "end": 3})])
    total = builder.op("Add", [length, tokens])
    rows = builder.op("Unsqueeze", [builder.op("Range", [length, total, one]), integers(builder, 1)])
    columns = builder.op("Range", [zero, total, one])
    seen = builder.op("LessOrEqual", [columns, rows])
    floats = [builder.op("Constant", [], attributes={"value_float": value}) for value in (0.0, _HIDDEN)]
    mask: ir.Value = builder.op("Where", [seen, *floats])
    if group > 1:
        mask = builder.op("Tile", [mask, integers(builder, group, 1)])
    return mask if dtype is ir.DataType.FLOAT else builder.op("Cast", [mask], attributes={"to": dtype})

"""Attention as one local function of the domain zreward for the vision tower and one for the decoder.

    RotaryAttention(qkv [T, 3·H·D], cos [T, 1, D/2], sin [T, 1, D/2]; heads H, scale, bfloat16) -> y [T, H·D]
    CausalAttention(q [B, S, Hq·D], k [B, S, H·D], v [B, S, H·D], mask [B, 1, S, P + S],
                    past_key [n, H, P, D], past_value [n, H, P, D], keep_states [];
                    query_heads Hq, heads H, scale, bfloat16)
        -> y [B, S, Hq·D], present_key [B, H, P + S, D], present_value [B, H, P + S, D]

with n states for B rows, which need not be written where keep_states is 0, see state_rows.py.

The first is the attention of a tower that sees one image: every patch attends to every patch, after queries and keys
are rotated. The second is ONNX's Attention as mobius uses it, where a token sees the past and what stands before it.
The bodies are the nodes that were there. A runtime that has registered the kernels of `zreward.runtime.kernels` runs
those, which read queries, keys and values where the projections left them.

Where `bfloat16` is 1, a kernel may round queries, keys, weights and values to that type in front of its products, whose
sums stay float32. The bodies never do.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import (
    DOMAIN,
    add_function,
    input_of,
    integers,
    only_user,
    producer_of,
    remove_unread,
    take_over,
    width_of,
)
from zreward.export.passes.state_rows import KEEP_STATES, keep_states_input, repeated_to, share_states

ROTARY_ATTENTION = "RotaryAttention"
CAUSAL_ATTENTION = "CausalAttention"


def fuse_rotary_attention(model: ir.Model, *, bfloat16: bool) -> int:
    """Replace the attention of every block of a vision tower, after `specialize_single_image`.

    Args:
        bfloat16: kernels may round factors.

    Raises:
        ExportError: an Attention stands in other surroundings than mobius gives it.
    """
    graph, shapes = model.graph, set()
    nodes = [node for node in graph if node.op_type == "Attention"]
    for node in nodes:
        if len([v for v in node.inputs if v is not None]) != 3 or len(node.outputs) != 1:
            raise ExportError("rotary attention: an attention of the tower has a mask or a past")
        query, key, value = (input_of(producer_of(input_of(node, i), "Unsqueeze"), 0) for i in range(3))
        split = producer_of(value, "Split")
        cos, sin = _rotation(query, split)
        if _rotation(key, split) != (cos, sin):
            raise ExportError("rotary attention: queries and keys are rotated differently")
        squeeze = only_user(node.outputs[0], "Squeeze")
        heads, scale = node.attributes["q_num_heads"].as_int(), node.attributes["scale"].as_float()
        builder = tape.Tape()
        new = builder.op(
            ROTARY_ATTENTION,
            [input_of(split, 0), cos, sin],
            attributes={"heads": heads, "scale": scale, "bfloat16": int(bfloat16)},
            domain=DOMAIN,
        )
        take_over(graph, squeeze.outputs, [new])
        graph.insert_after(squeeze, builder.nodes)
        shapes.add((heads, width_of(value) // heads))
    return _finish(model, len(nodes), shapes, rotary_attention)


def fuse_causal_attention(model: ir.Model, *, bfloat16: bool) -> int:
    """Replace the decoder's Attention nodes; arguments and errors as above."""
    graph, shapes = model.graph, set()
    nodes = [node for node in graph if node.op_type == "Attention"]
    for node in nodes:
        inputs = [input_of(node, index) for index in range(6)]
        plain = {"softcap": 0.0, "qk_matmul_output_mode": 0, "is_causal": 1}
        for name, expected in plain.items():
            if name in node.attributes and node.attributes[name].value != expected:
                raise ExportError(f"causal attention: {name} is {node.attributes[name].value}")
        if len(node.outputs) != 3:
            raise ExportError("causal attention: it does not return its keys and values")
        query_heads, heads = (node.attributes[n].as_int() for n in ("q_num_heads", "kv_num_heads"))
        scale = node.attributes["scale"].as_float()
        attributes = {"query_heads": query_heads, "heads": heads, "scale": scale, "bfloat16": int(bfloat16)}
        share_states(*inputs[4:])
        inputs.append(keep_states_input(graph))
        builder = tape.Tape()
        outputs = builder.op_multi_out(
            CAUSAL_ATTENTION, inputs, attributes=attributes, domain=DOMAIN, num_outputs=3
        )
        take_over(graph, node.outputs, outputs)
        graph.insert_after(node, builder.nodes)
        shapes.add((query_heads, heads))
    return _finish(model, len(nodes), shapes, causal_attention)


def _finish(
    model: ir.Model, changes: int, shapes: set[tuple[int, int]], body: Callable[..., ir.Function]
) -> int:
    if not changes:
        return 0
    if len(shapes) > 1:
        raise ExportError("attention: layers differ in their heads")
    add_function(model, body(model.graph.opset_imports[""], *shapes.pop()))
    remove_unread(model.graph)
    return changes


def _rotation(rotated: ir.Value, split: ir.Node) -> tuple[ir.Value, ir.Value]:
    """cos and sin of [x₁ cos − x₂ sin, x₁ sin + x₂ cos], x₁ and x₂ the halves of each head of a part of `split`."""
    joined = producer_of(input_of(producer_of(rotated, "Reshape"), 0), "Concat")
    difference, total = producer_of(input_of(joined, 0), "Sub"), producer_of(input_of(joined, 1), "Add")
    terms = [producer_of(input_of(side, i), "Mul") for side in (difference, total) for i in (0, 1)]
    factors, parts = [input_of(t, 0) for t in terms], [input_of(t, 1) for t in terms]
    halves = producer_of(parts[0], "Split")
    first, second = halves.outputs
    whole = producer_of(input_of(producer_of(input_of(halves, 0), "Reshape"), 0), "Split")
    cos, sin = factors[0], factors[1]
    if factors != [cos, sin, sin, cos] or parts != [first, second, first, second] or whole is not split:
        raise ExportError("rotary attention: queries or keys are rotated in another way")
    return cos, sin


def rotary_attention(opset: int, heads: int, dim: int) -> ir.Function:
    """The body for towers of these heads; its opset must equal its model's."""
    qkv, cos, sin = (ir.Value(name=name) for name in ("qkv", "cos", "sin"))
    builder = tape.Tape()

    def rotated(x: ir.Value) -> ir.Value:
        parted = builder.op("Reshape", [x, integers(builder, -1, heads, dim)])
        a, b = builder.op_multi_out(
            "Split", [parted], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2
        )
        first = builder.op("Sub", [builder.op("Mul", [a, cos]), builder.op("Mul", [b, sin])])
        second = builder.op("Add", [builder.op("Mul", [a, sin]), builder.op("Mul", [b, cos])])
        joined = builder.op("Concat", [first, second], attributes={"axis": -1})
        made: ir.Value = builder.op("Reshape", [joined, integers(builder, 1, -1, heads * dim)])
        return made

    q, k, v = builder.op_multi_out("Split", [qkv], attributes={"axis": -1, "num_outputs": 3}, num_outputs=3)
    attributes = {
        "q_num_heads": ir.RefAttr("q_num_heads", "heads", ir.AttributeType.INT),
        "kv_num_heads": ir.RefAttr("kv_num_heads", "heads", ir.AttributeType.INT),
        "scale": ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
    }
    values = builder.op("Unsqueeze", [v, integers(builder, 0)])
    y = builder.op("Attention", [rotated(q), rotated(k), values], attributes=attributes)
    result = builder.op("Squeeze", [y, integers(builder, 0)])
    graph = ir.Graph(
        [qkv, cos, sin], [result], nodes=builder.nodes, opset_imports={"": opset}, name=ROTARY_ATTENTION
    )
    made = [ir.AttrInt64("heads", heads), ir.AttrFloat32("scale", dim**-0.5), ir.AttrInt64("bfloat16", 0)]
    return ir.Function(DOMAIN, ROTARY_ATTENTION, "", graph=graph, attributes=made)


def causal_attention(opset: int, query_heads: int, heads: int) -> ir.Function:
    """The body for decoders of these heads; its opset must equal its model's."""
    names = ("q", "k", "v", "mask", "past_key", "past_value", KEEP_STATES)
    inputs = [ir.Value(name=name) for name in names]
    builder = tape.Tape()
    attributes = {
        "q_num_heads": ir.RefAttr("q_num_heads", "query_heads", ir.AttributeType.INT),
        "kv_num_heads": ir.RefAttr("kv_num_heads", "heads", ir.AttributeType.INT),
        "scale": ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
        "is_causal": ir.AttrInt64("is_causal", 1),
    }
    past = [repeated_to(builder, state, inputs[0], 4) for state in inputs[4:6]]
    outputs = builder.op_multi_out("Attention", [*inputs[:4], *past], attributes=attributes, num_outputs=3)
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": opset}, name=CAUSAL_ATTENTION)
    made = [
        ir.AttrInt64("query_heads", query_heads),
        ir.AttrInt64("heads", heads),
        ir.AttrFloat32("scale", 1.0),
        ir.AttrInt64("bfloat16", 0),
    ]
    return ir.Function(DOMAIN, CAUSAL_ATTENTION, "", graph=graph, attributes=made)

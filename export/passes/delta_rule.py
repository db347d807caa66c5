"""The gated delta rule of a DeltaNet layer as one local function of the domain zreward.

    GatedDeltaRule(qkv T [B, S, 2·Hk·Dk + Hv·Dv], decay [B, S, Hv], beta [B, S, Hv], state [n, Hv, Dk, Dv];
                   key_heads Hk, value_heads Hv, scale, key_epsilon) -> y T [B, S, Hv·Dv], new_state [B, Hv, Dk, Dv]

docs/tensorrt.md has its definition; with n states for B rows, see state_rows.py. It reads queries, keys and values
where the convolution left them, and normalizes queries and keys itself. TensorRT takes a plugin of that name where
one is loaded. The body is a Scan over the tokens in float32: correct everywhere, and slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import (
    DOMAIN,
    add_function,
    input_of,
    integers,
    producer_of,
    remove_unread,
    take_over,
    width_of,
)
from zreward.export.passes.delta_norm import EPSILON
from zreward.export.passes.state_rows import repeated_to, share_states

GATED_DELTA_RULE = "GatedDeltaRule"


@dataclass(frozen=True)
class Heads:
    """Number and width of the key (and query) heads and of the value heads."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


def fuse_delta_rules(model: ir.Model) -> int:
    """Replace every LinearAttention of the decoder and the norms in front of it, after `add_delta_norm_epsilon`.

    Raises:
        ExportError: a LinearAttention stands in other surroundings than mobius gives it.
    """
    graph, shapes = model.graph, set()
    nodes = [node for node in graph if node.op_type == "LinearAttention"]
    for node in nodes:
        qkv, heads = _packed(node)
        state, decay, beta = (input_of(node, index) for index in (3, 4, 5))
        share_states(state)
        builder = tape.Tape()
        outputs = builder.op_multi_out(
            GATED_DELTA_RULE,
            [qkv, decay, beta, state],
            attributes={
                "key_heads": heads.keys,
                "value_heads": heads.values,
                "scale": node.attributes["scale"].as_float(),
                "key_epsilon": EPSILON,
                "plugin_namespace": DOMAIN,
                "plugin_version": "1",
            },
            domain=DOMAIN,
            num_outputs=2,
        )
        take_over(graph, node.outputs, outputs)
        graph.insert_after(node, builder.nodes)
        shapes.add(heads)
    if len(shapes) > 1:
        raise ExportError("delta rule: layers differ in their heads")
    if nodes:
        add_function(model, gated_delta_rule(model.graph.opset_imports[""], shapes.pop()))
        remove_unread(graph)
    return len(nodes)


def _packed(attention: ir.Node) -> tuple[ir.Value, Heads]:
    """What queries, keys and values are split from."""
    query, key, value = (input_of(attention, index) for index in range(3))
    split = producer_of(value, "Split")
    for place, side in enumerate((query, key)):
        normed = producer_of(input_of(producer_of(side, "Reshape"), 0), "Div")
        part = input_of(producer_of(input_of(normed, 0), "Reshape"), 0)
        if part is not split.outputs[place]:
            raise ExportError(
                "delta rule: queries, keys and values are not split from one value in this order"
            )
    if value is not split.outputs[2]:
        raise ExportError("delta rule: queries, keys and values are not split from one value in this order")
    keys, values = (attention.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    qkv, value_width = input_of(split, 0), width_of(value)
    return qkv, Heads(keys, values, (width_of(qkv) - value_width) // 2 // keys, value_width // values)


def gated_delta_rule(opset: int, heads: Heads) -> ir.Function:
    """The body for layers of these heads; its opset must equal its model's."""
    qkv, decay, beta, state = inputs = [ir.Value(name=name) for name in ("qkv", "decay", "beta", "state")]
    builder = tape.Tape()
    key_width, value_width = heads.keys * heads.key_dim, heads.values * heads.value_dim
    group = heads.values // heads.keys

    def attribute(name: str) -> ir.Value:
        reference = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
        made: ir.Value = builder.op("Constant", [], attributes={"value_float": reference})
        return made

    def tokens_first(x: ir.Value, *perm: int) -> ir.Value:
        made: ir.Value = builder.op("Transpose", [x], attributes={"perm": list(perm)})
        return made

    def normalized(x: ir.Value) -> ir.Value:
        """Rows of length one, [B, S, Hv, Dk]: each key head stands for `group` value heads."""
        parted = builder.op("Reshape", [x, integers(builder, 0, 0, heads.keys, heads.key_dim)])
        square = builder.op("ReduceSumSquare", [parted, integers(builder, -1)], attributes={"keepdims": 1})
        length = builder.op("Sqrt", [builder.op("Add", [square, attribute("key_epsilon")])])
        row = builder.op("Div", [parted, length])
        if group == 1:
            return row
        each = builder.op("Unsqueeze", [row, integers(builder, 3)])
        wide = builder.op("Expand", [each, integers(builder, 1, 1, 1, group, 1)])
        made: ir.Value = builder.op("Reshape", [wide, integers(builder, 0, 0, heads.values, heads.key_dim)])
        return made

    floats = builder.op("Cast", [qkv], attributes={"to": ir.DataType.FLOAT})
    q, k, v = builder.op_multi_out(
        "Split",
        [floats, integers(builder, key_width, key_width, value_width)],
        attributes={"axis": -1},
        num_outputs=3,
    )
    queries = builder.op("Mul", [normalized(q), attribute("scale")])
    by_value_head = integers(builder, 0, 0, heads.values, heads.value_dim)
    scanned = [
        tokens_first(queries, 1, 0, 2, 3),
        tokens_first(normalized(k), 1, 0, 2, 3),
        tokens_first(builder.op("Reshape", [v, by_value_head]), 1, 0, 2, 3),
        tokens_first(builder.op("Exp", [decay]), 1, 0, 2),
        tokens_first(beta, 1, 0, 2),
    ]
    new_state, rows = builder.op_multi_out(
        "Scan",
        [repeated_to(builder, state, qkv, 4), *scanned],
        attributes={"body": _step(opset), "num_scan_inputs": len(scanned)},
        num_outputs=2,
    )
    flat = builder.op("Reshape", [tokens_first(rows, 1, 0, 2, 3), integers(builder, 0, 0, value_width)])
    y = builder.op("CastLike", [flat, qkv])
    graph = ir.Graph(
        inputs, [y, new_state], nodes=builder.nodes, opset_imports={"": opset}, name=GATED_DELTA_RULE
    )
    attributes = [
        ir.AttrInt64("key_heads", heads.keys),
        ir.AttrInt64("value_heads", heads.values),
        ir.AttrFloat32("scale", heads.key_dim**-0.5),
        ir.AttrFloat32("key_epsilon", EPSILON),
    ]
    return ir.Function(DOMAIN, GATED_DELTA_RULE, "", graph=graph, attributes=attributes)


def _step(opset: int) -> ir.Graph:
    """One token: state [B, Hv, Dk, Dv], q and k [B, Hv, Dk], v [B, Hv, Dv], factor and beta [B, Hv]."""
    names = ("state_in", "q", "k", "v", "factor", "beta")
    state, q, k, v, factor, beta = inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in names
    ]
    builder = tape.Tape()
    last, matrix = integers(builder, -1), integers(builder, -1, -2)
    column = builder.op("Unsqueeze", [k, last])

    def read(key: ir.Value, memory: ir.Value) -> ir.Value:
        """Σ over the keys of key [B, Hv, Dk, 1] · memory, [B, Hv, Dv]."""
        product = builder.op("Mul", [key, memory])
        made: ir.Value = builder.op("ReduceSum", [product, integers(builder, 2)], attributes={"keepdims": 0})
        return made

    kept = builder.op("Mul", [state, builder.op("Unsqueeze", [factor, matrix])])
    wanted = builder.op("Sub", [v, read(column, kept)])
    change = builder.op("Mul", [wanted, builder.op("Unsqueeze", [beta, last])])
    row = builder.op("Unsqueeze", [change, integers(builder, 2)])
    updated = builder.op("Add", [kept, builder.op("Mul", [column, row])])
    y = read(builder.op("Unsqueeze", [q, last]), updated)
    outputs = [updated, y]
    for name, value in zip(("state_out", "y"), outputs, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    for number, node in enumerate(builder.nodes):  # a name may not occur around the body too
        for output in node.outputs:
            output.name = output.name or f"step_{number}"
    return ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": opset}, name="delta_step")

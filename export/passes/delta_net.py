"""The token mixer of a Gated DeltaNet layer as one local function of the domain zreward.

    GatedDeltaNet(qkv [B, S, 2·Kh·Dk + Vh·Dv], z [B, S, Vh·Dv], b [B, S, Vh], a [B, S, Vh], conv_weight [C, 1, 4],
                  A_log [Vh], dt_bias [Vh], norm_weight [Dv], conv_state [n, C, 3], state [n, Vh, Dk, Dv],
                  keep_states []; key_heads Kh, value_heads Vh, scale, norm_epsilon, key_epsilon)
        -> y [B, S, Vh·Dv], conv_state [B, C, 3], state [B, Vh, Dk, Dv]

with n states for B rows, which need not be written where keep_states is 0, see state_rows.py.

It holds everything between a layer's input projections and its output projection: causal convolution, normalized keys
and queries, decays, the gated delta rule, and the gated norm. Its body is what mobius builds for a layer, with ONNX
Runtime's CausalConvWithState and LinearAttention inside. A runtime that has registered the kernels of
`zreward.runtime.kernels` runs one kernel instead, which spares the transposes around the convolution, and thirty passes
over the activations.
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
    only_user,
    producer_of,
    remove_unread,
    take_over,
    width_of,
)
from zreward.export.passes.delta_norm import EPSILON, normalized_heads
from zreward.export.passes.state_rows import KEEP_STATES, keep_states_input, repeated_to, share_states

GATED_DELTA_NET = "GatedDeltaNet"

_MS = "com.microsoft"
_INPUTS = (
    "qkv",
    "z",
    "b",
    "a",
    "conv_weight",
    "A_log",
    "dt_bias",
    "norm_weight",
    "conv_state",
    "state",
    KEEP_STATES,
)


@dataclass(frozen=True)
class Heads:
    """Number and width of the key (and query) heads and of the value heads."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Layer:
    """One layer as it was found: inputs in the order of the function, and what the function replaces."""

    inputs: list[ir.Value]
    last: ir.Node
    conv_state: ir.Value
    state: ir.Value
    heads: Heads
    scale: float
    norm_epsilon: float


def fuse_delta_nets(model: ir.Model) -> int:
    """Replace every DeltaNet token mixer of the decoder, after `add_delta_norm_epsilon`.

    Raises:
        ExportError: a LinearAttention stands in other surroundings than mobius gives it.
    """
    graph, heads = model.graph, set()
    layers = [match_layer(node) for node in graph if node.op_type == "LinearAttention"]
    if not layers:
        return 0
    keep = keep_states_input(graph)
    for layer in layers:
        builder = tape.Tape()
        outputs = builder.op_multi_out(
            GATED_DELTA_NET,
            [*layer.inputs, keep],
            attributes={
                "key_heads": layer.heads.keys,
                "value_heads": layer.heads.values,
                "scale": layer.scale,
                "norm_epsilon": layer.norm_epsilon,
                "key_epsilon": EPSILON,
            },
            domain=DOMAIN,
            num_outputs=3,
        )
        share_states(*layer.inputs[-2:])
        take_over(graph, [layer.last.outputs[0], layer.conv_state, layer.state], outputs)
        graph.insert_after(layer.last, builder.nodes)
        heads.add(layer.heads)
    if len(heads) > 1:
        raise ExportError("delta net: layers differ in their heads")
    add_function(model, gated_delta_net(model.graph.opset_imports[""], heads.pop()))
    remove_unread(graph)
    return len(layers)


def match_layer(attention: ir.Node) -> Layer:
    """The layer around a LinearAttention."""
    query, key, value, state, decay, beta = (input_of(attention, index) for index in range(6))
    split = producer_of(value, "Split")
    for side in (query, key):
        normed = producer_of(input_of(producer_of(side, "Reshape"), 0), "Div")
        if producer_of(input_of(producer_of(input_of(normed, 0), "Reshape"), 0), "Split") is not split:
            raise ExportError("delta net: queries, keys and values come from different convolutions")
    convolution = producer_of(
        input_of(producer_of(input_of(split, 0), "Transpose"), 0), "CausalConvWithState"
    )
    qkv = input_of(producer_of(input_of(convolution, 0), "Transpose"), 0)
    product = producer_of(decay, "Mul")
    rates, softplus = producer_of(input_of(product, 0), "Neg"), producer_of(input_of(product, 1), "Softplus")
    shifted = producer_of(input_of(softplus, 0), "Add")
    norm = only_user(only_user(attention.outputs[0], "Reshape").outputs[0], "RMSNormalization")
    gated = only_user(norm.outputs[0], "Mul")
    silu = producer_of(input_of(gated, 1), "Mul")
    z = input_of(producer_of(input_of(silu, 0), "Reshape"), 0)
    last = only_user(gated.outputs[0], "Reshape")
    q_heads, v_heads = (attention.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    channels = width_of(qkv)
    values = width_of(value)
    heads = Heads(q_heads, v_heads, (channels - values) // 2 // q_heads, values // v_heads)
    inputs = [
        qkv,
        z,
        input_of(producer_of(beta, "Sigmoid"), 0),
        input_of(shifted, 0),
        input_of(convolution, 1),
        input_of(producer_of(input_of(rates, 0), "Exp"), 0),
        input_of(shifted, 1),
        input_of(norm, 1),
        input_of(convolution, 3),
        state,
    ]
    scale, epsilon = attention.attributes["scale"].as_float(), norm.attributes["epsilon"].as_float()
    return Layer(inputs, last, convolution.outputs[1], attention.outputs[1], heads, scale, epsilon)


def gated_delta_net(opset: int, heads: Heads) -> ir.Function:
    """The body for layers of these heads; its opset must equal its model's."""
    inputs = [ir.Value(name=name) for name in _INPUTS]
    qkv, z, b, a, conv_weight, rates, dt_bias, norm_weight, conv_state, state, _ = inputs
    builder = tape.Tape()

    def attribute(name: str) -> ir.Value:
        reference = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
        made: ir.Value = builder.op("Constant", [], attributes={"value_float": reference})
        return made

    def normalized(x: ir.Value) -> ir.Value:
        return normalized_heads(builder, x, heads.keys, heads.key_dim, attribute("key_epsilon"))

    conv_states, states = repeated_to(builder, conv_state, qkv, 3), repeated_to(builder, state, qkv, 4)
    key_width, value_width = heads.keys * heads.key_dim, heads.values * heads.value_dim
    swapped = {"perm": [0, 2, 1]}
    zeros = builder.op(
        "Expand",
        [
            builder.op("Constant", [], attributes={"value_float": 0.0}),
            integers(builder, 2 * key_width + value_width),
        ],
    )
    mixed, new_conv_state = builder.op_multi_out(
        "CausalConvWithState",
        [builder.op("Transpose", [qkv], attributes=swapped), conv_weight, zeros, conv_states],
        attributes={"activation": "silu"},
        domain=_MS,
        num_outputs=2,
    )
    mixed = builder.op("Transpose", [mixed], attributes=swapped)
    q, k, v = builder.op_multi_out(
        "Split",
        [mixed, integers(builder, key_width, key_width, value_width)],
        attributes={"axis": -1},
        num_outputs=3,
    )
    speed = builder.op("Softplus", [builder.op("Add", [a, dt_bias])])
    decay = builder.op("Mul", [builder.op("Neg", [builder.op("Exp", [rates])]), speed])
    attributes = {
        "q_num_heads": ir.RefAttr("q_num_heads", "key_heads", ir.AttributeType.INT),
        "kv_num_heads": ir.RefAttr("kv_num_heads", "value_heads", ir.AttributeType.INT),
        "scale": ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
    }
    output, new_state = builder.op_multi_out(
        "LinearAttention",
        [normalized(q), normalized(k), v, states, decay, builder.op("Sigmoid", [b])],
        attributes=attributes,
        domain=_MS,
        num_outputs=2,
    )
    parted = integers(builder, 0, 0, heads.values, heads.value_dim)
    by_head = builder.op("Reshape", [output, parted])
    epsilon = ir.RefAttr("epsilon", "norm_epsilon", ir.AttributeType.FLOAT)
    normed = builder.op(
        "RMSNormalization", [by_head, norm_weight], attributes={"axis": -1, "epsilon": epsilon}
    )
    gate = builder.op("Reshape", [z, parted])
    gated = builder.op("Mul", [normed, builder.op("Mul", [gate, builder.op("Sigmoid", [gate])])])
    y = builder.op("Reshape", [gated, integers(builder, 0, 0, value_width)])
    graph = ir.Graph(
        inputs,
        [y, new_conv_state, new_state],
        nodes=builder.nodes,
        opset_imports={"": opset, _MS: 1},
        name=GATED_DELTA_NET,
    )
    return ir.Function(
        DOMAIN,
        GATED_DELTA_NET,
        "",
        graph=graph,
        attributes=[
            ir.AttrInt64("key_heads", heads.keys),
            ir.AttrInt64("value_heads", heads.values),
            ir.AttrFloat32("scale", heads.key_dim**-0.5),
            ir.AttrFloat32("norm_epsilon", 1e-6),
            ir.AttrFloat32("key_epsilon", EPSILON),
        ],
    )

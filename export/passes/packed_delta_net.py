"""The token mixer of a Gated DeltaNet layer in three operators of ONNX Runtime's CUDA provider.

    CausalConvWithState(x T [B, S, C], kernel T [C, 1, W], , state T [B, W − 1, C]; channels_last) -> y T, state T
    GatedDeltaNet(y T, , , , a [B, S, Hv], b [B, S, Hv], state [B, Hv, Dv, Dk], A_log [Hv], dt_bias [Hv])
        -> o T [B, S, Hv, Dv], state [B, Hv, Dv, Dk]
    GatedRMSNorm(o T [B, S, Hv·Dv], weight T [Dv], z T [B, S, Hv·Dv]) -> T [B, S, Hv·Dv]

GatedDeltaNet takes queries, keys and values as the convolution leaves them, normalizes them, and computes decay and
write strength in float32. It works on chunks of tokens where LinearAttention takes one after the other. States have the
layout of its kernels: channels last, and values before keys. T is the type of the products around the layer; the states
of the graph are float32.

There is no GatedDeltaNet for CPUs. The model brings a local function of the same inputs and outputs, which no node
names; `zreward.stand_ins` names it where the graph runs on a CPU, as at the end of an export. Its
epsilon of the norms is transformers'; that of the CUDA kernels is smaller, which only keys near zero would show.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import (
    add_initializer,
    input_of,
    integers,
    remove_unread,
    take_over,
)
from zreward.export.passes.causal_conv import check_no_bias
from zreward.export.passes.delta_net import Heads, Layer, match_layer
from zreward.export.passes.delta_norm import EPSILON, normalized_heads
from zreward.export.passes.state_rows import STATE_BATCH, Repeat, share_states
from zreward.export.weights import CheckpointTensor
from zreward.stand_ins import STAND_INS

GATED_DELTA_NET = "GatedDeltaNet"
MICROSOFT = "com.microsoft"

_INPUTS = ("query", "key", "value", "cu_seqlens", "decay", "beta", "initial_state", "a_log", "dt_bias")


def pack_delta_nets(model: ir.Model, dtype: ir.DataType, repeat: Repeat) -> ir.Function | None:
    """Replace every DeltaNet token mixer of the decoder, after `add_delta_norm_epsilon`.

    Args:
        dtype: of the products around the layers.
        repeat: how states that are fewer than rows are repeated.

    Returns:
        The function that stands in for GatedDeltaNet on CPUs, for the model to bring along once all that nobody calls
        has been removed from it; None where there is no such layer.

    Raises:
        ExportError: a layer is not as mobius builds it, or its convolution has a bias or another activation.
    """
    graph = model.graph
    layers = [match_layer(node) for node in graph if node.op_type == "LinearAttention"]
    for layer in layers:
        _check_convolution(layer)
        builder = _Layer(graph, layer, dtype, repeat)
        result, conv_state, state = builder.build()
        take_over(graph, [layer.last.outputs[0], layer.conv_state, layer.state], [result, conv_state, state])
        for value, like in ((conv_state, layer.inputs[-2]), (state, layer.inputs[-1])):
            value.shape = ir.Shape(["batch", *list(like.shape or ())[1:]])
        graph.insert_after(layer.last, builder.tape.nodes)
    if len({layer.heads for layer in layers}) > 1:
        raise ExportError("packed delta net: layers differ in their heads")
    if not layers:
        return None
    graph.opset_imports.setdefault(STAND_INS[MICROSOFT, GATED_DELTA_NET][0], 1)
    remove_unread(graph)
    return stand_in(graph.opset_imports[""], layers[0].heads)


def _check_convolution(layer: Layer) -> None:
    convolution = layer.conv_state.producer()
    assert convolution is not None
    if convolution.attributes["activation"].as_string() != "silu":
        raise ExportError("packed delta net: the activation of a convolution is not SiLU")
    check_no_bias(input_of(convolution, 2))


class _Layer:
    """Nodes in place of one layer."""

    def __init__(self, graph: ir.Graph, layer: Layer, dtype: ir.DataType, repeat: Repeat) -> None:
        self.graph, self.layer, self.dtype, self.repeat = graph, layer, dtype, repeat
        self.tape = tape.Tape()

    def build(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """What the layer gives, float32, and its new states."""
        qkv, z, b, a, kernel, a_log, dt_bias, weight, conv_state, state = self.layer.inputs
        heads, rows = self.layer.heads, qkv
        share_states(conv_state, state)
        taps = list(conv_state.shape or ())[-1]
        channels = list(conv_state.shape or ())[1]
        conv_state.shape = ir.Shape([STATE_BATCH, taps, channels])
        state.shape = ir.Shape([STATE_BATCH, heads.values, heads.value_dim, heads.key_dim])
        before = self._narrow(self.repeat(self.tape, conv_state, rows, 3))
        mixed, new_conv_state = self.tape.op_multi_out(
            "CausalConvWithState",
            [self._narrow(qkv), self._weight(kernel), None, before],
            attributes={"activation": "silu", "channels_last": 1},
            domain=MICROSOFT,
            num_outputs=2,
        )
        output, new_state = self.tape.op_multi_out(
            GATED_DELTA_NET,
            [mixed, None, None, None, a, b, self.repeat(self.tape, state, rows, 4), a_log, dt_bias],
            attributes={
                "scale": self.layer.scale,
                "qk_l2_norm": 1,
                "gate_activation": "qwen",
                "beta_activation": "sigmoid",
            },
            domain=MICROSOFT,
            num_outputs=2,
        )
        joined = self.tape.op("Reshape", [output, integers(self.tape, 0, 0, -1)])
        normed = self.tape.op(
            "GatedRMSNorm",
            [joined, self._weight(weight), self._narrow(z)],
            attributes={"activation": "silu", "epsilon": self.layer.norm_epsilon},
            domain=MICROSOFT,
        )
        for value in (mixed, new_conv_state, output, joined, normed):
            value.type = ir.TensorType(self.dtype)
        return self._widen(normed), self._widen(new_conv_state), new_state

    def _narrow(self, x: ir.Value) -> ir.Value:
        return self._cast(x, self.dtype)

    def _widen(self, x: ir.Value) -> ir.Value:
        return self._cast(x, ir.DataType.FLOAT)

    def _cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        if self.dtype is ir.DataType.FLOAT:
            return x
        made: ir.Value = self.tape.op("Cast", [x], attributes={"to": dtype})
        made.type, made.shape = ir.TensorType(dtype), x.shape
        return made

    def _weight(self, weight: ir.Value) -> ir.Value:
        """A weight of the checkpoint in the type of the products."""
        tensor = weight.const_value
        if not isinstance(tensor, CheckpointTensor):
            raise ExportError(f"packed delta net: {weight.name!r} is not a weight of the checkpoint")
        if self.dtype is ir.DataType.FLOAT:
            return weight
        return add_initializer(
            self.graph, tensor.with_layout(f"{weight.name}.{self.dtype.name.lower()}", dtype=self.dtype)
        )


def stand_in(opset: int, heads: Heads) -> ir.Function:
    """GatedDeltaNet as `pack_delta_nets` uses it, for layers of these heads, in operators that CPUs have."""
    domain, name = STAND_INS[MICROSOFT, GATED_DELTA_NET]
    inputs = [ir.Value(name=n) for n in _INPUTS]
    query, _, _, _, decay, beta, state, a_log, dt_bias = inputs
    builder = tape.Tape()
    key_width, value_width = heads.keys * heads.key_dim, heads.values * heads.value_dim
    epsilon = builder.op("Constant", [], attributes={"value_float": EPSILON})
    floats = builder.op("Cast", [query], attributes={"to": ir.DataType.FLOAT})
    q, k, v = builder.op_multi_out(
        "Split",
        [floats, integers(builder, key_width, key_width, value_width)],
        attributes={"axis": -1},
        num_outputs=3,
    )
    speed = builder.op("Softplus", [builder.op("Add", [decay, dt_bias])])
    keys_first = {"perm": [0, 1, 3, 2]}
    output, new_state = builder.op_multi_out(
        "LinearAttention",
        [
            normalized_heads(builder, q, heads.keys, heads.key_dim, epsilon),
            normalized_heads(builder, k, heads.keys, heads.key_dim, epsilon),
            v,
            builder.op("Transpose", [state], attributes=keys_first),
            builder.op("Mul", [builder.op("Neg", [builder.op("Exp", [a_log])]), speed]),
            builder.op("Sigmoid", [beta]),
        ],
        attributes={
            "q_num_heads": heads.keys,
            "kv_num_heads": heads.values,
            "scale": ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
        },
        domain=MICROSOFT,
        num_outputs=2,
    )
    by_head = builder.op("Reshape", [output, integers(builder, 0, 0, heads.values, heads.value_dim)])
    outputs = [
        builder.op("CastLike", [by_head, query]),
        builder.op("Transpose", [new_state], attributes=keys_first),
    ]
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": opset, MICROSOFT: 1}, name=name)
    attributes = [
        ir.AttrFloat32("scale", heads.key_dim**-0.5),
        ir.AttrInt64("qk_l2_norm", 1),
        ir.AttrString("gate_activation", "qwen"),
        ir.AttrString("beta_activation", "sigmoid"),
    ]
    return ir.Function(domain, name, "", graph=graph, attributes=attributes)

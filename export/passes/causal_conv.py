"""The causal convolution of a DeltaNet layer as one local function of the domain zreward.

    CausalConv1d(x T [B, S, C], weight [C, W], state [n, C, W − 1]) -> y T [B, S, C], new_state [B, C, W − 1]

docs/tensorrt.md has its definition; with n states for B rows, see state_rows.py. It takes and gives channels last, as
the projections around it do, so that nothing is transposed but the states. TensorRT takes a plugin of that name where
one is loaded. The body adds up W shifted copies in float32, in place of a Conv, which wants channels first.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import (
    DOMAIN,
    add_function,
    add_initializer,
    input_of,
    integers,
    only_user,
    producer_of,
    remove_unread,
    take_over,
)
from zreward.export.passes.state_rows import repeated_to, share_states
from zreward.export.weights import CheckpointTensor

CAUSAL_CONV_1D = "CausalConv1d"

_END = 2**31 - 1
_SWAPPED = (0, 2, 1)


def fuse_causal_convolutions(model: ir.Model) -> int:
    """Replace every Transpose → CausalConvWithState → Transpose of the decoder.

    Raises:
        ExportError: a convolution stands in other surroundings than mobius gives it, or has a bias.
    """
    graph, widths = model.graph, set()
    nodes = [node for node in graph if node.op_type == "CausalConvWithState"]
    for node in nodes:
        before, after = producer_of(input_of(node, 0), "Transpose"), only_user(node.outputs[0], "Transpose")
        if any(tuple(t.attributes["perm"].as_ints()) != _SWAPPED for t in (before, after)):
            raise ExportError("causal convolution: its channels are not swapped with the tokens")
        if node.attributes["activation"].as_string() != "silu":
            raise ExportError("causal convolution: its activation is not SiLU")
        check_no_bias(input_of(node, 2))
        kernel, state = input_of(node, 1), input_of(node, 3)
        if not isinstance(kernel.const_value, CheckpointTensor):
            raise ExportError("causal convolution: its kernel is not a weight of the checkpoint")
        matrix = add_initializer(graph, kernel.const_value.with_layout(f"{kernel.name}.matrix", flatten=True))
        widths.add(kernel.const_value.shape.numpy()[-1])
        share_states(state)
        builder = tape.Tape()
        outputs = builder.op_multi_out(
            CAUSAL_CONV_1D,
            [input_of(before, 0), matrix, state],
            attributes={"plugin_namespace": DOMAIN, "plugin_version": "1"},
            domain=DOMAIN,
            num_outputs=2,
        )
        take_over(graph, [after.outputs[0], node.outputs[1]], outputs)
        graph.insert_after(after, builder.nodes)
    if len(widths) > 1:
        raise ExportError("causal convolution: layers differ in the width of their kernels")
    if nodes:
        add_function(model, causal_conv_1d(model.graph.opset_imports[""], widths.pop()))
        remove_unread(graph)
    return len(nodes)


def check_no_bias(bias: ir.Value) -> None:
    """Refuse a bias that is not zero, which mobius gives every convolution."""
    values = bias.const_value
    if values is None or isinstance(values, CheckpointTensor) or values.numpy().any():
        raise ExportError("causal convolution: it has a bias, which Qwen3.5's does not")


def causal_conv_1d(opset: int, width: int) -> ir.Function:
    """The body for kernels of `width` taps; its opset must equal its model's."""
    x, weight, state = inputs = [ir.Value(name=name) for name in ("x", "weight", "state")]
    builder = tape.Tape()
    axis, tokens = integers(builder, 1), builder.op("Shape", [x], attributes={"start": 1, "end": 2})
    past = builder.op("Transpose", [repeated_to(builder, state, x, 3)], attributes={"perm": _SWAPPED})
    floats = builder.op("Cast", [x], attributes={"to": ir.DataType.FLOAT})
    columns = builder.op("Concat", [past, floats], attributes={"axis": 1})
    taps = builder.op_multi_out(
        "Split", [weight], attributes={"axis": 1, "num_outputs": width}, num_outputs=width
    )
    total = None
    for offset, tap in enumerate(taps):
        start = integers(builder, offset)
        shifted = builder.op("Slice", [columns, start, builder.op("Add", [tokens, start]), axis])
        term = builder.op("Mul", [shifted, builder.op("Squeeze", [tap, axis])])
        total = term if total is None else builder.op("Add", [total, term])
    y = builder.op("Mul", [total, builder.op("Sigmoid", [total])])
    last = builder.op("Slice", [columns, integers(builder, 1 - width), integers(builder, _END), axis])
    outputs = [
        builder.op("CastLike", [y, x]),
        builder.op("Transpose", [last], attributes={"perm": _SWAPPED}),
    ]
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": opset}, name=CAUSAL_CONV_1D)
    return ir.Function(DOMAIN, CAUSAL_CONV_1D, "", graph=graph, attributes=[])

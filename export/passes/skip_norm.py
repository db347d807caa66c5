"""A residual sum and the norm behind it as a local function of the domain zreward.

    AddRmsNorm(x [..., D], skip [..., D], weight [D]; epsilon) -> y [..., D], sum [..., D]
    AddLayerNorm(x [..., D], skip [..., D], weight [D], bias [D]; epsilon) -> y [..., D], sum [..., D]

The bodies are ONNX Runtime's SkipSimplifiedLayerNormalization and SkipLayerNormalization, which stand in the graphs of
mobius. Those work on one number at a time; a runtime that has registered the kernels of `zreward.runtime.kernels` runs
kernels that take sixteen.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import DOMAIN, add_function, take_over

NAMES = {"SkipSimplifiedLayerNormalization": "AddRmsNorm", "SkipLayerNormalization": "AddLayerNorm"}

_MS = "com.microsoft"
_SUM = 3  # position of the sum among the outputs of ONNX Runtime's operators


def fuse_skip_norms(model: ir.Model) -> int:
    """Replace every SkipLayerNormalization and SkipSimplifiedLayerNormalization, after `remove_dead_outputs`.

    Raises:
        ExportError: one of them has other inputs than mobius gives it, or its statistics are read.
    """
    graph, found = model.graph, set()
    nodes = [node for node in graph if node.domain == _MS and node.op_type in NAMES]
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        if len(inputs) != _n_inputs(node.op_type) or any(output.name for output in node.outputs[1:_SUM]):
            raise ExportError(f"skip norm: {node.op_type} {node.name!r} is not as expected")
        builder = tape.Tape()
        y, total = builder.op_multi_out(
            NAMES[node.op_type],
            inputs,
            attributes={"epsilon": node.attributes["epsilon"].as_float()},
            domain=DOMAIN,
            num_outputs=2,
        )
        total.name = f"{node.outputs[0].name}.sum"
        replaced = [(node.outputs[0], y), *((old, total) for old in node.outputs[_SUM:])]
        take_over(graph, *zip(*replaced, strict=True))
        graph.insert_after(node, builder.nodes)
        graph.remove(node, safe=True)
        found.add(node.op_type)
    for op_type in found:
        add_function(model, add_norm(model.graph.opset_imports[""], op_type))
    return len(nodes)


def add_norm(opset: int, op_type: str) -> ir.Function:
    """The function whose body is the operator `op_type`; its opset must equal its model's."""
    inputs = [ir.Value(name=name) for name in ("x", "skip", "weight", "bias")[: _n_inputs(op_type)]]
    outputs = [ir.Value(name=name) for name in ("y", "", "", "sum")]
    epsilon = ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)
    node = ir.Node(_MS, op_type, inputs, [epsilon], outputs=outputs)
    graph = ir.Graph(
        inputs,
        [outputs[0], outputs[_SUM]],
        nodes=[node],
        opset_imports={"": opset, _MS: 1},
        name=NAMES[op_type],
    )
    return ir.Function(DOMAIN, NAMES[op_type], "", graph=graph, attributes=[ir.AttrFloat32("epsilon", 1e-6)])


def _n_inputs(op_type: str) -> int:
    return 4 if op_type == "SkipLayerNormalization" else 3

"""Graphs that compute in bfloat16, as ONNX Runtime's CPU can run them: in float32, rounded where they would round.

ONNX Runtime has no products in bfloat16 on CPUs, and a bundle must be proved where it is exported. The copy that is
made here has the weights of the original, in its external data; every value that is bfloat16 in the original is
rounded to it and computed with in float32. That is what a GPU's matrix units do with such factors, up to the order of
their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import onnx
from onnx import TensorProto, helper

Opened = TypeVar("Opened")

_MOVING = (
    "Concat",
    "Expand",
    "Gather",
    "Identity",
    "Reshape",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
_ALL_NARROW = ("CausalConvWithState", "Split")
"""Operators all of whose results have the type of the first; of others, later results are float32."""
_OTHER_TYPE = ("Cast", "QuantizeLinear", "Shape")


def open_rounded(path: Path, open_graph: Callable[[Path], Opened]) -> Opened:
    """Open the graph at `path`, or where it computes in bfloat16 its copy, which lies beside it for the moment."""
    model = onnx.load(path, load_external_data=False)
    if not computes_in_bfloat16(model):
        return open_graph(path)
    copy = path.with_name(f"{path.stem}.rounded{path.suffix}")
    try:
        copy.write_bytes(rounded(model).SerializeToString())
        return open_graph(copy)
    finally:
        copy.unlink(missing_ok=True)


def computes_in_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether a value, not only a stored weight, is bfloat16."""
    return any(node.op_type == "Cast" and _target(node) == TensorProto.BFLOAT16 for node in model.graph.node)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The copy; `model` is not changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    nodes: list[onnx.NodeProto] = []

    def round_value(name: str) -> None:
        """What was computed as `name` in float32, rounded under that name."""
        nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.narrow"], to=TensorProto.BFLOAT16))
        nodes.append(helper.make_node("Cast", [f"{name}.narrow"], [name], to=TensorProto.FLOAT))

    stored = {name: f"{name}.float" for name in narrow}
    for name, wide in stored.items():
        nodes.append(helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT))
    for node in graph.node:
        is_narrow = _gives_bfloat16(node, narrow)
        for index, name in enumerate(node.input):
            node.input[index] = stored.get(name, name)
        if is_narrow:
            narrow.update(node.output if node.op_type in _ALL_NARROW else node.output[:1])
        if is_narrow and node.op_type not in _MOVING:
            name = node.output[0]
            node.output[0] = f"{name}.exact"
            if node.op_type == "Cast":
                next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT
            nodes.append(node)
            round_value(name)
        else:
            nodes.append(node)
    for info in [*graph.value_info, *graph.input, *graph.output]:
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def _gives_bfloat16(node: onnx.NodeProto, narrow: set[str]) -> bool:
    """Whether the first result is bfloat16: by the type that is asked for, that of the scale, or that of the input."""
    if node.op_type == "Cast":
        return _target(node) == TensorProto.BFLOAT16
    if node.op_type in _OTHER_TYPE:
        return False
    place = 1 if node.op_type == "DequantizeLinear" else 0
    return len(node.input) > place and node.input[place] in narrow


def _target(node: onnx.NodeProto) -> int:
    return int(next(a.i for a in node.attribute if a.name == "to"))

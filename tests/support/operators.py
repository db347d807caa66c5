"""Two operators of the domain zreward in float64, on NumPy arrays, and models of one operator.

Kernels on GPUs are held against the same references as the bodies of functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from benchmarks.gpu import references

Array = NDArray[Any]
Floats = NDArray[np.float64]


def causal_conv_1d(x: Array, weight: Array, state: Array) -> tuple[Floats, Floats]:
    """y [B, S, C] and new_state [B, C, W − 1]."""
    y, new_state = references.causal_conv1d(*map(torch.from_numpy, (x, weight, state)), silu=True)
    return y.numpy(), new_state.numpy()


def gated_delta_rule(
    qkv: Array,
    decay: Array,
    beta: Array,
    state: Array,
    *,
    key_heads: int,
    value_heads: int,
    scale: float,
    key_epsilon: float,
) -> tuple[Floats, Floats]:
    """y [B, S, Hv·Dv] and new_state [B, Hv, Dk, Dv]."""
    key_width = key_heads * state.shape[2]
    q, k, v = np.split(qkv, [key_width, 2 * key_width], axis=-1)
    by_head = [
        torch.from_numpy(x.reshape(*x.shape[:2], heads, -1))
        for x, heads in ((q, key_heads), (k, key_heads), (v, value_heads))
    ]
    others = map(torch.from_numpy, (decay, beta, state))
    y, new_state = references.gated_delta_rule(*by_head, *others, scale=scale, key_epsilon=key_epsilon)
    return y.flatten(2).numpy(), new_state.numpy()


def model_of_one(
    function: ir.Function,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, int],
    **attributes: float | int,
) -> ir.Model:
    """A model of one node that calls `function`, with outputs of these ranks; any sizes can be run."""
    opset = function.opset_imports[""]
    values = [ir.Value(name=name) for name in inputs]
    for value, array in zip(values, inputs.values(), strict=True):
        _describe(value, ir.DataType.from_numpy(array.dtype), array.ndim)
    node = ir.node(
        function.name, values, attributes, domain=function.domain, num_outputs=len(outputs), name="one"
    )
    for index, (name, rank) in enumerate(outputs.items()):
        value = node.outputs[index]
        value.name = name
        _describe(value, values[0].dtype if index == 0 else ir.DataType.FLOAT, rank)
    graph = ir.Graph(
        values, node.outputs, nodes=[node], opset_imports={"": opset, function.domain: 1}, name="one"
    )
    return ir.Model(graph, ir_version=10, functions=[function])


def _describe(value: ir.Value, dtype: ir.DataType | None, rank: int) -> None:
    assert dtype is not None
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape([f"{value.name}_{axis}" for axis in range(rank)])

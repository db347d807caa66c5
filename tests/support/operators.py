"""The operators of the domain zreward that docs/tensorrt.md defines, in float64 and token by token, and models of one.

Bodies of functions, and kernels that take their place, are held against these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]


def rubric_expectation(
    hidden: Array, norm_weight: Array, score_rows: Array, temperature: Array, bins: Array, *, epsilon: float
) -> tuple[Floats, Floats, Floats]:
    """probs [B, n], mean [B] and variance [B]."""
    x, weight, rows, heat, values = map(_wide, (hidden, norm_weight, score_rows, temperature, bins))
    normed = x * weight / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    logits = normed @ rows.T / heat[:, None]
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    probs = exponents / exponents.sum(-1, keepdims=True)
    mean = probs @ values
    return probs, mean, ((values - mean[:, None]) ** 2 * probs).sum(-1)


def causal_conv_1d(x: Array, weight: Array, state: Array) -> tuple[Floats, Floats]:
    """y [B, S, C] and new_state [B, C, W − 1]."""
    x, weight, past = _wide(x), _wide(weight), _shared(state, len(x))
    width = weight.shape[1]
    columns = np.concatenate([past.transpose(0, 2, 1), x], axis=1)
    total = sum(columns[:, j : j + x.shape[1]] * weight[:, j] for j in range(width))
    return total / (1 + np.exp(-total)), columns[:, -(width - 1) :].transpose(0, 2, 1)


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
    rows, tokens = qkv.shape[:2]
    memory = _shared(state, rows)
    key_dim, value_dim = state.shape[2:]
    widths = [key_heads * key_dim, 2 * key_heads * key_dim]
    q, k, v = np.split(_wide(qkv), widths, axis=-1)
    y = np.zeros((rows, tokens, value_heads, value_dim))
    for row, head in np.ndindex(rows, value_heads):
        read = slice(head // (value_heads // key_heads) * key_dim, None)
        for token in range(tokens):
            query, key = (x[row, token, read][:key_dim] for x in (q, k))
            query, key = (x / np.sqrt((x**2).sum() + key_epsilon) for x in (query, key))
            value = v[row, token, head * value_dim :][:value_dim]
            kept = np.exp(np.float64(decay[row, token, head])) * memory[row, head]
            change = np.float64(beta[row, token, head]) * (value - key @ kept)
            memory[row, head] = kept + np.outer(key, change)
            y[row, token, head] = scale * query @ memory[row, head]
    return y.reshape(rows, tokens, -1), memory


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


def _wide(x: Array) -> Floats:
    return x.astype(np.float64)


def _shared(state: Array, rows: int) -> Floats:
    """The states [n, …] as one for each row; each serves as many consecutive rows as it takes."""
    return np.repeat(_wide(state), rows // len(state), axis=0)

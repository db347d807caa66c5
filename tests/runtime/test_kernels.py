"""The compiled kernels against the bodies of the same functions, which ONNX Runtime's own operators compute."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.support.graphs import checked_proto, normal, run_onnxruntime
from zreward.errors import BackendError
from zreward.export.irtools import add_initializer
from zreward.export.passes import attention, delta_net, skip_norm
from zreward.export.passes import quantized_linear as linear
from zreward.export.passes.state_rows import KEEP_STATES
from zreward.runtime import Scorer, kernels
from zreward.runtime.backends import open_session
from zreward.runtime.backends.ort import OrtSession

Array = NDArray[Any]

FEATURES = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
CPUINFO = Path("/proc/cpuinfo")
has_avx512 = CPUINFO.exists() and set(CPUINFO.read_text().split()) >= FEATURES

needs_kernels = pytest.mark.skipif(
    kernels.compiled_library() is None or not has_avx512,
    reason="the kernels were not compiled here, or this processor lacks AVX-512 VNNI and runs the bodies",
)

needs_bfloat16 = pytest.mark.skipif(
    not (CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text().split()),
    reason="this processor has no products of bfloat16",
)

# inputs, outputs, rows: one of everything, ends of quads, panels of 14 rows and blocks of 32 outputs, real layers,
# outputs that are written past the caches
SIZES = [(1, 1, 1), (5, 3, 2), (16, 32, 14), (17, 33, 15), (100, 130, 29), (192, 576, 77), (1024, 200, 3)]
SIZES += [(16, 4096, 130), (16, 4112, 130), (16, 4100, 130)]
LINEARS = (linear.INT8_LINEAR, linear.GELU_INT8_LINEAR, linear.SWIGLU_INT8_LINEAR)
BLOCK_LINEARS = (linear.BLOCK_LINEAR, linear.GELU_BLOCK_LINEAR, linear.SWIGLU_BLOCK_LINEAR)


def linear_model(name: str, inputs: int, outputs: int, *, bias: bool = True, half: bool = False) -> ir.Model:
    """One layer with random codes."""
    rng = np.random.default_rng(inputs * outputs)
    names = ("gate", "x") if name == linear.SWIGLU_INT8_LINEAR else ("x",)
    sources = [float_value(n, [1, "rows", inputs]) for n in names]
    graph = ir.Graph(
        sources, [], nodes=[], opset_imports={"": 24, "zreward": 1, "com.microsoft": 1}, name="g"
    )
    scales = rng.random(outputs, dtype=np.float32) * 1e-2
    weights = {
        "codes": rng.integers(-127, 128, (inputs, outputs)).astype(np.int8),
        "scales": scales.astype(np.float16) if half else scales,
        "bias": normal(rng, outputs) if bias else np.zeros(1, dtype=np.float32),
        "zero": np.uint8(128),
    }
    constants = [add_initializer(graph, ir.tensor(value, name=key)) for key, value in weights.items()]
    return finished(graph, name, [*sources, *constants], {}, [float_value("y", [1, "rows", outputs])])


def block_model(
    name: str, inputs: int, outputs: int, bits: int, block: int, *, symmetric: bool, bias: bool
) -> ir.Model:
    """One layer with random codes and a scale for each block."""
    rng = np.random.default_rng(inputs * outputs)
    names = ("gate", "x") if name == linear.SWIGLU_BLOCK_LINEAR else ("x",)
    sources = [float_value(n, [1, "rows", inputs]) for n in names]
    graph = ir.Graph(
        sources, [], nodes=[], opset_imports={"": 24, "zreward": 1, "com.microsoft": 1}, name="g"
    )
    blocks = -(-inputs // block)
    weights: dict[str, Array] = {
        "codes": rng.integers(0, 256, (outputs, blocks, block * bits // 8)).astype(np.uint8),
        "scales": (rng.random((outputs, blocks)) * 1e-2).astype(np.float16),
        "bias": normal(rng, outputs) if bias else np.zeros(1, dtype=np.float32),
    }
    if not symmetric:
        weights["zeros"] = rng.integers(0, 256, (outputs, -(-blocks * bits // 8))).astype(np.uint8)
    constants = [add_initializer(graph, ir.tensor(value, name=key)) for key, value in weights.items()]
    attributes = {
        "K": inputs,
        "N": outputs,
        "bits": bits,
        "block_size": block,
        "symmetric": int(symmetric),
    }
    return finished(graph, name, [*sources, *constants], attributes, [float_value("y", [1, "rows", outputs])])


def delta_net_model(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> ir.Model:
    """One token mixer with random weights."""
    rng = np.random.default_rng(key_heads + value_dim)
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    sources = [
        float_value("qkv", ["b", "s", channels]),
        float_value("z", ["b", "s", values]),
        float_value("b", ["b", "s", value_heads]),
        float_value("a", ["b", "s", value_heads]),
        float_value("conv_state", ["b", channels, 3]),
        float_value("state", ["b", value_heads, key_dim, value_dim]),
        keep_states_value(),
    ]
    opsets = {"": 24, "zreward": 1, "com.microsoft": 1}
    graph = ir.Graph(sources, [], nodes=[], opset_imports=opsets, name="g")
    weights = {
        "conv": normal(rng, channels, 1, 4),
        "A_log": normal(rng, value_heads),
        "dt_bias": normal(rng, value_heads),
        "norm": normal(rng, value_dim),
    }
    constants = [add_initializer(graph, ir.tensor(value, name=key)) for key, value in weights.items()]
    attributes = {
        "key_heads": key_heads,
        "value_heads": value_heads,
        "scale": key_dim**-0.5,
        "norm_epsilon": 1e-6,
        "key_epsilon": 1e-6,
    }
    outputs = [
        float_value("y", ["b", "s", values]),
        float_value("new_conv_state", ["b", channels, 3]),
        float_value("new_state", ["b", value_heads, key_dim, value_dim]),
    ]
    inputs = [*sources[:4], *constants, *sources[4:]]
    model = finished(graph, delta_net.GATED_DELTA_NET, inputs, attributes, outputs)
    heads = delta_net.Heads(key_heads, value_heads, key_dim, value_dim)
    return with_function(model, delta_net.gated_delta_net(24, heads))


def rotary_model(heads: int, dim: int, *, bfloat16: int = 0) -> ir.Model:
    """Attention of a vision block."""
    half = [float_value(n, ["t", 1, dim // 2]) for n in ("cos", "sin")]
    sources = [float_value("qkv", ["t", 3 * heads * dim]), *half]
    graph = ir.Graph(sources, [], nodes=[], opset_imports={"": 24, "zreward": 1}, name="g")
    attributes = {"heads": heads, "scale": dim**-0.5, "bfloat16": bfloat16}
    y = float_value("y", ["t", heads * dim])
    model = finished(graph, attention.ROTARY_ATTENTION, sources, attributes, [y])
    return with_function(model, attention.rotary_attention(24, heads, dim))


def causal_model(query_heads: int, heads: int, dim: int, *, bfloat16: int = 0) -> ir.Model:
    """Attention of a decoder layer."""
    sources = [
        float_value("q", ["b", "s", query_heads * dim]),
        float_value("k", ["b", "s", heads * dim]),
        float_value("v", ["b", "s", heads * dim]),
        float_value("mask", ["b", 1, "s", "all"]),
        float_value("past_key", ["b", heads, "past", dim]),
        float_value("past_value", ["b", heads, "past", dim]),
        keep_states_value(),
    ]
    graph = ir.Graph(sources, [], nodes=[], opset_imports={"": 24, "zreward": 1}, name="g")
    attributes = {"query_heads": query_heads, "heads": heads, "scale": dim**-0.5, "bfloat16": bfloat16}
    outputs = [float_value("y", ["b", "s", query_heads * dim])]
    outputs += [float_value(n, ["b", heads, "all", dim]) for n in ("present_key", "present_value")]
    model = finished(graph, attention.CAUSAL_ATTENTION, sources, attributes, outputs)
    return with_function(model, attention.causal_attention(24, query_heads, heads))


def with_function(model: ir.Model, function: ir.Function) -> ir.Model:
    model.functions[function.identifier()] = function
    return model


def float_value(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def keep_states_value() -> ir.Value:
    return ir.Value(name=KEEP_STATES, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))


def finished(
    graph: ir.Graph, name: str, inputs: list[ir.Value], attributes: dict[str, Any], outputs: list[ir.Value]
) -> ir.Model:
    made = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
    graph.append(ir.Node("zreward", name, inputs, made, outputs=outputs))
    graph.outputs.extend(outputs)
    model = ir.Model(graph, ir_version=10)
    linear.add_functions(model)
    return model


def delta_net_inputs(model: ir.Model, batch: int, tokens: int, seed: int = 0) -> dict[str, Array]:
    return random_inputs(model, {"b": batch, "s": tokens}, seed)


def random_inputs(model: ir.Model, sizes: dict[str, int], seed: int = 0) -> dict[str, Array]:
    """Normal numbers for every input; the new states are asked for."""
    rng = np.random.default_rng(seed)
    feed: dict[str, Array] = {
        str(v.name): normal(rng, *(d if isinstance(d, int) else sizes[str(d)] for d in v.shape or ()))
        for v in model.graph.inputs
    }
    return {name: np.array(1) if name == KEEP_STATES else values for name, values in feed.items()}


def assert_close(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    for name, values in expected.items():
        limit = tolerance * max(1.0, float(np.abs(values).max(initial=0)))
        np.testing.assert_allclose(found[name], values, rtol=0, atol=limit, err_msg=name)


@needs_kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_equal_their_bodies(name: str, size: tuple[int, int, int]) -> None:
    inputs, outputs, rows = size
    model = linear_model(name, inputs, outputs, bias=inputs % 2 == 0, half=rows % 2 == 0)
    rng = np.random.default_rng(1)
    x = normal(rng, 1, rows, inputs) * np.exp(3 * normal(rng, 1, rows, 1))
    if rows > 2:
        x[0, 1] = 0
        x[0, 2] *= 1e-20
    feed = {str(v.name): normal(rng, 1, rows, inputs) for v in model.graph.inputs} | {"x": x}
    expected = run_onnxruntime(model, feed, optimized=True)["y"]
    found = run_onnxruntime(model, feed, optimized=True, kernels=True)["y"]
    for row in range(rows):  # magnitudes of rows differ by decades
        limit = 2e-6 * np.abs(expected[0, row]).max()
        # an activation may fall on the other side of a rounding boundary; a code is a step of 1/127 of one weight
        if name != linear.INT8_LINEAR:
            limit += np.abs(expected[0, row]).max() / 127
        np.testing.assert_allclose(found[0, row], expected[0, row], rtol=0, atol=limit)


def activated(name: str, feed: dict[str, Array]) -> Array:
    """What the layer of this name multiplies, in float32."""
    x = feed["x"].astype(np.float64)
    if name.startswith("Gelu"):
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if name.startswith("SwiGlu"):
        gate = feed["gate"].astype(np.float64)
        x = x * gate / (1 + np.exp(-gate))
    return x.astype(np.float32)


def emulated_blocks(model: ir.Model, x: Array) -> Array:
    """Σ over blocks of scale · s · Σ round(x / s) (code − zero), s a 127th of the block's largest input."""
    attributes = next(iter(model.graph)).attributes
    block, bits, inputs = (attributes[name].as_int() for name in ("block_size", "bits", "K"))
    parts = {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value}
    codes, zeros = parts["codes"], parts.get("zeros")
    blocks = codes.shape[1]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], block)
        if zeros is not None:
            zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, :blocks]
    middle = np.full(codes.shape[:2], 1 << (bits - 1)) if zeros is None else zeros
    weights = (codes.astype(np.int64) - middle[..., None]) * parts["scales"].astype(np.float64)[..., None]
    rows = np.pad(x, ((0, 0), (0, 0), (0, blocks * block - inputs))).reshape(*x.shape[:2], blocks, block)
    steps = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(1e-30)) * np.float32(1 / 127)
    rounded = np.round(rows / steps).astype(np.float64) * steps
    result: Array = np.einsum("brgk,ngk->brn", rounded, weights)
    return result


# inputs, outputs, rows, bits, block, symmetric: parts of blocks and quads, odd numbers of zero points, real layers
BLOCK_SIZES = [
    (1, 1, 1, 4, 16, True),
    (5, 3, 2, 8, 16, False),
    (40, 33, 15, 4, 32, False),
    (96, 31, 14, 4, 32, True),
    (100, 130, 29, 8, 64, True),
    (70, 17, 16, 4, 16, False),
    (272, 64, 15, 8, 128, False),
    (256, 576, 77, 4, 128, True),
    (3584, 96, 3, 4, 128, True),
    (1024, 200, 30, 4, 256, False),
]


@needs_kernels
@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("name", BLOCK_LINEARS)
def test_layers_of_blocks_equal_their_bodies(name: str, size: tuple[int, int, int, int, int, bool]) -> None:
    inputs, outputs, rows, bits, block, symmetric = size
    model = block_model(name, inputs, outputs, bits, block, symmetric=symmetric, bias=rows % 2 == 0)
    rng = np.random.default_rng(1)
    feed: dict[str, Array] = {str(v.name): normal(rng, 1, rows, inputs) for v in model.graph.inputs}
    feed["x"] *= np.exp(3 * normal(rng, 1, rows, 1))
    if rows > 2:
        feed["x"][0, 1] = 0
        feed["x"][0, 2] *= 1e-20
    found = run_onnxruntime(model, feed, optimized=True, kernels=True)["y"]
    bias = model.graph.initializers["bias"].const_value
    assert bias is not None
    emulated = emulated_blocks(model, activated(name, feed)) + bias.numpy()
    body = run_onnxruntime(model, feed, optimized=True)["y"]
    for row in range(rows):
        largest = np.abs(emulated[0, row]).max()
        # where an activation is rounded differently, its code may be another: a step of 1/127 of one weight
        limit = largest * (2e-6 if name == linear.BLOCK_LINEAR else 1e-2)
        np.testing.assert_allclose(found[0, row], emulated[0, row], rtol=0, atol=limit)
        np.testing.assert_allclose(found[0, row], body[0, row], rtol=0, atol=largest * 1e-2)


@needs_kernels
@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("codes", np.zeros((33, 2, 16), dtype=np.uint8), "the codes do not fit"),
        ("scales", np.ones((32, 1), dtype=np.float16), "one scale for each output and group"),
        ("scales", np.ones((32, 2), dtype=np.int32), "float32 or float16"),
        ("zeros", np.zeros((32, 2), dtype=np.uint8), "one packed zero point"),
        ("bias", np.zeros(31, dtype=np.float32), "the bias must have one value"),
        ("block_size", 12, "none that the operator has"),
        ("bits", 3, "none that the operator has"),
    ],
)
def test_layers_of_blocks_refuse_parts_that_do_not_fit(part: str, values: Any, message: str) -> None:
    model = block_model(linear.BLOCK_LINEAR, 64, 32, 4, 32, symmetric=False, bias=True)
    if isinstance(values, int):
        next(iter(model.graph)).attributes[part] = ir.AttrInt64(part, values)
    else:
        value = model.graph.initializers[part]
        value.const_value = ir.tensor(values, name=part)
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    with pytest.raises(Exception, match=message):
        run_onnxruntime(model, {"x": np.ones((1, 1, 64), dtype=np.float32)}, kernels=True)


@needs_kernels
def test_a_row_is_its_own_and_one_that_is_not_finite_has_no_answer() -> None:
    model = linear_model(linear.INT8_LINEAR, 96, 40)
    x = normal(np.random.default_rng(0), 1, 31, 96)
    together = run_onnxruntime(model, {"x": x}, kernels=True)["y"]
    alone = run_onnxruntime(model, {"x": x[:, 17:18]}, kernels=True)["y"]
    np.testing.assert_array_equal(alone[0, 0], together[0, 17])
    x[0, 3, 5], x[0, 4, 95] = np.nan, -np.inf
    disturbed = run_onnxruntime(model, {"x": x}, kernels=True)["y"]
    assert np.isnan(disturbed[0, 3:5]).all()
    np.testing.assert_array_equal(np.delete(disturbed, [3, 4], axis=1), np.delete(together, [3, 4], axis=1))


@needs_kernels
def test_products_of_one_input_share_its_codes_where_bodies_run(tmp_path: Path) -> None:
    """ONNX Runtime finds the common part of two bodies."""
    model = linear_model(linear.INT8_LINEAR, 64, 32)
    first = next(iter(model.graph))
    y = float_value("other", [1, "rows", 32])
    model.graph.append(ir.Node("zreward", linear.INT8_LINEAR, list(first.inputs), outputs=[y]))
    other = add_initializer(model.graph, ir.tensor(np.ones((64, 32), dtype=np.int8), name="other.codes"))
    next(reversed(model.graph)).replace_input_with(1, other)
    model.graph.outputs.append(y)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(checked_proto(model).SerializeToString(), options)
    counted = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert counted.count("QuantizeLinear") == counted.count("ReduceMax") == 1
    assert counted.count("MatMulIntegerToFloat") == 2


@needs_kernels
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 40), (3, 2), (4, 17)])
@pytest.mark.parametrize("heads", [(2, 4, 16, 16), (1, 1, 40, 24), (2, 2, 32, 80), (1, 2, 128, 128)], ids=str)
def test_delta_net_equals_its_body(heads: tuple[int, int, int, int], batch: int, tokens: int) -> None:
    model = delta_net_model(*heads)
    feed = delta_net_inputs(model, batch, tokens)
    expected = run_onnxruntime(model, feed, optimized=True)
    assert_close(run_onnxruntime(model, feed, kernels=True), expected, 2e-5)


@needs_kernels
def test_delta_net_continues_from_its_states() -> None:
    """A sequence in two parts, and decays from next to one to next to zero."""
    model = delta_net_model(2, 4, 32, 48)
    feed = delta_net_inputs(model, 2, 300)
    feed["a"] *= 8
    whole = run_onnxruntime(model, feed, kernels=True)
    assert_close(whole, run_onnxruntime(model, feed, optimized=True), 5e-5)
    streams = ("qkv", "z", "b", "a")
    first = run_onnxruntime(model, feed | {k: feed[k][:, :123] for k in streams}, kernels=True)
    rest = feed | {k: feed[k][:, 123:] for k in streams}
    rest |= {"conv_state": first["new_conv_state"], "state": first["new_state"]}
    second = run_onnxruntime(model, rest, kernels=True)
    joined = {"y": np.concatenate([first["y"], second["y"]], axis=1), "new_state": second["new_state"]}
    assert_close(joined, {k: whole[k] for k in joined}, 1e-5)
    np.testing.assert_array_equal(second["new_conv_state"], whole["new_conv_state"])


@needs_kernels
def test_delta_net_of_no_tokens_keeps_its_states() -> None:
    model = delta_net_model(1, 2, 16, 16)
    feed = delta_net_inputs(model, 2, 0)
    found = run_onnxruntime(model, feed, kernels=True)
    assert found["y"].shape == (2, 0, 32)
    np.testing.assert_array_equal(found["new_state"], feed["state"])
    np.testing.assert_array_equal(found["new_conv_state"], feed["conv_state"])


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 4, 15, 33, 100])
@pytest.mark.parametrize("heads", [(1, 2), (3, 20), (2, 64), (2, 72)], ids=str)
def test_rotary_attention_equals_its_body(heads: tuple[int, int], tokens: int) -> None:
    model = rotary_model(*heads)
    feed = random_inputs(model, {"t": tokens})
    expected = run_onnxruntime(model, feed, optimized=True)
    assert_close(run_onnxruntime(model, feed, kernels=True), expected, 5e-6)


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "tokens", "past"), [(1, 1, 0), (2, 1, 5), (1, 31, 0), (4, 14, 33), (3, 29, 2)]
)
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 40), (8, 2, 256)], ids=str)
def test_causal_attention_equals_its_body(
    heads: tuple[int, int, int], batch: int, tokens: int, past: int
) -> None:
    model = causal_model(*heads)
    feed = random_inputs(model, {"b": batch, "s": tokens, "past": past, "all": past + tokens})
    if past:
        feed["mask"][0, :, :, 1] = np.finfo(np.float32).min  # one key that nobody may see
    expected = run_onnxruntime(model, feed, optimized=True)
    found = run_onnxruntime(model, feed, kernels=True)
    assert_close(found, expected, 5e-6)
    for name in ("key", "value"):
        np.testing.assert_array_equal(found[f"present_{name}"], expected[f"present_{name}"])


def as_bfloat16(values: Array) -> Array:
    """To the nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def attention_in_bfloat16(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention [..., S, D] of q over k, v [..., T, D] with rounded factors; `q` holds the scale."""
    q, k, v = as_bfloat16(q * np.log2(np.e)), as_bfloat16(k), as_bfloat16(v)
    scores = q.astype(np.float64) @ np.swapaxes(k, -1, -2) + mask * np.log2(np.e)
    weights = np.exp2(scores - scores.max(axis=-1, keepdims=True))
    mixed: Array = as_bfloat16(weights) @ v.astype(np.float64) / weights.sum(axis=-1, keepdims=True)
    return mixed


@needs_kernels
@needs_bfloat16
@pytest.mark.parametrize("tokens", [1, 2, 15, 33, 100])
@pytest.mark.parametrize("heads", [(1, 2), (3, 20), (2, 64), (2, 6)], ids=str)
def test_rotary_attention_in_bfloat16(heads: tuple[int, int], tokens: int) -> None:
    n, dim = heads
    model = rotary_model(n, dim, bfloat16=1)
    feed = random_inputs(model, {"t": tokens})
    q, k, v = (part.reshape(tokens, n, dim) for part in np.split(feed["qkv"], 3, axis=1))

    def rotated(x: Array) -> Array:
        a, b = np.split(x, 2, axis=-1)
        cos, sin = feed["cos"], feed["sin"]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).swapaxes(0, 1)

    mixed = attention_in_bfloat16(rotated(q) * dim**-0.5, rotated(k), v.swapaxes(0, 1), np.zeros(1))
    expected = mixed.swapaxes(0, 1).reshape(tokens, n * dim)
    found = run_onnxruntime(model, feed, kernels=True)
    assert_close(found, {"y": expected}, 2e-3)
    exact = run_onnxruntime(model, feed, optimized=True)
    assert_close(found, exact, 3e-2)
    assert np.abs(found["y"] - exact["y"]).max() > 1e-5  # or nothing was rounded


@needs_kernels
@needs_bfloat16
@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 1, 0), (2, 31, 0), (4, 14, 33), (3, 29, 2)])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 40), (8, 2, 256)], ids=str)
def test_causal_attention_in_bfloat16(
    heads: tuple[int, int, int], batch: int, tokens: int, past: int
) -> None:
    query_heads, n, dim = heads
    model = causal_model(*heads, bfloat16=1)
    feed = random_inputs(model, {"b": batch, "s": tokens, "past": past, "all": past + tokens})
    found = run_onnxruntime(model, feed, kernels=True)
    exact = run_onnxruntime(model, feed, optimized=True)
    for name in ("present_key", "present_value"):  # states are not rounded
        np.testing.assert_array_equal(found[name], exact[name])
    keys, values = (
        np.repeat(exact[name], query_heads // n, axis=1) for name in ("present_key", "present_value")
    )
    q = feed["q"].reshape(batch, tokens, query_heads, dim).swapaxes(1, 2) * dim**-0.5
    unseen = np.triu(np.full((tokens, past + tokens), -np.inf), past + 1)
    mixed = attention_in_bfloat16(q, keys, values, feed["mask"] + unseen)
    expected = mixed.swapaxes(1, 2).reshape(batch, tokens, query_heads * dim)
    assert_close({"y": found["y"]}, {"y": expected}, 2e-3)


def skip_norm_model(op_type: str, width: int) -> ir.Model:
    """A residual sum and its norm, of which both results are read."""
    names = ["x", "skip", "weight"] + ["bias"] * (op_type == "SkipLayerNormalization")
    shapes: dict[str, list[int | str]] = {"x": ["n", width], "skip": ["n", "width"]}
    sources = [float_value(name, shapes.get(name, [width])) for name in names]
    opsets = {"": 24, "zreward": 1, "com.microsoft": 1}
    graph = ir.Graph(sources, [], nodes=[], opset_imports=opsets, name="g")
    outputs = [float_value("y", ["n", width]), float_value("sum", ["n", width])]
    model = finished(graph, skip_norm.NAMES[op_type], sources, {"epsilon": 1e-6}, outputs)
    return with_function(model, skip_norm.add_norm(24, op_type))


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (40, 77), (5, 1024)])
@pytest.mark.parametrize("op_type", skip_norm.NAMES)
def test_skip_norms_equal_their_bodies(op_type: str, rows: int, width: int) -> None:
    model = skip_norm_model(op_type, width)
    feed = random_inputs(model, {"n": rows, "width": width})
    feed["x"][0] *= 1e4
    expected = run_onnxruntime(model, feed, optimized=True)
    found = run_onnxruntime(model, feed, kernels=True)
    np.testing.assert_array_equal(found["sum"], expected["sum"])
    assert_close({"y": found["y"]}, {"y": expected["y"]}, 1e-5)
    feed["x"][-1, 0] = np.nan
    spoilt = run_onnxruntime(model, feed, kernels=True)["y"]
    assert np.isnan(spoilt[-1]).all()
    np.testing.assert_array_equal(spoilt[:-1], found["y"][:-1])
    with pytest.raises(Exception, match="last axes"):
        run_onnxruntime(model, feed | {"skip": np.zeros((rows, width + 1), np.float32)}, kernels=True)
    with pytest.raises(Exception, match="shape of x"):
        run_onnxruntime(model, feed | {"skip": np.zeros((2 * rows + 1, width), np.float32)}, kernels=True)


@needs_kernels
def test_a_state_serves_several_rows() -> None:
    """Two states for six rows give what each state gives three times; kernels and bodies alike."""
    mixer, causal = delta_net_model(1, 2, 16, 24), causal_model(4, 2, 16)
    sizes = {"b": 6, "s": 5, "past": 3, "all": 8}
    for model in (mixer, causal):
        feed = random_inputs(model, sizes)
        states = [k for k in feed if k != KEEP_STATES and ("state" in k or "past" in k)]
        few = feed | {k: feed[k][:2] for k in states}
        many = feed | {k: np.repeat(feed[k][:2], 3, axis=0) for k in states}
        expected = run_onnxruntime(model, many, kernels=True)
        found = run_onnxruntime(model, few, kernels=True)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
        assert_close(run_onnxruntime(model, few, optimized=True), expected, 2e-5)
        with pytest.raises(Exception, match="multiple of the number of states"):
            run_onnxruntime(model, feed | {k: feed[k][:4] for k in states}, kernels=True)


@needs_kernels
def test_states_that_nobody_reads_are_not_written() -> None:
    for model in (delta_net_model(1, 2, 16, 24), causal_model(4, 2, 16)):
        feed = random_inputs(model, {"b": 2, "s": 5, "past": 3, "all": 8})
        expected = run_onnxruntime(model, feed, kernels=True)["y"]
        feed[KEEP_STATES] = np.array(0)
        for kernels_run in (True, False):
            found = run_onnxruntime(model, feed, kernels=kernels_run, outputs=["y"])["y"]
            assert_close({"y": found}, {"y": expected}, 2e-5)
        wrong = feed | {KEEP_STATES: np.zeros(2, dtype=np.int64)}
        with pytest.raises(Exception, match=r"one number|Invalid rank"):
            run_onnxruntime(model, wrong, kernels=True, outputs=["y"])


@needs_kernels
def test_a_nan_stays_a_nan() -> None:
    model = causal_model(2, 1, 16)
    feed = random_inputs(model, {"b": 1, "s": 20, "past": 3, "all": 23})
    clean = run_onnxruntime(model, feed, kernels=True)["y"]
    feed["k"][0, 9, 2] = np.nan
    y = run_onnxruntime(model, feed, kernels=True)["y"]
    np.testing.assert_array_equal(y[0, :9], clean[0, :9])
    assert np.isnan(y[0, 9:]).all()
    rotary = rotary_model(2, 16)
    feed = random_inputs(rotary, {"t": 20})
    feed["qkv"][7, 33] = np.nan  # a key of the first head
    y = run_onnxruntime(rotary, feed, kernels=True)["y"]
    assert np.isnan(y[:, :16]).all()
    assert np.isfinite(y[:, 16:]).all()
    mixer = delta_net_model(1, 1, 16, 16)
    feed = delta_net_inputs(mixer, 1, 9)
    feed["a"][0, 4] = np.nan
    y = run_onnxruntime(mixer, feed, kernels=True)["y"]
    assert np.isfinite(y[0, :4]).all()
    assert np.isnan(y[0, 4:]).all()


@needs_kernels
def test_what_does_not_fit_is_an_error_and_not_a_crash() -> None:
    model = linear_model(linear.INT8_LINEAR, 8, 4)
    model.graph.initializers["scales"].const_value = ir.tensor(np.ones(3, dtype=np.float32), name="scales")
    model.graph.initializers["scales"].shape = ir.Shape([3])
    with pytest.raises(Exception, match="Int8Linear: there must be one scale for each output"):
        run_onnxruntime(model, {"x": np.zeros((1, 1, 8), dtype=np.float32)}, kernels=True)
    model = delta_net_model(1, 2, 16, 16)
    feed = delta_net_inputs(model, 2, 3)
    with pytest.raises(Exception, match="GatedDeltaNet: the shapes of projections and states do not fit"):
        run_onnxruntime(model, feed | {"z": feed["z"][:1]}, kernels=True)


@needs_kernels
def test_threads_get_what_one_gets() -> None:
    model = delta_net_model(2, 2, 32, 32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(kernels.compiled_library()))
    shared = onnxruntime.InferenceSession(checked_proto(model).SerializeToString(), options)
    feeds = [delta_net_inputs(model, 2, 5 + seed, seed) for seed in range(24)]
    alone = [shared.run(["y"], feed)[0] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feed: shared.run(["y"], feed)[0], feeds))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_scores_without_the_library_are_the_same(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = []
    for disabled in ("", "1"):
        monkeypatch.setenv(kernels.DISABLE, disabled)
        with Scorer.open(tiny_bundle) as scorer:
            (score,) = scorer.score(prompt="a red cube", images=[image])
        means.append([d.mean for d in score.dimensions.values()])
    assert kernels.compiled_library() is None
    np.testing.assert_allclose(means[0], means[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
def test_sums_do_not_saturate(plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products of the largest codes do not fit into 16 bits, in which x86 without VNNI would add them."""
    model = linear_model(linear.INT8_LINEAR, 96, 40)
    weights = {name: model.graph.initializers[name].const_value for name in ("codes", "scales", "bias")}
    weights["codes"] = ir.tensor(np.full((96, 40), 127, dtype=np.int8), name="codes")
    model.graph.initializers["codes"].const_value = weights["codes"]
    onnx.save(checked_proto(model), tmp_path / "layer.onnx")
    monkeypatch.setenv(kernels.DISABLE, "1")
    session = OrtSession(tmp_path / "layer.onnx", threads=1, plain=plain)
    (found,) = session.run(["y"], {"x": np.ones((1, 3, 96), dtype=np.float32)})
    codes, scales, bias = (weights[name].numpy() for name in ("codes", "scales", "bias"))
    expected = codes.sum(axis=0, dtype=np.int64) * scales + bias
    np.testing.assert_allclose(found[0], np.broadcast_to(expected, (3, 40)), rtol=1e-5)


def test_a_library_that_cannot_be_loaded_is_named(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "_library.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr("zreward.runtime.backends.ort.compiled_library", lambda: broken)
    with pytest.raises(BackendError, match=rf"{kernels.DISABLE}=1"):
        open_session(tiny_bundle / "decoder.onnx", provider="cpu", threads=1)


@pytest.mark.skipif(not has_avx512, reason="this processor lacks AVX-512 VNNI")
def test_the_kernels_were_compiled_here() -> None:
    """On the machines that they are for, a fresh clone has them."""
    command = [sys.executable, "-c", "from zreward.runtime import kernels; print(kernels.compiled_library())"]
    environment = {k: v for k, v in os.environ.items() if k != kernels.DISABLE}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip().endswith(".so")

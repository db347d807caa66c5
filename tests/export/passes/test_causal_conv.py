"""CausalConv1d: its body against float64, and the pass against the convolutions that mobius builds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import Arrays, normal, op_types, run_onnxruntime, run_reference
from tests.support.operators import causal_conv_1d as expected_of
from tests.support.operators import model_of_one
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.causal_conv import CAUSAL_CONV_1D, causal_conv_1d, fuse_causal_convolutions

OUTPUTS = {"y": 3, "new_state": 3}


def inputs_of(rows: int, states: int, tokens: int, channels: int, width: int) -> Arrays:
    rng = np.random.default_rng(rows * tokens + channels)
    return {
        "x": normal(rng, rows, tokens, channels),
        "weight": normal(rng, channels, width),
        "state": normal(rng, states, channels, width - 1),
    }


@pytest.mark.parametrize(
    ("rows", "states", "tokens", "channels", "width"),
    [(1, 1, 1, 5, 4), (1, 1, 2, 3, 4), (3, 3, 9, 7, 4), (8, 2, 5, 6, 4), (4, 1, 3, 4, 2), (2, 1, 1, 3, 6)],
)
def test_the_body_equals_float64(rows: int, states: int, tokens: int, channels: int, width: int) -> None:
    inputs = inputs_of(rows, states, tokens, channels, width)
    model = model_of_one(causal_conv_1d(24, width), inputs, OUTPUTS)
    for outputs in (run_onnxruntime(model, inputs), run_reference(model, inputs)):
        for name, expected in zip(OUTPUTS, expected_of(**inputs), strict=True):
            assert outputs[name].dtype == np.float32
            np.testing.assert_allclose(outputs[name], expected, atol=1e-5, rtol=0)


def test_half_precision_sums_in_float32() -> None:
    inputs = inputs_of(2, 1, 6, 8, 4)
    inputs["x"] = inputs["x"].astype(np.float16)
    outputs = run_onnxruntime(model_of_one(causal_conv_1d(24, 4), inputs, OUTPUTS), inputs)
    y, state = expected_of(**inputs)
    assert outputs["y"].dtype == np.float16
    np.testing.assert_allclose(outputs["y"], y, atol=1e-3, rtol=1e-3)
    np.testing.assert_array_equal(outputs["new_state"], state.astype(np.float32))


def test_a_sequence_may_be_cut_anywhere() -> None:
    inputs = inputs_of(2, 2, 7, 5, 4)
    model = model_of_one(causal_conv_1d(24, 4), inputs, OUTPUTS)
    whole = run_onnxruntime(model, inputs)
    for cut in (1, 3, 6):
        first = run_onnxruntime(model, {**inputs, "x": inputs["x"][:, :cut]})
        second = run_onnxruntime(model, {**inputs, "x": inputs["x"][:, cut:], "state": first["new_state"]})
        np.testing.assert_array_equal(np.concatenate([first["y"], second["y"]], axis=1), whole["y"])
        np.testing.assert_array_equal(second["new_state"], whole["new_state"])


def test_every_convolution_of_the_decoder_is_replaced(graphs: Graphs) -> None:
    count = op_types(graphs.decoder).count("CausalConvWithState")
    assert fuse_causal_convolutions(graphs.decoder) == count > 0
    assert "CausalConvWithState" not in op_types(graphs.decoder)
    for node in graphs.decoder.graph:
        if node.op_type == CAUSAL_CONV_1D:
            assert node.attributes["plugin_namespace"].as_string() == "zreward"
            assert node.attributes["plugin_version"].as_string() == "1"


def test_another_activation_or_a_bias_is_refused(graphs: Graphs) -> None:
    other = graphs.decoder.clone()
    node = next(n for n in other.graph if n.op_type == "CausalConvWithState")
    node.attributes["activation"] = ir.AttrString("activation", "none")
    with pytest.raises(ExportError, match="not SiLU"):
        fuse_causal_convolutions(other)
    node = next(n for n in graphs.decoder.graph if n.op_type == "CausalConvWithState")
    bias = node.inputs[2]
    bias.const_value = ir.tensor(np.ones(bias.const_value.shape.numpy(), np.float32), name=bias.name)
    with pytest.raises(ExportError, match="has a bias"):
        fuse_causal_convolutions(graphs.decoder)

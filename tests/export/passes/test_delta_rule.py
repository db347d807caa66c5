"""GatedDeltaRule: its body against float64, and the pass against the layers that mobius builds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.graphs import Arrays, normal, op_types, run_onnxruntime, run_reference
from tests.support.operators import gated_delta_rule as expected_of
from tests.support.operators import model_of_one
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.delta_norm import EPSILON, add_delta_norm_epsilon
from zreward.export.passes.delta_rule import GATED_DELTA_RULE, Heads, fuse_delta_rules, gated_delta_rule

OUTPUTS = {"y": 3, "new_state": 4}


def case(heads: Heads, rows: int, states: int, tokens: int) -> tuple[Arrays, dict[str, Any]]:
    rng = np.random.default_rng(rows * tokens + heads.value_dim)
    width = 2 * heads.keys * heads.key_dim + heads.values * heads.value_dim
    inputs = {
        "qkv": normal(rng, rows, tokens, width),
        "decay": -rng.exponential(1.0, (rows, tokens, heads.values)).astype(np.float32),
        "beta": rng.uniform(0, 1, (rows, tokens, heads.values)).astype(np.float32),
        "state": normal(rng, states, heads.values, heads.key_dim, heads.value_dim),
    }
    attributes = {
        "key_heads": heads.keys,
        "value_heads": heads.values,
        "scale": heads.key_dim**-0.5,
        "key_epsilon": EPSILON,
    }
    return inputs, attributes


@pytest.mark.parametrize(
    ("heads", "rows", "states", "tokens"),
    [
        (Heads(1, 1, 4, 4), 1, 1, 1),
        (Heads(2, 4, 6, 3), 3, 3, 5),
        (Heads(2, 2, 5, 8), 4, 2, 3),
        (Heads(1, 3, 8, 5), 4, 1, 11),
        (Heads(4, 4, 48, 48), 1, 1, 40),
    ],
)
def test_the_body_equals_float64(heads: Heads, rows: int, states: int, tokens: int) -> None:
    inputs, attributes = case(heads, rows, states, tokens)
    model = model_of_one(gated_delta_rule(24, heads), inputs, OUTPUTS, **attributes)
    found = expected_of(**inputs, **attributes)
    assert np.abs(found[0]).max() > 0.1
    for outputs in (run_onnxruntime(model, inputs), run_reference(model, inputs)):
        for name, expected in zip(OUTPUTS, found, strict=True):
            assert outputs[name].dtype == np.float32
            np.testing.assert_allclose(outputs[name], expected, atol=1e-5, rtol=0)


def test_half_precision_keeps_its_state_in_float32() -> None:
    heads = Heads(2, 4, 16, 16)
    inputs, attributes = case(heads, 2, 1, 30)
    inputs["qkv"] = inputs["qkv"].astype(np.float16)
    model = model_of_one(gated_delta_rule(24, heads), inputs, OUTPUTS, **attributes)
    outputs = run_onnxruntime(model, inputs)
    y, state = expected_of(**inputs, **attributes)
    assert outputs["y"].dtype == np.float16
    np.testing.assert_allclose(outputs["y"], y, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(outputs["new_state"], state, atol=1e-5, rtol=0)


def test_a_head_of_zeros_is_not_nan() -> None:
    heads = Heads(1, 1, 4, 4)
    inputs, attributes = case(heads, 1, 1, 3)
    inputs["qkv"][:] = 0
    model = model_of_one(gated_delta_rule(24, heads), inputs, OUTPUTS, **attributes)
    outputs = run_onnxruntime(model, inputs)
    assert all(np.isfinite(value).all() for value in outputs.values())


def test_every_rule_of_the_decoder_is_replaced(graphs: Graphs) -> None:
    add_delta_norm_epsilon(graphs.decoder)
    count = op_types(graphs.decoder).count("LinearAttention")
    assert fuse_delta_rules(graphs.decoder) == count > 0
    assert "LinearAttention" not in op_types(graphs.decoder)
    for node in graphs.decoder.graph:
        if node.op_type == GATED_DELTA_RULE:
            assert node.attributes["plugin_namespace"].as_string() == "zreward"
            assert node.attributes["plugin_version"].as_string() == "1"
            assert node.attributes["scale"].as_float() == pytest.approx(16**-0.5)


def test_queries_from_elsewhere_are_refused(graphs: Graphs) -> None:
    add_delta_norm_epsilon(graphs.decoder)
    node = next(n for n in graphs.decoder.graph if n.op_type == "LinearAttention")
    node.replace_input_with(0, node.inputs[1])
    with pytest.raises(ExportError, match="not split from one value"):
        fuse_delta_rules(graphs.decoder)

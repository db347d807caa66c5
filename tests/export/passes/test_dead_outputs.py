"""Removal of nodes, initializers, functions and optional outputs that nobody reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.graphs import checkpoint_of, model_from_text, normal, op_types, run_onnxruntime
from zreward.export.graph import Graphs
from zreward.export.passes.dead_outputs import remove_dead_outputs

GRAPH = """
g (float[n, 8] x, float[n, 8] skip, float[8] weight, float[8] unread) => (float[n, 8] normed, float[n, 8] total)
{
    normed, mean, inverse, total =
        com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, skip, weight)
    second, mean2, inverse2, total2 =
        com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (normed, skip, weight)
    dead = Add (second, unread)
}
"""


def test_what_is_read_stays_and_keeps_its_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = checkpoint_of(tmp_path, {"weight": normal(rng, 8), "unread": normal(rng, 8)})
    model, whole = model_from_text(GRAPH, weights), model_from_text(GRAPH, weights)
    assert remove_dead_outputs(model) > 0
    assert op_types(model) == ["SkipSimplifiedLayerNormalization"]
    assert list(model.graph.initializers) == ["weight"]
    assert [output.name for output in model.graph[0].outputs] == ["normed", "", "", "total"]
    inputs = {"x": normal(rng, 3, 8), "skip": normal(rng, 3, 8)}
    expected, found = run_onnxruntime(whole, inputs), run_onnxruntime(model, inputs)
    for name in ("normed", "total"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_trailing_outputs_disappear(tmp_path: Path) -> None:
    weights = checkpoint_of(tmp_path, {"weight": np.ones(8, np.float32), "unread": np.ones(8, np.float32)})
    model = model_from_text(GRAPH, weights)
    model.graph.outputs.pop()
    remove_dead_outputs(model)
    assert [output.name for output in model.graph[0].outputs] == ["normed"]


def test_a_second_time_changes_nothing_and_a_needed_function_stays(graphs: Graphs) -> None:
    remove_dead_outputs(graphs.decoder)
    functions = {name for _, name, _ in graphs.decoder.functions}
    assert {"LinearAttention", "CausalConvWithState"} <= functions
    assert remove_dead_outputs(graphs.decoder) == 0

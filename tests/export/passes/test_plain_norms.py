"""Fused norms of ONNX Runtime against the standard operators that stand for them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.graphs import model_from_text, normal, op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.plain_norms import unfuse_skip_norms

RMS = """
g (float[b, s, 8] x, float[b, s, 8] skip, float[8] w) => (float[b, s, 8] y, float[b, s, 8] total)
{
    y, mean, inverse, total = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.01> (x, skip, w)
}
"""
LAYER = """
g (float[b, s, 8] x, float[b, s, 8] skip, float[8] w, float[8] c) => (float[b, s, 8] y)
{
    y, mean, inverse, total = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (x, skip, w, c)
}
"""


@pytest.mark.parametrize("text", [RMS, LAYER], ids=["rms", "layer"])
def test_results_are_those_of_the_fused_operator(text: str) -> None:
    model = model_from_text(text)
    remove_dead_outputs(model)
    rng = np.random.default_rng(0)
    inputs = {
        "x": normal(rng, 2, 3, 8),
        "skip": normal(rng, 2, 3, 8),
        "w": normal(rng, 8),
        "c": normal(rng, 8),
    }
    inputs = {value.name: inputs[value.name] for value in model.graph.inputs}
    expected = run_onnxruntime(model, inputs)
    assert unfuse_skip_norms(model) == 1
    assert not {node.domain for node in model.graph} - {"", "ai.onnx"}
    for found in (run_onnxruntime(model, inputs), run_reference(model, inputs)):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6, rtol=0)


def test_statistics_that_are_read_are_refused() -> None:
    text = RMS.replace("float[b, s, 8] total)", "float[b, s, 8] total, float[b, s, 1] inverse)")
    with pytest.raises(ExportError, match="not as expected"):
        unfuse_skip_norms(model_from_text(text))


def test_other_graphs_stay_as_they_are() -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { y = Identity (x) }")
    assert unfuse_skip_norms(model) == 0
    assert op_types(model) == ["Identity"]

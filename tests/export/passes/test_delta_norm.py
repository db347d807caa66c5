"""The epsilon of the key and query norms of Gated DeltaNet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import l2norm

from tests.support.graphs import model_from_text, normal, op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.delta_norm import add_delta_norm_epsilon

NORM = """
norm (float[n, 8] x, float[n, 8] other) => (float[n, 8] y, float[n, 8] root)
{
    axis = Constant <value_ints = [-1]> ()
    total = ReduceSumSquare <keepdims = 1> (x, axis)
    length = Sqrt (total)
    y = Div (x, length)
    root = Sqrt (other)
}
"""


def inputs() -> dict[str, np.ndarray]:
    x = normal(np.random.default_rng(0), 4, 8)
    x[1] = 0
    x[2] *= 1e-4
    return {"x": x, "other": np.abs(x)}


def test_equals_transformers_norm_also_where_all_activations_are_zero() -> None:
    model = model_from_text(NORM)
    with np.errstate(invalid="ignore"):
        assert np.isnan(run_reference(model, inputs())["y"][1]).all()
    assert add_delta_norm_epsilon(model) == 1
    expected = l2norm(torch.from_numpy(inputs()["x"]).double()).numpy()
    for outputs in (run_onnxruntime(model, inputs()), run_reference(model, inputs())):
        np.testing.assert_allclose(outputs["y"], expected, atol=1e-6)
        np.testing.assert_array_equal(outputs["root"], np.sqrt(inputs()["other"]))


def test_the_real_decoder_survives_activations_of_zero(built_graphs: Graphs, graphs: Graphs) -> None:
    """Embeddings of zero make every key and query of the first layer zero."""
    assert add_delta_norm_epsilon(graphs.decoder) == 6  # key and query of three DeltaNet layers
    tokens = 3
    zeros = {
        str(v.name): np.zeros([d if isinstance(d, int) else 1 for d in v.shape or ()], dtype=np.float32)
        for v in graphs.decoder.graph.inputs
        if not str(v.name).endswith((".key", ".value"))
    }
    zeros |= {
        "inputs_embeds": np.zeros((1, tokens, 64), dtype=np.float32),
        "attention_mask": np.ones((1, tokens), dtype=np.int64),
        "position_ids": np.tile(np.arange(tokens), (3, 1, 1)),
        "past_key_values.3.key": np.zeros((1, 2, 0, 32), dtype=np.float32),
        "past_key_values.3.value": np.zeros((1, 2, 0, 32), dtype=np.float32),
    }
    assert np.isnan(run_onnxruntime(built_graphs.decoder, zeros)["logits"]).any()
    assert all(np.isfinite(v).all() for v in run_onnxruntime(graphs.decoder, zeros).values())


def test_a_graph_without_the_pattern() -> None:
    assert add_delta_norm_epsilon(model_from_text("g (float[2] x) => (float[2] y) { y = Sqrt (x) }")) == 0
    renamed = model_from_text(
        "g (float[2] x) => (float[2] y, float[2] s) { y, s = com.microsoft.LinearAttention (x) }"
    )
    with pytest.raises(ExportError, match="not the norms"):
        add_delta_norm_epsilon(renamed)


def test_the_epsilon_is_one_initializer(graphs: Graphs) -> None:
    before = list(op_types(graphs.decoder)).count("Add")
    add_delta_norm_epsilon(graphs.decoder)
    assert list(op_types(graphs.decoder)).count("Add") == before + 6
    assert [n for n in graphs.decoder.graph.initializers if "epsilon" in n] == ["zreward.delta_norm_epsilon"]

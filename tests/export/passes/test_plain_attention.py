"""Attention as products against the Attention that mobius builds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.export.passes.test_single_image import inputs_of
from tests.support.graphs import Arrays, normal, op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.plain_attention import (
    PRODUCTS_PER_PAIR,
    unfuse_causal_attention,
    unfuse_vision_attention,
)
from zreward.export.passes.single_image import specialize_single_image

HIDDEN = 64


def decoder_inputs(model: ir.Model, rows: int, tokens: int, past: int, states: int) -> Arrays:
    """Random inputs; `states` equal rows of every state are given, or as many as the batch has."""
    rng = np.random.default_rng(rows + tokens + past)
    sizes = {"batch": rows, "sequence_len": tokens, "past_sequence_len": past, "state_batch": states}
    inputs: Arrays = {
        "inputs_embeds": normal(rng, rows, tokens, HIDDEN),
        "position_ids": np.tile(np.arange(past, past + tokens), (3, rows, 1)),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            first, *rest = [size if isinstance(size, int) else sizes[str(size)] for size in value.shape]
            one = normal(np.random.default_rng(len(str(value.name))), 1, *rest)
            inputs[str(value.name)] = np.repeat(one, first, axis=0)
        elif value.name == "attention_mask":
            inputs["attention_mask"] = np.ones((rows, past + tokens), np.int64)
    return inputs


@pytest.mark.parametrize(("rows", "tokens", "past"), [(1, 1, 0), (1, 7, 0), (3, 1, 4), (4, 6, 9)])
def test_the_decoder_answers_as_before(
    built_graphs: Graphs, graphs: Graphs, rows: int, tokens: int, past: int
) -> None:
    expected = run_onnxruntime(
        built_graphs.decoder, decoder_inputs(built_graphs.decoder, rows, tokens, past, rows)
    )
    assert unfuse_causal_attention(graphs.decoder, ir.DataType.FLOAT) == 1
    assert "Attention" not in op_types(graphs.decoder)
    for states in {1, rows}:
        inputs = decoder_inputs(graphs.decoder, rows, tokens, past, states)
        assert "attention_mask" not in inputs
        for found in (run_onnxruntime(graphs.decoder, inputs), run_reference(graphs.decoder, inputs)):
            for name in ("logits", "present.3.key", "present.3.value"):
                largest = np.abs(expected[name]).max()
                np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * largest, rtol=0)


def test_the_tower_answers_as_before(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    inputs = inputs_of(graphs.vision, 4, 6)
    expected = run_onnxruntime(graphs.vision, inputs)["image_features"]
    assert unfuse_vision_attention(graphs.vision, ir.DataType.FLOAT) == 2
    found = run_onnxruntime(graphs.vision, inputs)["image_features"]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_half_precision_stays_near(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    inputs = inputs_of(graphs.vision, 4, 6)
    expected = run_onnxruntime(graphs.vision, inputs)["image_features"]
    unfuse_vision_attention(graphs.vision, ir.DataType.FLOAT16)
    products = [n for n in graphs.vision.graph if PRODUCTS_PER_PAIR in n.metadata_props]
    assert len(products) == 4
    found = run_onnxruntime(graphs.vision, inputs)["image_features"]
    assert 0 < np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


def test_a_mask_that_others_read_is_refused(graphs: Graphs) -> None:
    graph = graphs.decoder.graph
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    node = ir.node("Identity", [mask])
    node.outputs[0].name = "other"
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    with pytest.raises(ExportError, match="read by more than attention"):
        unfuse_causal_attention(graphs.decoder, ir.DataType.FLOAT)
    with pytest.raises(ExportError, match="has a mask or a past"):
        unfuse_vision_attention(graphs.vision, ir.DataType.FLOAT)

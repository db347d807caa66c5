"""The vision tower for one image against the tower that mobius builds for a list of images."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import model_from_text, normal, op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.single_image import specialize_single_image

GRIDS = [(2, 2), (4, 6), (10, 4), (2, 20), (16, 16)]


def inputs_of(model: ir.Model, height: int, width: int) -> dict[str, np.ndarray]:
    """Random pixels for a grid of `height` × `width` patches."""
    columns = next(v for v in model.graph.inputs if v.name == "pixel_values").shape[1]
    pixels = normal(np.random.default_rng(height * width), height * width, int(columns))
    return {"pixel_values": pixels, "image_grid_thw": np.array([[1, height, width]])}


@pytest.mark.parametrize("grid", GRIDS)
def test_features_equal_the_tower_for_many_images(
    built_graphs: Graphs, graphs: Graphs, grid: tuple[int, int]
) -> None:
    assert specialize_single_image(graphs.vision) > 0
    inputs = inputs_of(graphs.vision, *grid)
    expected = run_onnxruntime(built_graphs.vision, inputs)["image_features"]
    found = run_onnxruntime(graphs.vision, inputs)["image_features"]
    assert found.shape == (grid[0] * grid[1] // 4, 64)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_the_reference_evaluator_agrees(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    inputs = inputs_of(graphs.vision, 4, 6)
    expected = run_reference(graphs.vision, inputs)["image_features"]
    found = run_onnxruntime(graphs.vision, inputs)["image_features"]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_no_scan_compaction_or_mask_is_left(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    assert not {"Scan", "Compress"} & set(op_types(graphs.vision))
    attention = [node for node in graphs.vision.graph if node.op_type == "Attention"]
    assert attention and all(len(node.inputs) <= 3 or node.inputs[3] is None for node in attention)
    grid = next(v for v in graphs.vision.graph.inputs if v.name == "image_grid_thw")
    assert grid.shape == [1, 3]


def test_two_images_are_refused_by_the_runtime(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    inputs = inputs_of(graphs.vision, 4, 4)
    inputs["image_grid_thw"] = np.array([[1, 2, 4], [1, 2, 4]])
    with pytest.raises(Exception, match="image_grid_thw"):
        run_onnxruntime(graphs.vision, inputs)


def test_unexpected_graphs_are_refused(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    with pytest.raises(ExportError, match="simplified before"):
        specialize_single_image(graphs.vision)
    with pytest.raises(ExportError, match="no input 'image_grid_thw'"):
        specialize_single_image(model_from_text("g (float[2] x) => (float[2] y) { y = Identity (x) }"))
    with_state = model_from_text("""
        g (int64[n, 3] image_grid_thw, float[1] start, float[m] xs) => (float[1] last, float[m, 1] ys) {
            last, ys = Scan <num_scan_inputs = 1, body = body (float[1] s, float x) => (float[1] t, float[1] y) {
                t = Add (s, x)
                y = Identity (t)
            }> (start, xs)
        }""")
    with pytest.raises(ExportError, match="carries states"):
        specialize_single_image(with_state)

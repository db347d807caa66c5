"""The patch embedding as a matrix product against the convolution that it replaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import (
    checkpoint_of,
    model_from_text,
    normal,
    op_types,
    run_onnxruntime,
    run_reference,
)
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.patch_embedding import lower_patch_embedding

# Patches of 3 channels, 2 frames and 4 × 4 pixels, embedded in 5 dimensions.
TOWER = """
tower (float[n, 96] pixel_values, float[5, 3, 2, 4, 4] kernel, float[5] bias) => (float[n, 5] embedded)
{
    volume = Constant <value_ints = [-1, 3, 2, 4, 4]> ()
    patches = Reshape (pixel_values, volume)
    convolved = Conv <strides = [2, 4, 4], kernel_shape = [2, 4, 4]> (patches, kernel, bias)
    row = Constant <value_ints = [-1, 5]> ()
    rows = Reshape (convolved, row)
    embedded = Identity (rows)
}
"""


def tower(folder: Path, text: str = TOWER, bound: tuple[str, ...] = ("kernel", "bias")) -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {"kernel": normal(rng, 5, 3, 2, 4, 4), "bias": normal(rng, 5)}
    return model_from_text(text, checkpoint_of(folder, {name: weights[name] for name in bound}))


def test_equals_the_convolution_and_float64(tmp_path: Path) -> None:
    model = tower(tmp_path)
    pixels = {"pixel_values": normal(np.random.default_rng(1), 7, 96)}
    convolved = run_reference(model, pixels)["embedded"]
    kernel, bias = (model.graph.initializers[name].const_value.numpy() for name in ("kernel", "bias"))
    assert lower_patch_embedding(model) == 1
    assert "Conv" not in op_types(model)
    matrix = kernel.reshape(5, -1).astype(np.float64)
    expected = pixels["pixel_values"].astype(np.float64) @ matrix.T + bias
    for outputs in (run_onnxruntime(model, pixels), run_reference(model, pixels)):
        np.testing.assert_allclose(outputs["embedded"], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(outputs["embedded"], convolved, atol=1e-5, rtol=0)


def test_the_vision_tower_of_mobius(built_graphs: Graphs, graphs: Graphs) -> None:
    assert lower_patch_embedding(graphs.vision) == 1
    inputs = {
        "pixel_values": normal(np.random.default_rng(2), 24, 384),
        "image_grid_thw": np.array([[1, 4, 6]]),
    }
    expected = run_onnxruntime(built_graphs.vision, inputs)["image_features"]
    found = run_onnxruntime(graphs.vision, inputs)["image_features"]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Conv <", "ConvTranspose <"), "found 0"),
        (("strides = [2, 4, 4]", "strides = [2, 2, 2]"), "stride"),
        (("strides = [2, 4, 4], ", ""), "stride"),
        (("pixel_values", "pictures"), "pixel_values"),
        (("rows = Reshape (convolved, row)", "rows = Flatten (convolved)"), "not between two Reshapes"),
        (("(patches, kernel, bias)", "(patches, kernel)"), "lacks its input 2"),
    ],
)
def test_unexpected_graphs_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        lower_patch_embedding(tower(tmp_path, TOWER.replace(*change)))


def test_a_kernel_that_is_no_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a weight of the checkpoint"):
        lower_patch_embedding(tower(tmp_path, bound=("bias",)))

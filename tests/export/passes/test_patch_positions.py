"""The tower that is told where its patches lie against the tower that computes it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.export.passes.test_single_image import GRIDS, inputs_of
from tests.support.graphs import Arrays, op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.patch_positions import take_patch_positions
from zreward.export.passes.position_table import interpolate_positions
from zreward.export.passes.single_image import specialize_single_image
from zreward.image import Patches


def told(inputs: Arrays) -> Arrays:
    """The same inputs with the places of the patches in place of the grid."""
    pixels, (grid,) = inputs["pixel_values"], inputs["image_grid_thw"].tolist()
    return {"pixel_values": pixels, "patch_positions": Patches(pixels, tuple(grid), 2).positions}


@pytest.mark.parametrize("without_reduction", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_features_equal_those_of_the_grid(
    graphs: Graphs, grid: tuple[int, int], without_reduction: bool
) -> None:
    specialize_single_image(graphs.vision)
    inputs = inputs_of(graphs.vision, *grid)
    expected = run_onnxruntime(graphs.vision, inputs)["image_features"]
    assert np.abs(expected).max() > 0.1
    interpolate_positions(graphs.vision)
    # two tables by rows and columns, and the learned positions
    assert take_patch_positions(graphs.vision, without_reduction=without_reduction) == 5
    assert ("ReduceMax" in op_types(graphs.vision)) != without_reduction
    found = run_onnxruntime(graphs.vision, told(inputs))["image_features"]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
    reference = run_reference(graphs.vision, told(inputs))["image_features"]
    np.testing.assert_allclose(reference, expected, atol=2e-5, rtol=0)


def test_the_number_of_patches_is_the_only_size_that_varies(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    interpolate_positions(graphs.vision)
    take_patch_positions(graphs.vision)
    shapes = {value.name: [str(size) for size in value.shape] for value in graphs.vision.graph.inputs}
    assert shapes == {"pixel_values": ["total_patches", "384"], "patch_positions": ["total_patches", "2"]}
    assert "InterpolatePositions" not in op_types(graphs.vision)
    assert not {"Loop", "Scan", "Range", "NonZero"} & set(op_types(graphs.vision))


def test_positions_run_over_blocks_of_merged_patches() -> None:
    positions = Patches(np.zeros((24, 3), np.float32), (1, 4, 6), 2).positions
    assert positions.dtype == np.int64
    assert positions[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert sorted(map(tuple, positions.tolist())) == [
        (row, column) for row in range(4) for column in range(6)
    ]


def test_a_tower_that_uses_its_grid_otherwise_is_refused(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    interpolate_positions(graphs.vision)
    grid = next(v for v in graphs.vision.graph.inputs if v.name == "image_grid_thw")
    graphs.vision.graph.outputs.append(grid)
    other = graphs.vision.graph
    other.inputs.remove(next(v for v in other.inputs if v.name == "pixel_values"))
    with pytest.raises(ExportError, match="no input 'pixel_values'"):
        take_patch_positions(graphs.vision)

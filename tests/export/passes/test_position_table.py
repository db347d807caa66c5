"""Positions of the tower interpolated by products against the gathers that mobius builds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.export.passes.test_single_image import GRIDS, inputs_of
from tests.support.graphs import op_types, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.passes.position_table import interpolate_positions
from zreward.export.passes.single_image import specialize_single_image


@pytest.mark.parametrize("grid", GRIDS)
def test_features_equal_those_of_gathered_neighbours(graphs: Graphs, grid: tuple[int, int]) -> None:
    specialize_single_image(graphs.vision)
    inputs = inputs_of(graphs.vision, *grid)
    expected = run_onnxruntime(graphs.vision, inputs)["image_features"]
    assert interpolate_positions(graphs.vision) == 1
    assert np.abs(expected).max() > 0.1
    for optimized in (False, True):
        found = run_onnxruntime(graphs.vision, inputs, optimized=optimized)["image_features"]
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        run_reference(graphs.vision, inputs)["image_features"], expected, atol=1e-5, rtol=0
    )


def test_the_table_is_read_once(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    interpolate_positions(graphs.vision)
    (table,) = (v for n, v in graphs.vision.graph.initializers.items() if n.endswith(".pos_embed.weight"))
    (use,) = table.uses()
    assert use.node.op_type == "InterpolatePositions"
    assert "Floor" not in op_types(graphs.vision)


def test_another_way_to_read_the_table_is_refused(graphs: Graphs) -> None:
    specialize_single_image(graphs.vision)
    (table,) = (v for n, v in graphs.vision.graph.initializers.items() if n.endswith(".pos_embed.weight"))
    (gather, *_) = (use.node for use in table.uses())
    graphs.vision.graph.append(ir.Node("", "Gather", list(gather.inputs)))
    with pytest.raises(ExportError, match="not read by four Gathers"):
        interpolate_positions(graphs.vision)

"""Rotary tables cut to the reachable positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import checked_proto, model_from_text
from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.irtools import add_initializer
from zreward.export.passes.rotary_table import trim_rotary_tables


def model_with_tables(rows: int) -> ir.Model:
    model = model_from_text("g (int64[n] i) => (int64[n] j) { j = Identity (i) }")
    for name in ("rotary.cos_cache", "rotary.sin_cache", "other.table"):
        table = np.random.default_rng(len(name)).standard_normal((rows, 4)).astype(np.float32)
        add_initializer(model.graph, ir.tensor(table, name=name))
    return model


def test_the_first_rows_stay_and_other_tables_are_left_alone() -> None:
    whole, model = model_with_tables(40), model_with_tables(40)
    assert trim_rotary_tables(model, 25) == 2
    for name, rows in (("rotary.cos_cache", 25), ("rotary.sin_cache", 25), ("other.table", 40)):
        value = model.graph.initializers[name]
        assert value.shape == [rows, 4]
        expected = whole.graph.initializers[name].const_value.numpy()[:rows]
        np.testing.assert_array_equal(value.const_value.numpy(), expected)
    checked_proto(model)


def test_the_real_tables(built_graphs: Graphs, graphs: Graphs) -> None:
    assert trim_rotary_tables(graphs.decoder, 128) == 2
    name = "decoder.model.rotary_emb.cos_cache"
    assert built_graphs.decoder.graph.initializers[name].shape[0] == 4096  # max_position_embeddings
    assert graphs.decoder.graph.initializers[name].const_value.nbytes == 128 * 4 * 4


def test_too_few_positions_are_refused() -> None:
    assert trim_rotary_tables(model_with_tables(40), 40) == 2
    with pytest.raises(ExportError, match="allows 41 positions, but the model has only 40"):
        trim_rotary_tables(model_with_tables(40), 41)

"""Graphs and embeddings on disk: complete, aligned, and equal to the weights they were written from."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.support.graphs import checkpoint_of, model_from_text, normal
from zreward.checkpoint import Checkpoint
from zreward.errors import ExportError
from zreward.export.graph import EMBEDDING
from zreward.export.irtools import add_initializer
from zreward.export.storage import graph_weight_bytes, write_embedding, write_graph
from zreward.onnx_locations import external_locations

GRAPH = """
g (float[n, 33] x, float[33, 77] first, float[33, 77] second, float[77] bias) => (float[n, 77] y)
{
    a = MatMul (x, first)
    b = MatMul (x, second)
    c = Add (a, b)
    y = Add (c, bias)
}
"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"first": normal(rng, 33, 77), "second": normal(rng, 33, 77), "bias": normal(rng, 77)}


def test_a_written_graph_is_complete_and_aligned(tmp_path: Path) -> None:
    model = model_from_text(GRAPH, checkpoint_of(tmp_path, weights()))
    add_initializer(model.graph, ir.tensor(np.arange(1000, dtype=np.int64), name="table"))
    expected, reported = graph_weight_bytes(model), []
    path = tmp_path / "graph.onnx"
    write_graph(model, path, reported.append)
    assert sum(reported) == expected == 2 * 33 * 77 * 4 + 8000

    proto = onnx.load(path, load_external_data=False)
    data = (tmp_path / "graph.onnx.data").read_bytes()
    ends = []
    for tensor in proto.graph.initializer:
        if tensor.name == "bias":
            assert tensor.data_location != onnx.TensorProto.EXTERNAL  # small: stays in the graph
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "graph.onnx.data" and int(entries["offset"]) % 4096 == 0
        ends.append(int(entries["offset"]) + int(entries["length"]))
    assert max(ends) == len(data) and len(ends) == 3
    assert external_locations(path) == {"graph.onnx.data"}

    onnx.checker.check_model(str(path))
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, values in (weights() | {"table": np.arange(1000)}).items():
        np.testing.assert_array_equal(loaded[name], values)


def test_packed_types_are_written_packed(tmp_path: Path) -> None:
    model = model_from_text("g (float[2] x) => (float[2] y) { y = Identity (x) }")
    values = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(ml_dtypes.int4)
    add_initializer(model.graph, ir.Tensor(values, dtype=ir.DataType.INT4, name="int4"))
    write_graph(model, tmp_path / "graph.onnx", lambda _: None)
    assert (tmp_path / "graph.onnx.data").stat().st_size == 64 * 64 // 2
    loaded = onnx.numpy_helper.to_array(onnx.load(tmp_path / "graph.onnx").graph.initializer[0])
    np.testing.assert_array_equal(loaded.astype(np.int8), values.astype(np.int8))


def test_a_weight_that_is_not_finite_stops_the_writing(tmp_path: Path) -> None:
    values = weights()
    values["second"][3, 3] = np.nan
    model = model_from_text(GRAPH, checkpoint_of(tmp_path, values))
    with pytest.raises(ExportError, match="'second' holds NaN"):
        write_graph(model, tmp_path / "graph.onnx", lambda _: None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_embedding_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("zreward.export.storage._EMBEDDING_BLOCK_ROWS", 10)
    values = normal(np.random.default_rng(0), 37, 8).astype(np.dtype(dtype))
    stored = values.view(np.uint16) if dtype == "bfloat16" else values
    reported: list[int] = []
    path = tmp_path / "embedding.bin"
    info = write_embedding(checkpoint_of(tmp_path, {EMBEDDING: stored}), path, reported.append)
    assert (info.file, info.dtype, info.shape) == ("embedding.bin", dtype, (37, 8))
    assert path.read_bytes() == values.tobytes()
    assert len(reported) == 4 and sum(reported) == values.nbytes


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    values = normal(np.random.default_rng(0), 37, 8)
    values[30, 2] = np.inf
    checkpoint: Checkpoint = checkpoint_of(tmp_path, {EMBEDDING: values})
    with pytest.raises(ExportError, match=r"embed_tokens\.weight' holds NaN or infinity"):
        write_embedding(checkpoint, tmp_path / "embedding.bin", lambda _: None)

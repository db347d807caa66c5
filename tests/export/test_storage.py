"""Graphs and embeddings on disk: complete, aligned, and equal to the weights they were written from."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.support.graphs import checkpoint_of, model_from_text, normal
from tests.support.quantized import Weight, WeightsInMemory, quantized_checkpoint
from zreward.checkpoint import Checkpoint
from zreward.errors import ExportError
from zreward.export.graph import EMBEDDING
from zreward.export.irtools import add_initializer
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.quantized_products import (
    quantize_products_for_onnxruntime,
    quantize_products_portably,
)
from zreward.export.passes.weight_layout import transpose_weights
from zreward.export.storage import graph_weight_bytes, write_embedding, write_graph
from zreward.onnx_locations import external_locations
from zreward.quant.tensor import WeightFormat

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


QUANTIZED = """
q (float[n, 256] x, float[80, 256] first, float[81, 256] second, float[16, 256] third)
    => (float[n, 80] y, float[n, 81] z, float[n, 16] w)
{
    a = Transpose (first)
    b = Transpose (second)
    c = Transpose (third)
    y = MatMul (x, a)
    z = MatMul (x, b)
    w = MatMul (x, c)
}
"""
FORMATS = {
    "first": WeightFormat(4, 32),
    "second": WeightFormat(4, 128, symmetric=False),
    "third": WeightFormat(8, activations="int8"),
}


@pytest.mark.parametrize("lower", [quantize_products_for_onnxruntime, quantize_products_portably])
def test_quantized_weights_take_the_bits_that_their_formats_say(
    tmp_path: Path, lower: Callable[..., int]
) -> None:
    rng = np.random.default_rng(0)
    shapes = {"first": (80, 256), "second": (81, 256), "third": (16, 256)}
    floats = checkpoint_of(tmp_path, {name: normal(rng, *shape) for name, shape in shapes.items()})
    checkpoint, weights = quantized_checkpoint(floats, FORMATS)
    model = model_from_text(QUANTIZED, checkpoint)
    transpose_weights(model)
    lower(model, weights)
    remove_dead_outputs(model)
    path = tmp_path / "graph.onnx"
    write_graph(model, path, lambda _: None)
    # Each is read once, though its parts are some inside the graph and some beside it.
    assert weights.reads == {"first": 1, "second": 1, "third": 1}
    onnx.checker.check_model(path)
    proto = onnx.load(path, load_external_data=False)
    entries = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert all(int(entry["offset"]) % 4096 == 0 for entry in entries) and len(entries) >= 4
    stored = {
        tensor.name: tensor
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.split(".")[0] in FORMATS
    }
    for name, chosen in FORMATS.items():
        n_bytes = sum(len(tensor.raw_data) for part, tensor in stored.items() if part.startswith(name))
        bits = chosen.bits_per_weight(256) * shapes[name][0] * 256
        assert n_bytes == pytest.approx(bits / 8, abs=1)  # a half-filled last byte of zero points


class FreshWeights(WeightsInMemory):
    """Reads a new object each time, and notes how many of the earlier ones are still held."""

    def __init__(self, matrices: Mapping[str, Weight]) -> None:
        super().__init__(matrices)
        self.still_held: list[int] = []
        self._given: list[weakref.ref[Weight]] = []

    def weight(self, name: str) -> Weight:
        self.still_held.append(sum(given() is not None for given in self._given))
        fresh = dataclasses.replace(super().weight(name))
        self._given.append(weakref.ref(fresh))
        return fresh


def test_one_quantized_weight_is_in_memory_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"first": (80, 256), "second": (81, 256), "third": (16, 256)}
    floats = checkpoint_of(tmp_path, {name: normal(rng, *shape) for name, shape in shapes.items()})
    checkpoint, weights = quantized_checkpoint(floats, FORMATS)
    fresh = FreshWeights(weights.matrices)
    model = model_from_text(QUANTIZED, checkpoint)
    transpose_weights(model)
    quantize_products_for_onnxruntime(model, fresh)
    write_graph(model, tmp_path / "graph.onnx", lambda _: None)
    assert fresh.still_held == [0, 0, 0]

"""Weights that are read when they are written: every layout and stored type against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import zreward.export.weights as weights_module
from tests.support.graphs import checkpoint_of, normal
from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError
from zreward.export.weights import CheckpointTensor, Layout

MATRIX = normal(np.random.default_rng(0), 7, 12)
KERNEL = normal(np.random.default_rng(1), 5, 3, 2, 2)
VECTOR = normal(np.random.default_rng(2), 9)
SCALAR = np.array(2.5, dtype=np.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    bfloat16 = MATRIX.astype(ml_dtypes.bfloat16).view(np.uint16)
    half = MATRIX.astype(np.float16)
    tensors = {"matrix": MATRIX, "kernel": KERNEL, "vector": VECTOR, "scalar": SCALAR}
    return checkpoint_of(tmp_path, {**tensors, "bf16": bfloat16, "f16": half})


LAYOUTS: list[tuple[Layout, NDArray[Any]]] = [
    (Layout("matrix"), MATRIX),
    (Layout("vector"), VECTOR),
    (Layout("scalar"), SCALAR),
    (Layout("kernel"), KERNEL),
    (Layout("matrix", transpose=True), MATRIX.T),
    (Layout("matrix", rows=(6, 0, 0, 3)), MATRIX[[6, 0, 0, 3]]),
    (Layout("matrix", rows=(2, 5), transpose=True), MATRIX[[2, 5]].T),
    (Layout("kernel", flatten=True), KERNEL.reshape(5, 12)),
    (Layout("kernel", flatten=True, transpose=True), KERNEL.reshape(5, 12).T),
    (Layout("kernel", rows=(4, 1), flatten=True), KERNEL[[4, 1]].reshape(2, 12)),
    (Layout("bf16"), MATRIX.astype(ml_dtypes.bfloat16).astype(np.float32)),
    (Layout("f16", transpose=True), MATRIX.astype(np.float16).astype(np.float32).T),
    (Layout("matrix", dtype=ir.DataType.FLOAT16), MATRIX.astype(np.float16)),
    (Layout("matrix", transpose=True, dtype=ir.DataType.BFLOAT16), MATRIX.T.astype(ml_dtypes.bfloat16)),
]


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 26])
@pytest.mark.parametrize(
    ("layout", "expected"), LAYOUTS, ids=lambda v: repr(v) if isinstance(v, Layout) else ""
)
def test_layouts_equal_numpy(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    expected: NDArray[Any],
    block_bytes: int,
) -> None:
    monkeypatch.setattr(weights_module, "_BLOCK_BYTES", block_bytes)
    tensor = CheckpointTensor(checkpoint, layout, "w")
    assert tensor.shape.numpy() == expected.shape and tensor.nbytes == expected.nbytes
    np.testing.assert_array_equal(np.asarray(tensor.numpy()).view(expected.dtype), expected)
    streamed = b"".join(block.tobytes() for block in tensor.blocks())
    assert streamed == np.ascontiguousarray(expected).tobytes()


def test_a_large_matrix_comes_in_blocks(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_BLOCK_BYTES", 3 * 12 * 4)
    blocks = list(CheckpointTensor(checkpoint, Layout("matrix"), "w").blocks())
    assert [len(block) for block in blocks] == [3, 3, 1]


def test_nothing_is_read_before_it_is_asked_for(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read too early")

    monkeypatch.setattr(Checkpoint, "read", read)
    tensor = CheckpointTensor(checkpoint, Layout("matrix"), "w").with_layout("w.t", transpose=True)
    assert (tensor.name, tensor.nbytes, tensor.shape.numpy()) == ("w.t", MATRIX.nbytes, (12, 7))


def test_values_are_not_kept(checkpoint: Checkpoint) -> None:
    tensor = CheckpointTensor(checkpoint, Layout("vector"), "w")
    assert tensor.numpy() is not tensor.numpy()


def test_a_file_that_was_cut_since_it_was_opened(checkpoint: Checkpoint) -> None:
    (checkpoint.path / "weights.bin").write_bytes(b"\0" * 10)
    with pytest.raises(CheckpointError, match="ends inside tensor 'matrix'"):
        CheckpointTensor(checkpoint, Layout("matrix"), "w").numpy()

"""What is stored comes back, and the floats that replace the checkpoint's are read in their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.quantized import rounded
from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError
from zreward.quant.store import StoreWriter, bits_per_weight, open_store
from zreward.quant.tensor import QuantizedWeight, WeightFormat

LAYER = "model.language_model.layers.0.mlp.down_proj.weight"
NORM = "model.language_model.layers.0.input_layernorm.weight"
FORMATS = [
    WeightFormat(4, 16),
    WeightFormat(4, 32, symmetric=False),
    WeightFormat(8),
    WeightFormat(8, 16, symmetric=False),
]


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_a_weight_comes_back(tmp_path: Path, checkpoint: Checkpoint, chosen: WeightFormat) -> None:
    weight = rounded(checkpoint.read(LAYER), chosen)
    assert isinstance(weight, QuantizedWeight)
    writer = StoreWriter(tmp_path)
    writer.add(LAYER, weight, error=0.25)
    writer.finish("int4", "rtn", {NORM: "a vector"})
    opened = open_store(checkpoint, tmp_path)
    found = opened.weights.weight(LAYER)
    assert isinstance(found, QuantizedWeight)
    for name in ("codes", "scales", "zeros"):
        assert np.array_equal(getattr(found, name), getattr(weight, name))
    assert np.array_equal(opened.read(LAYER, 3, 9), weight.dequantized()[3:9])
    assert opened.info(LAYER).shape == weight.shape
    summary = opened.weights.summary()
    assert summary["layers"][LAYER.removesuffix(".weight")]["error"] == 0.25
    assert summary["kept"] == {NORM: "a vector"}


def test_a_static_scale_of_inputs_comes_back(tmp_path: Path, checkpoint: Checkpoint) -> None:
    chosen = WeightFormat(8, activations="int8-static")
    writer = StoreWriter(tmp_path)
    writer.add(LAYER, rounded(checkpoint.read(LAYER), chosen), error=0.1, input_scale=0.03125)
    writer.finish("int8-static", "gptq", {})
    weights = open_store(checkpoint, tmp_path).weights
    assert weights.input_scale(LAYER) == 0.03125
    layer = weights.summary()["layers"][LAYER.removesuffix(".weight")]
    assert (layer["format"], layer["input_scale"]) == ("int8-static", 0.03125)


def test_replaced_floats_are_read(tmp_path: Path, checkpoint: Checkpoint) -> None:
    writer = StoreWriter(tmp_path)
    writer.add(LAYER, rounded(checkpoint.read(LAYER), WeightFormat(8)), error=0.0)
    writer.replace(NORM, np.full(64, 0.125, np.float32))
    writer.finish("int8", "gptq", {})
    assert (open_store(checkpoint, tmp_path).read(NORM) == 0.125).all()
    assert (checkpoint.read(NORM) != 0.125).any()


def test_a_store_without_index_is_not_opened(tmp_path: Path, checkpoint: Checkpoint) -> None:
    StoreWriter(tmp_path).add(LAYER, rounded(checkpoint.read(LAYER), WeightFormat(8)), error=0.0)
    with pytest.raises(QuantizationError, match=r"index\.json"):
        open_store(checkpoint, tmp_path)


def test_bits_count_scales_and_zero_points() -> None:
    formats = {"a": WeightFormat(4, 32), "b": WeightFormat(8, symmetric=False)}
    shapes = {"a": (10, 64), "b": (5, 128)}
    bits = 10 * (64 * 4 + 2 * 16) + 5 * (128 * 8 + 16 + 8)
    assert bits_per_weight(formats, shapes) == pytest.approx(bits / (640 + 640))

"""bitsandbytes checkpoints: real files, the layout against a plain reading of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from zreward.errors import CheckpointError
from zreward.quant.formats import open_checkpoint
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import CodebookFormat, CodebookWeight, QuantizedWeight, WeightFormat

DATA = Path(__file__).parent / "data"
LAYER = "model.language_model.layers.0.mlp.up_proj"
NAME = f"{LAYER}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def opened(path: Path) -> QuantizedCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return checkpoint


def rewritten(
    path: Path, fixture: str, change: Callable[[dict[str, torch.Tensor]], None], **config: Any
) -> Path:
    """A copy of a real checkpoint with other tensors or another quantization_config."""
    shutil.copytree(DATA / fixture, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"].update(config)
    (path / "config.json").write_text(json.dumps(content))
    return path


def as_bytes(value: Any) -> torch.Tensor:
    text = value if isinstance(value, str) else json.dumps(value)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_reads_nf4_with_double_quantization_as_bitsandbytes_does() -> None:
    checkpoint, expected = opened(DATA / "nf4-double"), np.load(DATA / "nf4-double" / "expected.npz")
    for name in expected.files:
        assert np.array_equal(checkpoint.read(name), expected[name])
    weight = checkpoint.weights.weight(NAME)
    assert isinstance(weight, CodebookWeight) and weight.format == CodebookFormat("nf4", 64)
    assert checkpoint.weights.shape(NAME) == weight.shape == (48, 64)


def test_reads_int8_as_bitsandbytes_does() -> None:
    """bitsandbytes multiplies by 1/127 rounded to float32, which differs in the last bit."""
    checkpoint, expected = opened(DATA / "int8"), np.load(DATA / "int8" / "expected.npz")
    for name in expected.files:
        assert np.allclose(checkpoint.read(name), expected[name], rtol=3e-7, atol=0)
    weight = checkpoint.weights.weight(NAME)
    assert isinstance(weight, QuantizedWeight) and weight.format == WeightFormat(8, scale_bits=32)
    assert weight.scales.shape == (48, 1) and (weight.zeros == 128).all()


@pytest.mark.parametrize("fixture", ["nf4-double", "int8"])
def test_what_is_not_a_matrix_stays_a_float(fixture: str) -> None:
    checkpoint = opened(DATA / fixture)
    assert all(info.is_float for info in checkpoint.tensors.values())
    assert not any(".weight." in n or n.endswith((".SCB", ".weight_format")) for n in checkpoint.tensors)
    assert "model.language_model.embed_tokens.weight" in checkpoint.tensors
    small = "model.language_model.layers.0.linear_attn.in_proj_a.weight"
    assert (
        small in checkpoint.weights.formats and checkpoint.info(small).shape == checkpoint.read(small).shape
    )
    summary = checkpoint.weights.summary()
    assert summary["method"] == "bitsandbytes" and 4 < summary["bits_per_weight"] < 9
    assert set(summary["kept"]) == set(checkpoint.tensors)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 16, 64]), st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_fp4_without_double_quantization(
    tmp_path_factory: pytest.TempPathFactory, out: int, inputs: int, block: int, seed: int
) -> None:
    """Blocks run on through the rows; an odd number of codes leaves half a byte."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, size=out * inputs)
    scales = rng.uniform(0, 2, size=-(-codes.size // block)).astype(np.float32)
    table = rng.normal(size=16).astype(np.float32)
    padded = np.append(codes, 0) if codes.size % 2 else codes

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(NAME)]:
            del tensors[name]
        tensors[NAME] = torch.from_numpy((padded[::2] * 16 + padded[1::2]).astype(np.uint8))[:, None]
        tensors[f"{NAME}.absmax"] = torch.from_numpy(scales)
        tensors[f"{NAME}.quant_map"] = torch.from_numpy(table)
        state = {"quant_type": "fp4", "blocksize": block, "dtype": "bfloat16", "shape": [out, inputs]}
        tensors[STATE.replace("nf4", "fp4")] = as_bytes(state)

    checkpoint = opened(rewritten(tmp_path_factory.mktemp("fp4") / "copy", "nf4-double", change))
    expected = [float(table[code]) * float(scales[e // block]) for e, code in enumerate(codes)]
    assert np.allclose(checkpoint.read(NAME), np.reshape(expected, (out, inputs)), rtol=1e-6, atol=0)
    assert checkpoint.weights.formats[NAME] == CodebookFormat("fp4", block)


def test_rows_of_zeros_keep_a_usable_scale(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.SCB"][5] = 0
        tensors[NAME][5] = 0

    checkpoint = opened(rewritten(tmp_path / "copy", "int8", change))
    assert not checkpoint.read(NAME)[5].any()
    assert np.array_equal(checkpoint.read(NAME)[6:], opened(DATA / "int8").read(NAME)[6:])


def test_early_checkpoints_have_flags_and_no_method(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "copy", "int8", lambda tensors: None, quant_method=None)
    assert np.array_equal(opened(path).read(NAME), opened(DATA / "int8").read(NAME))


@pytest.mark.parametrize(
    ("fixture", "change", "message"),
    [
        ("int8", lambda t: t.pop(f"{LAYER}.SCB"), r"up_proj\.SCB.*incomplete"),
        ("int8", lambda t: t.update({f"{LAYER}.SCB": torch.ones(3)}), "expected 48 elements"),
        ("int8", lambda t: t[f"{LAYER}.SCB"].fill_(float("nan")), r"up_proj\.SCB gives scales"),
        ("int8", lambda t: t[f"{LAYER}.SCB"].fill_(-1), "negative or not finite"),
        ("int8", lambda t: t.update({NAME: t[NAME][0]}), "expected a matrix"),
        ("int8", lambda t: t.update({NAME: t[NAME].view(torch.uint8)}), "U8 without its quant_state"),
        ("nf4-double", lambda t: t.pop(STATE), "U8 without its quant_state"),
        ("nf4-double", lambda t: t.pop(f"{NAME}.absmax"), r"absmax.*incomplete"),
        ("nf4-double", lambda t: t.pop(f"{NAME}.nested_absmax"), r"nested_absmax.*incomplete"),
        ("nf4-double", lambda t: t.update({NAME: t[NAME][:-1]}), "expected 1536 elements"),
        ("nf4-double", lambda t: t.update({f"{NAME}.absmax": torch.ones(48)}), "48 elements of bytes"),
        ("nf4-double", lambda t: t.update({f"{NAME}.quant_map": torch.ones(15)}), "expected 16 elements"),
        ("nf4-double", lambda t: t[f"{NAME}.nested_absmax"].fill_(float("inf")), "not finite"),
        ("nf4-double", lambda t: t.update({STATE: as_bytes("{")}), "not a quantization state"),
        ("nf4-double", lambda t: t.update({STATE: as_bytes({"shape": [48, 64]})}), "no usable sizes"),
        (
            "nf4-double",
            lambda t: t.update({STATE: as_bytes({"shape": [9], "blocksize": 64})}),
            "no usable sizes",
        ),
        (
            "nf4-double",
            lambda t: t.update(
                {STATE: as_bytes({"shape": [48, 64], "blocksize": 64, "nested_blocksize": 256})}
            ),
            "no usable nested_offset",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    tmp_path: Path, fixture: str, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    path = rewritten(tmp_path / "copy", fixture, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_weights_that_are_not_quantized(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n, tensor in tensors.items() if not tensor.is_floating_point()]:
            del tensors[name]

    path = rewritten(tmp_path / "copy", "int8", change)
    with pytest.raises(CheckpointError, match="not quantized"):
        open_checkpoint(path)

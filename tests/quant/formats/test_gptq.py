"""GPTQ checkpoints: the layout against a plain reading of its description, real files, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from tests.support.models import Shape, write_checkpoint
from tests.support.quantized import WeightsInMemory, random_weight
from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError, QuantizationError, ZrewardError
from zreward.quant.formats import open_checkpoint
from zreward.quant.formats.gptq_layout import pack_rows, pack_zeros, unpack_rows, unpack_zeros
from zreward.quant.formats.gptq_writer import check_writable, is_gptq_layer, write_gptq_checkpoint
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import QuantizedWeight, WeightFormat

DATA = Path(__file__).parent / "data"
LAYER = "model.language_model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "checkpoint"
    return write_checkpoint(path, Shape(layers=2, full_attention_interval=2), dtype="bfloat16")


def quantized(dense: Path, form: WeightFormat, act_order: bool = False) -> WeightsInMemory:
    """Random codes in place of every matrix that the format may hold."""
    rng = np.random.default_rng(0)
    matrices = {}
    for name, info in Checkpoint.open(dense).tensors.items():
        if is_gptq_layer(name):
            order = rng.permutation(info.shape[1]) if act_order else None
            matrices[name] = random_weight(rng, (info.shape[0], info.shape[1]), form, order)
    return WeightsInMemory(matrices)


def write(source: Path, weights: WeightsInMemory, path: Path, **options: Any) -> Path:
    """`source` with `weights` as a checkpoint in the new directory `path`."""
    path.mkdir()
    write_gptq_checkpoint(Checkpoint.open(source), weights, path, **options)
    return path


def opened(path: Path) -> QuantizedCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return checkpoint


def plain_dequantized(path: Path, layer: str, bits: int, version: str) -> NDArray[np.float64]:
    """The description of `gptq_layout`, element by element."""
    tensors = load_file(path / "model.safetensors")
    qweight, qzeros, scales, g_idx = (
        tensors[f"{layer}.{part}"].tolist() for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    per_word, mask = 32 // bits, 2**bits - 1
    added = sum(1 << (bits * k) for k in range(per_word)) if version == "gptq" else 0

    def code(word: int, index: int) -> int:
        return ((word & 0xFFFFFFFF) >> (bits * (index % per_word))) & mask

    out = len(scales[0])
    values = np.empty((out, len(g_idx)))
    for i, group in enumerate(g_idx):
        for o in range(out):
            zero = code(qzeros[group][o // per_word] + added, o)
            values[o, i] = scales[group][o] * (code(qweight[i // per_word][o], i) - zero)
    return values


@given(st.sampled_from([4, 8]), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packing_inverts(bits: int, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, size=(rows, columns), dtype=np.uint8)
    words = pack_rows(codes, bits)
    assert words.shape == (-(-rows * bits // 32), columns)
    restored = unpack_rows(words, bits)
    assert np.array_equal(restored[:rows], codes) and not restored[rows:].any()
    for version in ("gptq", "gptq_v2"):
        packed = pack_zeros(codes.T, bits, version)
        assert np.array_equal(unpack_zeros(packed, bits, version)[:, :rows], codes.T)


def test_words_have_the_first_code_in_their_low_bits() -> None:
    codes = np.arange(1, 9, dtype=np.uint8)[:, None]
    assert pack_rows(codes, 4).view(np.uint32).tolist() == [[0x87654321]]
    assert pack_rows(codes, 8).view(np.uint32).tolist() == [[0x04030201], [0x08070605]]
    assert pack_zeros(np.full((1, 8), 8, np.uint8), 4, "gptq").view(np.uint32).tolist() == [[0x77777777]]
    assert pack_zeros(np.full((1, 4), 128, np.uint8), 8, "gptq_v2").view(np.uint32).tolist() == [[0x80808080]]


@pytest.mark.parametrize("name", ["gptq-v1", "gptq-v2-act-order"])
def test_reads_what_gptqmodel_wrote(name: str) -> None:
    checkpoint, expected = opened(DATA / name), np.load(DATA / name / "expected.npz")
    for tensor in expected.files:
        assert np.array_equal(checkpoint.read(tensor), expected[tensor])
    assert len(checkpoint.weights.formats) == (13 if name == "gptq-v1" else 12)
    assert not any(tensor.endswith((".qweight", ".scales")) for tensor in checkpoint.tensors)


def test_formats_come_from_the_tensors() -> None:
    """48 inputs in groups of 32, `dynamic` with 8 bits and an excluded layer, act-order."""
    first, second = opened(DATA / "gptq-v1").weights, opened(DATA / "gptq-v2-act-order").weights
    up, down = (f"model.language_model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down"))
    assert first.formats[up] == WeightFormat(4, 32)
    assert first.formats[down] == WeightFormat(4, 16)
    assert second.formats[up] == WeightFormat(4, 32, symmetric=False, act_order=True)
    assert second.formats[down] == WeightFormat(8, 0, symmetric=False)
    assert up.replace("up", "gate") in first.formats and up.replace("up", "gate") not in second.formats
    for weights in (first, second):
        for name, form in weights.formats.items():
            assert weights.weight(name).format == form
    assert second.summary()["layers"][down.removesuffix(".weight")]["format"] == "int8-weight-rows-asym"
    assert second.summary()["kept"]["model.language_model.norm.weight"] == "not quantized in the checkpoint"


@pytest.mark.parametrize(
    ("form", "act_order"),
    [
        (WeightFormat(4, 32), False),
        (WeightFormat(4, 16, symmetric=False), False),
        (WeightFormat(4, 32, act_order=True), True),
        (WeightFormat(8, 0), False),
        (WeightFormat(8, 64, symmetric=False), False),
    ],
    ids=str,
)
def test_what_is_written_is_read(dense: Path, tmp_path: Path, form: WeightFormat, act_order: bool) -> None:
    weights = quantized(dense, form, act_order)
    output = write(dense, weights, tmp_path / "out")
    source, result = Checkpoint.open(dense), opened(output)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert set(result.weights.formats) == set(weights.formats)
    for name, weight in weights.matrices.items():
        read = result.weights.weight(name)
        assert isinstance(read, QuantizedWeight)
        assert np.array_equal(read.dequantized(), weight.dequantized())
        assert read.format.bits == form.bits and read.format.symmetric == form.symmetric
        assert read.format.act_order == (act_order and read.scales.shape[1] > 1)
    for name, info in result.tensors.items():
        assert info.dtype == source.info(name).dtype
        assert np.array_equal(result.read_stored(name), source.read_stored(name))
    assert set(result.tensors) | set(weights.formats) == set(source.tensors)
    plain = plain_dequantized(output, LAYER, form.bits, config["checkpoint_format"])
    assert np.allclose(plain, weights.matrices[f"{LAYER}.weight"].dequantized(), rtol=1e-6, atol=0)
    assert result.contract() == source.contract()
    assert (output / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_shards_are_written_and_read(dense: Path, tmp_path: Path) -> None:
    weights, heard = quantized(dense, WeightFormat(4, 32)), list[tuple[int, int]]()
    output = write(
        dense,
        weights,
        tmp_path / "out",
        progress=lambda stage, done, total: heard.append((done, total)),
        shard_bytes=50_000,
    )
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 2 and all(f.name.endswith(f"-of-{len(files):05d}.safetensors") for f in files)
    assert sum(len(load_file(file)) for file in files) == len(Checkpoint.open(output).tensors)
    result = opened(output)
    for name, weight in weights.matrices.items():
        assert np.array_equal(result.read(name), weight.dequantized())
    assert heard[-1][0] == heard[-1][1] and heard == sorted(heard)


def test_the_config_names_what_is_quantized(dense: Path, tmp_path: Path) -> None:
    weights = quantized(dense, WeightFormat(4, 32))
    write(dense, weights, tmp_path / "all")
    config = json.loads((tmp_path / "all" / "quantize_config.json").read_text())
    assert config["group_size"] == 32 and config["sym"] and not config["desc_act"] and not config["dynamic"]
    assert "linear_attn.in_proj_qkv" in config["modules_in_block_to_quantize"][0]
    assert not any(
        name.endswith(("in_proj_a", "in_proj_b")) for name in config["modules_in_block_to_quantize"][0]
    )

    del weights.matrices[f"{LAYER}.weight"]  # type: ignore[attr-defined]  # a dictionary here
    write(dense, weights, tmp_path / "less")
    config = json.loads((tmp_path / "less" / "quantize_config.json").read_text())
    endings = config["modules_in_block_to_quantize"][0]
    assert not any(LAYER.endswith(ending) for ending in endings) and "1.mlp.up_proj" in endings
    assert list(config["dynamic"]) == ["-:^model\\.language_model\\.layers\\.0\\.mlp\\.up_proj$"]


def test_the_writer_refuses_what_the_loaders_cannot_take(dense: Path, tmp_path: Path) -> None:
    rng, name = np.random.default_rng(0), f"{LAYER}.weight"
    weights = {bits: random_weight(rng, (128, 64), WeightFormat(bits, 32)) for bits in (4, 8)}
    other = name.replace("up_proj", "gate_proj")
    cases: list[tuple[dict[str, QuantizedWeight], str]] = [
        ({}, "nothing is quantized"),
        ({name: weights[4], other: weights[8]}, "one format for all layers"),
        ({"model.visual.merger.linear_fc1.weight": weights[4]}, "decoder's linear layers alone"),
        ({name.replace("mlp.up_proj", "linear_attn.in_proj_a"): weights[4]}, "decoder's linear layers alone"),
        ({name: random_weight(rng, (128, 64), WeightFormat(4, 0))}, "choose a group size"),
        (
            {name: random_weight(rng, (128, 64), WeightFormat(8, activations="int8"))},
            "cannot hold its format",
        ),
    ]
    for matrices, message in cases:
        with pytest.raises(QuantizationError, match=message):
            check_writable(WeightsInMemory(matrices))
    fine = weights[4]
    odd = QuantizedWeight(fine.format, fine.codes, fine.scales + np.float32(1e-6), fine.zeros)
    with pytest.raises(QuantizationError, match="not float16"):
        write(dense, WeightsInMemory({name: odd}), tmp_path / "out")


def damaged(tmp_path: Path, change: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    """A copy of what gptqmodel wrote, with other tensors or another quantization_config."""
    path = Path(shutil.copytree(DATA / "gptq-v1", tmp_path / "damaged"))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_torch_file(contiguous, path / "model.safetensors")
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"].update(config)
    (path / "config.json").write_text(json.dumps(content))
    return path


def edit(part: str, function: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.{part}"] = function(tensors[f"{LAYER}.{part}"])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.qweight"), r"up_proj\.qweight.*incomplete"),
        (lambda t: t.pop(f"{LAYER}.scales"), r"up_proj\.scales.*incomplete"),
        (lambda t: t.pop(f"{LAYER}.qzeros"), r"up_proj\.qzeros.*incomplete"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.scales"].clone()}), "a weight and a qweight"),
        (edit("qweight", lambda v: v[:-1]), "no matrix of 4 or 8 bits"),
        (edit("qweight", lambda v: v[:, :-8]), "no matrix of 4 or 8 bits"),
        (edit("qzeros", lambda v: v[:1]), "no matrix of 4 or 8 bits"),
        (edit("qweight", lambda v: v.float()), "expected I32"),
        (edit("scales", lambda v: v.int()), "expected floats"),
        (edit("g_idx", lambda v: v[None]), "expected I32 of 1 dim"),
        (edit("scales", lambda v: v * float("nan")), "NaN or infinity"),
        (edit("g_idx", lambda v: v + 1), "names a group outside"),
        (edit("g_idx", lambda v: v - 1), "names a group outside"),
    ],
)
def test_damaged_tensors_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(damaged(tmp_path, change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 2}, "2 bits are not supported"),
        ({"bits": 3}, "3 bits are not supported"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not supported"),
        ({"pack_dtype": "int16"}, "'int16' is not supported"),
        ({"quant_method": "awq"}, "'awq', which is not supported.*quantize the original"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors', which is not supported"),
        ({"quant_method": "fp8"}, "'fp8', which is not supported"),
        ({"quant_method": None}, "'None', which is not supported"),
    ],
    ids=str,
)
def test_other_quantizations_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        open_checkpoint(damaged(tmp_path, lambda tensors: None, **config))


def test_a_config_that_disagrees_with_the_weights(tmp_path: Path, dense: Path) -> None:
    path = Path(shutil.copytree(dense, tmp_path / "dense"))
    assert type(open_checkpoint(path)) is Checkpoint
    content = json.loads((path / "config.json").read_text())
    for value, message in (
        ({"quant_method": "gptq", "bits": 4}, r"no tensor is named"),
        ([1], "not an object"),
    ):
        (path / "config.json").write_text(json.dumps({**content, "quantization_config": value}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_the_config_of_autogptq_lies_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = Path(shutil.copytree(DATA / "gptq-v1", tmp_path / "copy"))
    content = json.loads((path / "config.json").read_text())
    del content["quantization_config"]
    (path / "config.json").write_text(json.dumps(content))
    assert np.array_equal(
        opened(path).read(f"{LAYER}.weight"), opened(DATA / "gptq-v1").read(f"{LAYER}.weight")
    )
    (path / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match="says how"):
        open_checkpoint(path)


def one_matrix(tmp_path: Path, tensors: dict[str, NDArray[Any]], **config: Any) -> QuantizedCheckpoint:
    """A checkpoint whose only matrix is LAYER, as version 2."""
    path = tmp_path / "one"
    path.mkdir()
    content = json.loads((DATA / "gptq-v1" / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "format": "gptq_v2", "bits": 4, **config}
    (path / "config.json").write_text(json.dumps(content))
    save_file({f"{LAYER}.{part}": value for part, value in tensors.items()}, path / "model.safetensors")
    return opened(path)


@pytest.mark.parametrize("sizes", [(32, 32, 32), (64, 16, 16), (512, 512), (96,), (48, 16, 0, 32)], ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
def test_groups_are_cut_until_they_are_equal(tmp_path: Path, sizes: tuple[int, ...], shuffled: bool) -> None:
    rng, inputs, out = np.random.default_rng(1), sum(sizes), 8
    codes = rng.integers(0, 16, size=(inputs, out), dtype=np.uint8)
    scales = rng.uniform(0.01, 1, size=(len(sizes), out)).astype(np.float16)
    zeros = rng.integers(0, 16, size=(len(sizes), out), dtype=np.uint8)
    g_idx = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    if shuffled:
        rng.shuffle(g_idx)
    tensors = {"qweight": pack_rows(codes, 4), "qzeros": pack_zeros(zeros, 4, "gptq_v2"), "scales": scales}
    checkpoint = one_matrix(tmp_path, {**tensors, "g_idx": g_idx})
    name = f"{LAYER}.weight"
    expected = (codes.astype(np.float64) - zeros[g_idx]) * scales[g_idx].astype(np.float64)
    assert np.allclose(checkpoint.read(name), expected.T, rtol=1e-6, atol=0)
    weight = checkpoint.weights.weight(name)
    assert weight.format == checkpoint.weights.formats[name]
    assert (weight.format.group_size, weight.format.act_order) == (
        {1: 0, 2: 256}.get(len(sizes), 16 if 16 in sizes else 32),
        shuffled and len(sizes) > 1,
    )


def test_groups_below_16_are_refused(tmp_path: Path) -> None:
    ones = np.zeros((3, 8), np.uint8)
    tensors = {"qzeros": pack_zeros(ones, 4, "gptq_v2"), "scales": np.ones((3, 8), np.float16)}
    tensors["qweight"] = pack_rows(np.zeros((24, 8), np.uint8), 4)
    with pytest.raises(QuantizationError, match="groups of 8 to 8 inputs"):
        one_matrix(tmp_path, {**tensors, "g_idx": np.arange(24, dtype=np.int32) // 8})


@pytest.mark.parametrize(("group_size", "size"), [(32, 16), (-1, 16), (128, 16)])
def test_without_g_idx_groups_are_neighbours(tmp_path: Path, group_size: int, size: int) -> None:
    """80 inputs: groups of 32, 32 and 16 by the config, or five of 16 by their number."""
    rng = np.random.default_rng(2)
    groups = 3 if group_size == 32 else 5
    codes = rng.integers(0, 16, size=(80, 8), dtype=np.uint8)
    scales = rng.uniform(0.01, 1, size=(groups, 8)).astype(np.float16)
    tensors = {"qzeros": pack_zeros(np.full((groups, 8), 8, np.uint8), 4, "gptq_v2"), "scales": scales}
    checkpoint = one_matrix(tmp_path, {**tensors, "qweight": pack_rows(codes, 4)}, group_size=group_size)
    of_input = np.arange(80) // (32 if groups == 3 else 16)
    expected = (codes.astype(np.float64) - 8) * scales[of_input].astype(np.float64)
    assert np.allclose(checkpoint.read(f"{LAYER}.weight"), expected.T, rtol=1e-6, atol=0)
    assert checkpoint.weights.formats[f"{LAYER}.weight"] == WeightFormat(4, size)


def test_groups_that_cannot_be_told(tmp_path: Path) -> None:
    tensors = {"qzeros": np.zeros((3, 1), np.int32), "scales": np.ones((3, 8), np.float16)}
    with pytest.raises(CheckpointError, match="no g_idx, and 3 groups do not divide its 80 inputs"):
        one_matrix(tmp_path, {**tensors, "qweight": np.zeros((10, 8), np.int32)}, group_size=16)


def test_negative_scales_of_auto_round_and_dead_groups(tmp_path: Path) -> None:
    """auto-round turns a scale around to use the code that one side has more; tiny weights lose their scale."""
    rng = np.random.default_rng(3)
    codes, zeros = rng.integers(0, 16, size=(64, 8), dtype=np.uint8), np.full((2, 8), 8, np.uint8)
    scales = rng.uniform(0.01, 1, size=(2, 8)).astype(np.float16)
    scales[0, ::2] *= -1
    scales[1, 3] = 0
    g_idx = np.arange(64, dtype=np.int32) // 32
    tensors = {"qweight": pack_rows(codes, 4), "qzeros": pack_zeros(zeros, 4, "gptq_v2"), "scales": scales}
    checkpoint = one_matrix(tmp_path, {**tensors, "g_idx": g_idx})
    expected = (codes.astype(np.float64) - 8) * scales[g_idx].astype(np.float64)
    assert np.allclose(checkpoint.read(f"{LAYER}.weight"), expected.T, rtol=1e-6, atol=0)
    assert checkpoint.weights.formats[f"{LAYER}.weight"] == WeightFormat(4, 32, symmetric=False)


def test_every_refusal_is_an_error_of_zreward(tmp_path: Path) -> None:
    """A truncated file is refused when it is opened, before anything is read."""
    path = Path(shutil.copytree(DATA / "gptq-v1", tmp_path / "copy"))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ZrewardError, match="truncated"):
        open_checkpoint(path)

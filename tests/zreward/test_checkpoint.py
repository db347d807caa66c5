"""zreward.checkpoint against the safetensors library: the same numbers, and the same files refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tests.support.models import small_contract, write_checkpoint
from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import CheckpointError, ContractError
from zreward.image import ImageSpec
from zreward.safetensors_file import (
    SafetensorsWriter,
    TensorSpec,
    float32_from_stored,
    tensors_of_file,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def write_weights(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def safetensors_opens(file: Path) -> bool:
    """Whether the safetensors library itself takes the file."""
    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
    except SafetensorError:
        return False
    return True


def shard(checkpoint: Path) -> dict[str, str]:
    """Replace the single weights file by two shards and an index; returns the weight map."""
    tensors = load_file(checkpoint / WEIGHTS)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, checkpoint / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    write_index(checkpoint, weight_map)
    (checkpoint / WEIGHTS).unlink()
    return weight_map


def write_index(checkpoint: Path, weight_map: Any) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_every_tensor_as_safetensors_does(checkpoint: Path, dtype: torch.dtype) -> None:
    expected = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    expected["scalar"], expected["empty"] = torch.tensor(-2.5, dtype=dtype), torch.empty((0, 3), dtype=dtype)
    save_file(expected, checkpoint / WEIGHTS)
    opened = Checkpoint.open(checkpoint)
    assert set(opened.tensors) == set(expected)
    assert opened.n_parameters == sum(tensor.numel() for tensor in expected.values())
    for name, tensor in expected.items():
        assert opened.info(name).shape == tuple(tensor.shape)
        got = opened.read(name)
        assert got.dtype == np.float32
        assert np.array_equal(got, tensor.float().numpy())


def test_reads_rows(original: Path) -> None:
    opened = Checkpoint.open(original)
    name = next(n for n, info in opened.tensors.items() if len(info.shape) == 2 and info.shape[0] > 40)
    whole, rows = opened.read(name), opened.info(name).shape[0]
    assert np.array_equal(opened.read(name, 7, 19), whole[7:19])
    assert np.array_equal(opened.read(name, rows - 3, rows + 5), whole[-3:])
    assert opened.read(name, 5, 5).shape == (0, *whole.shape[1:])
    assert np.array_equal(float32_from_stored(opened.read_stored(name, 7, 19), "F32"), whole[7:19])
    for start, stop in ((-1, 3), (9, 3), (rows + 1, rows + 2)):
        with pytest.raises(CheckpointError, match=f"has {rows} rows"):
            opened.read(name, start, stop)


def test_bfloat16_bits_keep_infinities_and_signs() -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.14159], dtype=torch.bfloat16)
    got = float32_from_stored(values.view(torch.uint16).numpy(), "BF16")
    assert got.tobytes() == values.float().numpy().tobytes()


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_whole_numbers_are_read_as_stored_and_are_no_weights(checkpoint: Path, dtype: torch.dtype) -> None:
    values = torch.arange(-12, 12).reshape(6, 4).to(dtype)
    save_file({**load_file(checkpoint / WEIGHTS), "codes": values}, checkpoint / WEIGHTS)
    opened = Checkpoint.open(checkpoint)
    got = opened.read_stored("codes", 1, 4)
    assert got.dtype == values.numpy().dtype and np.array_equal(got, values.numpy()[1:4])
    with pytest.raises(CheckpointError, match=r"'codes' holds .* quantized"):
        opened.read("codes")
    with pytest.raises(CheckpointError, match="no weights by themselves"):
        float32_from_stored(got, opened.info("codes").dtype)


def test_wide_and_8_bit_floats(checkpoint: Path) -> None:
    wide, narrow = torch.tensor([1 / 3, -2.0]).double(), torch.tensor([0.5, -3.0]).to(torch.float8_e4m3fn)
    save_file({**load_file(checkpoint / WEIGHTS), "wide": wide, "narrow": narrow}, checkpoint / WEIGHTS)
    opened = Checkpoint.open(checkpoint)
    assert np.array_equal(opened.read("wide"), wide.float().numpy())
    assert np.array_equal(opened.read_stored("narrow"), narrow.view(torch.uint8).numpy())
    with pytest.raises(CheckpointError, match="'narrow' holds F8_E4M3"):
        opened.read("narrow")


def test_the_writer_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    rng, file = np.random.default_rng(0), tmp_path / WEIGHTS
    values: dict[str, Any] = {
        "odd halves": rng.normal(size=(3, 5)).astype(np.float16),
        "bits": rng.integers(0, 2**16, size=7, dtype=np.uint16),
        "codes": rng.integers(-(2**31), 2**31, size=(2, 3), dtype=np.int32),
        "bytes": rng.integers(0, 255, size=3, dtype=np.uint8),
        "empty": np.empty((0, 4), np.float32),
    }
    types = {"odd halves": "F16", "bits": "BF16", "codes": "I32", "bytes": "U8", "empty": "F32"}
    specs = {name: TensorSpec(types[name], v.shape) for name, v in values.items()}
    with SafetensorsWriter(file, specs) as writer:
        for name, value in values.items():
            if name == "odd halves":
                writer.write(name, value[1:], start=1)
                value = value[:1]
            writer.write(name, value)
    read = load_file(file)
    assert set(read) == set(values)
    for name, value in values.items():
        got = read[name].view(torch.uint16) if name == "bits" else read[name]
        assert np.array_equal(got.numpy(), value)
    for info in tensors_of_file(file):
        assert info.size == 0 or info.offset % (info.n_bytes // info.size) == 0, "unaligned"


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("F16", (2,)), "b": TensorSpec("I8", (1,))}
    with (
        pytest.raises(ValueError, match="b was not written, or not once"),
        SafetensorsWriter(tmp_path / "1", specs) as file,
    ):
        file.write("a", np.zeros(2, np.float16))
    for wrong in (np.zeros(2, np.float32), np.zeros(3, np.float16)):
        name = f"{wrong.dtype}-{wrong.size}"
        with (
            pytest.raises(ValueError, match="announced F16"),
            SafetensorsWriter(tmp_path / name, specs) as file,
        ):
            file.write("a", wrong)


def test_shards_hold_the_same_tensors(original: Path, checkpoint: Path) -> None:
    shard(checkpoint)
    whole, sharded = Checkpoint.open(original), Checkpoint.open(checkpoint)
    assert set(whole.tensors) == set(sharded.tensors)
    for name in whole.tensors:
        assert np.array_equal(whole.read(name), sharded.read(name))


def test_a_single_file_wins_over_an_index_as_in_transformers(checkpoint: Path) -> None:
    write_index(checkpoint, {"stale": "model-00001-of-00002.safetensors"})
    assert "stale" not in Checkpoint.open(checkpoint).tensors


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", "", "a\0b", "x" * 300]
)
def test_shard_names_are_plain_file_names_that_exist(checkpoint: Path, name: str) -> None:
    weight_map = shard(checkpoint)
    write_index(checkpoint, {**weight_map, "extra": name})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 5}, "text"])
def test_an_index_without_a_usable_map_is_refused(checkpoint: Path, weight_map: object) -> None:
    shard(checkpoint)
    write_index(checkpoint, weight_map)
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        Checkpoint.open(checkpoint)


def test_shards_that_disagree_with_their_index_are_refused(checkpoint: Path) -> None:
    weight_map = shard(checkpoint)
    first, second = sorted(set(weight_map.values()))
    name = next(iter(weight_map))
    write_index(checkpoint, {**weight_map, "lm_head.bias": first})
    with pytest.raises(CheckpointError, match=r"'lm_head\.bias' is not in"):
        Checkpoint.open(checkpoint)
    write_index(checkpoint, {**weight_map, name: second})
    with pytest.raises(CheckpointError, match="is not in"):
        Checkpoint.open(checkpoint)
    write_index(checkpoint, weight_map)
    save_file({**load_file(checkpoint / second), name: torch.zeros(2)}, checkpoint / second)
    with pytest.raises(CheckpointError, match=f"is in {first} and in {second}"):
        Checkpoint.open(checkpoint)
    (checkpoint / second).unlink()
    with pytest.raises(CheckpointError, match=f"no {second}"):
        Checkpoint.open(checkpoint)


def test_pickled_weights_are_never_read(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*never pickled"):
        Checkpoint.open(checkpoint)

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path.touch, (checkpoint / "exploded",))

    (checkpoint / WEIGHTS).write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(checkpoint)
    assert not (checkpoint / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 3, 8, 100, -1, -5000])
def test_truncated_weights_are_refused(checkpoint: Path, kept: int) -> None:
    file = checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    assert not safetensors_opens(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated|damaged)"):
        Checkpoint.open(checkpoint)


def test_weights_cut_after_opening_are_noticed(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    last = max(opened.tensors.values(), key=lambda info: info.offset)
    last.file.write_bytes(last.file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        opened.read(last.name)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 10**9])
def test_a_huge_header_length_is_refused_without_memory(checkpoint: Path, length: int) -> None:
    file = checkpoint / WEIGHTS
    with file.open("r+b") as handle:
        handle.write(length.to_bytes(8, "little"))
        handle.truncate(2 * 10**9)  # sparse: the length alone does not refuse it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(checkpoint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    file.unlink()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"\xff" * 20,
        b'{"a": ' + b"[" * 50_000,
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_is_refused(checkpoint: Path, header: bytes) -> None:
    write_weights(checkpoint / WEIGHTS, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "I64", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [10**30, 10**30 + 8]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]},
    ],
    ids=str,
)
def test_a_damaged_header_entry_is_refused(checkpoint: Path, entry: object) -> None:
    write_weights(checkpoint / WEIGHTS, {"a": entry}, b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize(
    ("second", "n_bytes"),
    [((0, 8), 8), ((4, 12), 12), ((12, 20), 20), ((8, 16), 24), ((8, 16), 15)],
    ids=["same", "overlap", "gap", "surplus", "short"],
)
def test_overlaps_and_gaps_are_refused_as_by_safetensors(
    checkpoint: Path, second: tuple[int, int], n_bytes: int
) -> None:
    file = checkpoint / WEIGHTS
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": list(second)},
    }
    write_weights(file, header, b"\0" * n_bytes)
    assert not safetensors_opens(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(checkpoint)


def test_no_tensors_at_all_is_refused(checkpoint: Path) -> None:
    write_weights(checkpoint / WEIGHTS, {"__metadata__": {"format": "pt"}}, b"")
    with pytest.raises(CheckpointError, match="no tensors"):
        Checkpoint.open(checkpoint)


def test_a_missing_tensor_is_named(original: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight'.*incomplete"):
        Checkpoint.open(original).read("lm_head.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "'llava' is not supported"),
        ({"model_type": None}, "not supported"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"text_config": []}, "text_config is missing"),
    ],
)
def test_other_architectures_are_refused(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(checkpoint)


def test_missing_and_damaged_parts_are_named(checkpoint: Path, tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), checkpoint / "config.json"):
        with pytest.raises(CheckpointError, match="no such checkpoint directory"):
            Checkpoint.open(source)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    (checkpoint / "config.json").write_text('{"model_type": "qwen3_5"')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        Checkpoint.open(checkpoint)


def test_a_name_of_the_hub_is_resolved_by_the_hub(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert all(pattern.endswith((".json", ".safetensors")) for pattern in allow_patterns)
        if name == "owner/none":
            raise ConnectionError("offline")
        return str(original)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert Checkpoint.open("owner/model").path == original
    with pytest.raises(CheckpointError, match=r"owner/none: neither a directory here nor .*offline"):
        Checkpoint.open("owner/none")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Checkpoint.open("a/longer/path")
    assert asked == ["owner/model", "owner/none"]


def test_the_contract_must_have_the_patches_of_the_model(checkpoint: Path) -> None:
    assert Checkpoint.open(checkpoint).contract() == small_contract(patch=8)
    for change in ({"patch_size": 16}, {"merge_size": 1}, {"temporal_patch_size": 1}):
        image = dataclasses.replace(small_contract(patch=8).image, max_pixels=10**6, **change)
        ScoreContract.default(image).save(checkpoint)
        with pytest.raises(CheckpointError, match=f"image.{next(iter(change))} is"):
            Checkpoint.open(checkpoint).contract()
    (checkpoint / "contract.json").unlink()
    with pytest.raises(ContractError, match="no score contract"):
        Checkpoint.open(checkpoint).contract()


def test_the_default_image_budget_is_64_to_1024_tokens(original: Path) -> None:
    spec = Checkpoint.open(original).default_image_spec()
    assert spec == ImageSpec(patch_size=8, min_pixels=64 * 16**2, max_pixels=1024 * 16**2)


@pytest.mark.parametrize("value", [None, 0, -8, "8", 8.0, True])
def test_a_vision_config_without_usable_patches_is_refused(checkpoint: Path, value: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["patch_size"] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vision_config\.patch_size is"):
        Checkpoint.open(checkpoint).contract()

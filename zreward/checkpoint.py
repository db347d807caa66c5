"""A checkpoint directory: config, tokenizer, score contract and safetensors weights, read in pieces.

Weights are read with plain file reads at the offsets that the safetensors header gives, a few rows at a
time where asked for, and never mapped: mapped pages stay resident, and an export of a 9B checkpoint
would then need as much memory as the checkpoint. Format: https://github.com/huggingface/safetensors
(8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from zreward.contract import CONTRACT_FILE, ScoreContract
from zreward.errors import CheckpointError
from zreward.image import ImageSpec
from zreward.jsonfile import parse_json_object, read_json_object

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
SUPPORTED_MODEL_TYPES = ("qwen3_5",)

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is the safetensors name (F32, F16, BF16), `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.size * _STORED_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; no weight is read before it is asked for.

    Attributes:
        path: the directory.
        config: the parsed `config.json`.
        tensors: every tensor by its name in the weights.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @staticmethod
    def open(source: str | Path) -> Checkpoint:
        """Open a directory, or a model of the Hugging Face hub by its `owner/name`.

        Raises:
            CheckpointError: the directory, config or weights are missing, damaged, or of an
                architecture that is not supported.
        """
        path = _resolve(source)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint directory")
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path}: no {CONFIG_FILE}; expected a checkpoint saved by transformers")
        config = read_json_object(path / CONFIG_FILE, CheckpointError)
        if config.get("model_type") not in SUPPORTED_MODEL_TYPES:
            raise CheckpointError(
                f"{path / CONFIG_FILE}: model_type {config.get('model_type')!r} is not supported; "
                f"zreward works with {', '.join(SUPPORTED_MODEL_TYPES)} (dense Qwen3.5 with vision)"
            )
        for section in ("text_config", "vision_config"):
            if not isinstance(config.get(section), dict):
                raise CheckpointError(
                    f"{path / CONFIG_FILE}: {section} is missing; is this a text-only model?"
                )
        return Checkpoint(path, config, _index_tensors(path))

    @property
    def text_config(self) -> Mapping[str, Any]:
        return dict(self.config["text_config"])

    @property
    def vision_config(self) -> Mapping[str, Any]:
        return dict(self.config["vision_config"])

    @property
    def n_parameters(self) -> int:
        return sum(info.size for info in self.tensors.values())

    def contract(self) -> ScoreContract:
        """The `contract.json` beside the weights, checked against the model's patches."""
        contract = ScoreContract.load(self.path)
        expected, image = self.default_image_spec(), contract.image
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if getattr(image, name) != getattr(expected, name):
                raise CheckpointError(
                    f"{self.path / CONTRACT_FILE}: image.{name} is {getattr(image, name)}, but the model in "
                    f"{CONFIG_FILE} has {getattr(expected, name)}"
                )
        return contract

    def default_image_spec(self) -> ImageSpec:
        """The model's patches with the default budget of 64 to 1,024 tokens."""
        patch, merge, frames = (
            self._vision_size(name) for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")
        )
        token_pixels = (patch * merge) ** 2
        return ImageSpec(
            patch_size=patch,
            merge_size=merge,
            temporal_patch_size=frames,
            min_pixels=64 * token_pixels,
            max_pixels=1024 * token_pixels,
        )

    def _vision_size(self, name: str) -> int:
        value = self.vision_config.get(name)
        if not _is_count(value) or value < 1:
            raise CheckpointError(
                f"{self.path / CONFIG_FILE}: vision_config.{name} is {value!r}; expected a whole number of "
                "at least 1"
            )
        return value

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: the weights lack the tensor {name!r}; the checkpoint is incomplete"
            )
        return self.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows `start` to `stop` of a tensor as float32, [stop − start, …].

        Raises:
            CheckpointError: no such tensor, no such rows, or the file ends inside it.
        """
        info = self.info(name)
        return float32_from_stored(self.read_stored(name, start, stop), info.dtype)

    def read_stored(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Like `read`, in the stored type; bfloat16 comes as its uint16 bits."""
        info = self.info(name)
        dtype = _STORED_DTYPES[info.dtype]
        rows = info.shape[0] if info.shape else 1
        stop = rows if stop is None else min(stop, rows)
        if not 0 <= start <= stop:
            raise CheckpointError(f"{info.file}: tensor {name!r} has {rows} rows, not {start} to {stop}")
        row_size = info.size // rows if rows else 0
        count = (stop - start) * row_size
        with info.file.open("rb") as file:
            file.seek(info.offset + start * row_size * dtype.itemsize)
            data = file.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise CheckpointError(
                f"{info.file}: ends inside tensor {name!r}; the file is truncated, copy it again"
            )
        values = np.frombuffer(data, dtype=dtype)
        return values.reshape((stop - start, *info.shape[1:]) if info.shape else ())


def float32_from_stored(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Float32 values of an array in a stored type (F32, F16, or BF16 as uint16 bits)."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _resolve(source: str | Path) -> Path:
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return path
    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: no network, no such model, gated
        raise CheckpointError(
            f"{source}: neither a directory here nor a model that the hub gave ({type(error).__name__}: {error})"
        ) from None


def _index_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the single weights file or, as in transformers only where there is none, the shards."""
    single, index = path / WEIGHTS_FILE, path / WEIGHTS_INDEX_FILE
    if single.is_file() or not index.is_file():
        tensors = _read_headers(path, [WEIGHTS_FILE])
    else:
        weight_map = _read_weight_map(index)
        tensors = _read_headers(path, sorted(set(weight_map.values())))
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise CheckpointError(
                    f"{index}: tensor {name!r} is not in {shard}; copy the checkpoint again"
                )
    if not tensors:
        raise CheckpointError(f"{path}: the weights hold no tensors")
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: no usable weight_map")
    for shard in weight_map.values():
        if not re.fullmatch(r"\w[\w.-]{0,254}", shard, re.ASCII):
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name")
    return weight_map


def _read_headers(path: Path, file_names: list[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file_name in file_names:
        file = path / file_name
        if not file.is_file():
            raise CheckpointError(
                f"{path}: no {file_name}; zreward reads safetensors only (`save_pretrained` writes them), "
                "never pickled weights"
            )
        for info in _read_header(file):
            if info.name in tensors:
                other = tensors[info.name].file.name
                raise CheckpointError(f"{path}: tensor {info.name!r} is in {other} and in {file_name}")
            tensors[info.name] = info
    return tensors


def _read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one file, in the order of their data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: not a safetensors file, or truncated; copy it again")
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        header = parse_json_object(raw.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged safetensors header ({error})") from None
    header.pop("__metadata__", None)
    tensors = [_tensor_info(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.n_bytes))
    _check_layout(file, tensors, 8 + length, size)
    return tensors


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: damaged header entry of tensor {name!r}") from None
    if not isinstance(dtype, str) or dtype not in _STORED_DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the type {dtype!r}, which is not supported; "
            f"save the weights as one of {', '.join(_STORED_DTYPES)}"
        )
    if not isinstance(shape, list) or not all(_is_count(n) for n in (*shape, begin, end)):
        raise CheckpointError(f"{file}: tensor {name!r} has a damaged shape or data_offsets")
    info = TensorInfo(name, dtype, tuple(shape), file, base + begin)
    if end - begin != info.n_bytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} spans {end - begin} bytes, its shape needs {info.n_bytes}"
        )
    return info


def _check_layout(file: Path, tensors: list[TensorInfo], base: int, file_size: int) -> None:
    """The tensors must fill the file without gap or overlap, as the format demands."""
    end = base
    for info in tensors:
        if info.offset != end:
            raise CheckpointError(
                f"{file}: the data of tensor {info.name!r} overlaps its neighbour or leaves a gap; "
                "save the weights again"
            )
        end += info.n_bytes
    if end > file_size:
        raise CheckpointError(f"{file}: ends inside its last tensors; the file is truncated, copy it again")
    if end < file_size:
        raise CheckpointError(
            f"{file}: {file_size - end} bytes after the last tensor; save the weights again"
        )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

"""A checkpoint directory: config, tokenizer, score contract and safetensors weights.

Opening it reads configuration and headers. Weights are read when they are asked for, whole or a few rows
at a time, by `zreward.safetensors_file`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.contract import CONTRACT_FILE, ScoreContract
from zreward.errors import CheckpointError
from zreward.image import ImageSpec
from zreward.jsonfile import read_json_object
from zreward.safetensors_file import (
    TensorInfo,
    float32_from_stored,
    is_count,
    read_stored,
    tensors_of_file,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
SUPPORTED_MODEL_TYPES = ("qwen3_5",)


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
        if not is_count(value) or value < 1:
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
            CheckpointError: no such tensor, no such rows, the file ends inside it, or it holds codes of a
                quantized checkpoint.
        """
        info = self.info(name)
        if not info.is_float:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} holds {info.dtype}, which is no weight by itself; is this a "
                "quantized checkpoint whose config.json lacks its quantization_config?"
            )
        return float32_from_stored(self.read_stored(name, start, stop), info.dtype)

    def read_stored(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Like `read`, in the stored type, whatever it is; bfloat16 comes as its uint16 bits."""
        return read_stored(self.info(name), start, stop)


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
        for info in tensors_of_file(file):
            if info.name in tensors:
                other = tensors[info.name].file.name
                raise CheckpointError(f"{path}: tensor {info.name!r} is in {other} and in {file_name}")
            tensors[info.name] = info
    return tensors

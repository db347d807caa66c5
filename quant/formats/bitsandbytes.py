"""Checkpoints that transformers saved from a model loaded with bitsandbytes: NF4, FP4 and LLM.int8.

4 bits: `L.weight` holds the codes of the flattened [out, in] matrix, two a byte, the earlier in the high half.
`L.weight.quant_map` is the table of 16 values, `L.weight.absmax` the scale of each block of consecutive elements,
and `L.weight.quant_state.bitsandbytes__nf4` (or fp4) a JSON text as bytes: block size, shape and type. With double
quantization `absmax` is uint8 itself: absmax[b] = nested_quant_map[code[b]] · nested_absmax[b // nested_blocksize] +
nested_offset.

8 bits: `L.weight` is int8 [out, in] and `L.SCB` float32 [out]; W[o, i] = weight[o, i] · SCB[o] / 127. The scales are
float32 values, not float16 as elsewhere. bitsandbytes also quantizes the activations while it runs, but for columns
above a threshold; that is not part of the checkpoint, and a product with float activations is closer to the original.

bitsandbytes quantizes every linear layer but the language head, so also the small ones that zreward keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError
from zreward.jsonfile import parse_json_object
from zreward.quant.formats.summary import origin_summary
from zreward.quant.tensor import CodebookFormat, CodebookWeight, QuantizedWeight, WeightFormat
from zreward.safetensors_file import TensorInfo, is_count

_STATE = ".quant_state.bitsandbytes__"
_INT8 = WeightFormat(bits=8, scale_bits=32)


class BitsandbytesWeights:
    """The quantized matrices of a bitsandbytes checkpoint; see `zreward.quant.source.QuantizedWeights`."""

    def __init__(self, checkpoint: Checkpoint, layers: Mapping[str, _Layer]) -> None:
        self._checkpoint = checkpoint
        self._layers = layers

    @staticmethod
    def open(checkpoint: Checkpoint) -> BitsandbytesWeights:
        """Check every quantized matrix of `checkpoint`; reads its scales, not its codes.

        Raises:
            CheckpointError: a tensor is missing, of a wrong type or shape, or holds values that cannot be.
        """
        names = [
            name
            for name, info in checkpoint.tensors.items()
            if name.endswith(".weight") and not info.is_float
        ]
        if not names:
            raise CheckpointError(
                f"{checkpoint.path}: config.json says bitsandbytes, but no weight is stored in 4 or 8 bits; the "
                "weights are not quantized"
            )
        layers = {name: _open_layer(checkpoint, name) for name in names}
        for name, layer in layers.items():
            _read_scales(checkpoint, name, layer)
        return BitsandbytesWeights(checkpoint, layers)

    @property
    def formats(self) -> Mapping[str, WeightFormat | CodebookFormat]:
        return {name: layer.format for name, layer in self._layers.items()}

    def shape(self, name: str) -> tuple[int, int]:
        return self._layers[name].shape

    def weight(self, name: str) -> QuantizedWeight | CodebookWeight:
        layer = self._layers[name]
        scales, stored = _read_scales(self._checkpoint, name, layer), self._checkpoint.read_stored(name)
        if isinstance(layer.format, WeightFormat):
            return _int8_weight(stored, scales)
        pairs = stored.reshape(-1)
        codes = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[: layer.size].reshape(layer.shape)
        table = self._checkpoint.read(f"{name}.quant_map")
        return CodebookWeight(layer.format, codes, scales, table)

    def input_scale(self, name: str) -> float | None:
        return None

    def summary(self) -> dict[str, Any]:
        """For the manifest; see `origin_summary`."""
        tensors = self._checkpoint.tensors
        floats = sorted(set(tensors) - set(packed_names(tensors)))
        shapes = {name: layer.shape for name, layer in self._layers.items()}
        return origin_summary("bitsandbytes", self.formats, shapes, floats)


def packed_names(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors that are part of a matrix of 4 or 8 bits, or describe it."""
    return [
        name
        for name, info in tensors.items()
        if (name.endswith(".weight") and not info.is_float)
        or name.endswith((".SCB", ".weight_format"))
        or ".weight." in name
    ]


@dataclass(frozen=True)
class _Layer:
    """One quantized matrix, (out, in). `nested` has block size and offset of doubly quantized scales."""

    format: WeightFormat | CodebookFormat
    shape: tuple[int, int]
    nested: tuple[int, float] | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def _open_layer(checkpoint: Checkpoint, name: str) -> _Layer:
    info = checkpoint.info(name)
    if info.dtype == "I8":
        if len(info.shape) != 2:
            raise CheckpointError(f"{info.file}: {name} is I8 {list(info.shape)}; expected a matrix")
        _expect(checkpoint, f"{name.removesuffix('.weight')}.SCB", info.shape[0])
        return _Layer(_INT8, (info.shape[0], info.shape[1]))
    kinds = [kind for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in checkpoint.tensors]
    if info.dtype != "U8" or not kinds:
        raise CheckpointError(
            f"{info.file}: {name} is {info.dtype} without its {_STATE[1:]}nf4 (or fp4); the checkpoint is "
            "incomplete, or quantized by something else than bitsandbytes"
        )
    state = _state(checkpoint, f"{name}{_STATE}{kinds[0]}")
    out, inputs = state["shape"]
    layer = _Layer(CodebookFormat(kinds[0], state["blocksize"]), (out, inputs), state["nested"])
    blocks = -(-layer.size // state["blocksize"])
    _expect(checkpoint, name, -(-layer.size // 2))
    _expect(checkpoint, f"{name}.absmax", blocks, is_float=layer.nested is None)
    _expect(checkpoint, f"{name}.quant_map", 16)
    if layer.nested:
        _expect(checkpoint, f"{name}.nested_absmax", -(-blocks // layer.nested[0]))
        _expect(checkpoint, f"{name}.nested_quant_map", 256)
    return layer


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Block size, shape and nested constants from the JSON text of a quant_state."""
    where = f"{checkpoint.info(name).file}: {name}"
    try:
        state = parse_json_object(checkpoint.read_stored(name).tobytes().decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{where} is not a quantization state ({error})") from None
    shape, block, nested = state.get("shape"), state.get("blocksize"), None
    sizes = [*shape, block] if isinstance(shape, list) and len(shape) == 2 else [None]
    if "nested_blocksize" in state:
        nested = (state["nested_blocksize"], state.get("nested_offset"))
        sizes.append(nested[0])
        if not isinstance(nested[1], int | float):
            raise CheckpointError(f"{where} has no usable nested_offset: {json.dumps(nested[1])}")
    if not all(is_count(size) and size for size in sizes):
        raise CheckpointError(
            f"{where} has no usable sizes (shape {json.dumps(shape)}, block size {json.dumps(block)}); expected "
            "a matrix"
        )
    return {"shape": shape, "blocksize": block, "nested": nested}


def _expect(checkpoint: Checkpoint, name: str, size: int, is_float: bool | None = None) -> None:
    """The tensor must have `size` elements and be stored as floats, or not, where `is_float` says so."""
    info = checkpoint.info(name)
    if info.size != size or is_float not in (None, info.is_float):
        raise CheckpointError(
            f"{info.file}: {name} is {info.dtype} {list(info.shape)}; expected {size} elements"
            f"{'' if is_float is None else ' of floats' if is_float else ' of bytes'}; it is damaged"
        )


def _read_scales(checkpoint: Checkpoint, name: str, layer: _Layer) -> NDArray[np.float32]:
    """Scales of the rows or blocks, float32; doubly quantized ones resolved."""
    if isinstance(layer.format, WeightFormat):
        where = f"{name.removesuffix('.weight')}.SCB"
        scales = checkpoint.read(where).reshape(-1) / np.float32(127)
    elif layer.nested is None:
        where = f"{name}.absmax"
        scales = checkpoint.read(where).reshape(-1)
    else:
        where = f"{name}.nested_absmax"
        block, offset = layer.nested
        codes = checkpoint.read_stored(f"{name}.absmax").reshape(-1)
        values = checkpoint.read(f"{name}.nested_quant_map").reshape(-1)[codes]
        per_block = np.repeat(checkpoint.read(where).reshape(-1), block)[: codes.size]
        scales = values * per_block + np.float32(offset)
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise CheckpointError(
            f"{checkpoint.path}: {where} gives scales that are negative or not finite; the checkpoint is damaged"
        )
    return scales


def _int8_weight(stored: NDArray[np.int8], scales: NDArray[np.float32]) -> QuantizedWeight:
    codes = (stored.astype(np.int16) + _INT8.middle).astype(np.uint8)
    dead = scales == 0  # rows of zeros
    codes[dead] = _INT8.middle
    positive = np.where(dead, np.float32(1), scales)[:, None]
    return QuantizedWeight(_INT8, codes, positive, np.full(positive.shape, _INT8.middle, dtype=np.uint8))

"""Quantized weights between quantization and lowering: one safetensors file a matrix, and an index.

    index.json          scheme, method, and per matrix its file, format, shape and figures
    00000.safetensors   codes (uint8 [out, in], or [out, in/2] with the earlier input in the low half of a byte
                        for 4 bits), scales (float16 [out, groups]), zeros (uint8 [out, groups], if asymmetric)
    floats.safetensors  float32 tensors that replace the checkpoint's, where scales were folded into them

Written matrix by matrix, so that quantization holds one at a time; read the same way by the export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json
from zreward.quant.scheme import format_name
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import QuantizedWeight, WeightFormat
from zreward.safetensors_file import TensorInfo, read_stored, tensors_of_file

if TYPE_CHECKING:
    from zreward.quant.folding import Smoothing

INDEX_FILE, FLOATS_FILE = "index.json", "floats.safetensors"


@dataclass(frozen=True)
class InputFacts:
    """See `StoredLayer.inputs`."""

    smoothing: float
    row_ratio: float
    tensor_error: float
    row_error: float
    smoothed_error: float


@dataclass(frozen=True)
class StoredLayer:
    """One quantized matrix.

    Attributes:
        name: of its tensor in the checkpoint.
        file: in the store.
        shape: (out, in).
        format: bits, groups, symmetry, activations.
        error: relative error of the weights, ‖W − Q‖ / ‖W‖.
        sensitivity: mean KL in nats that quantizing its unit alone caused in the scores, where measured.
        inputs: where the inputs are rounded: the strength of smoothing that was chosen (0: none), how far the
            largest value stands out of the rows, and the relative squared error of inputs rounded with one scale
            for all, with one per row before smoothing, and with one per row after it.
        input_scale: of inputs that are rounded with a static scale.
    """

    name: str
    file: str
    shape: tuple[int, int]
    format: WeightFormat
    error: float
    sensitivity: float | None = None
    inputs: InputFacts | None = None
    input_scale: float | None = None


@dataclass(frozen=True)
class Index:
    """What the store holds: `kept` says why every other tensor of the checkpoint stays as it is."""

    scheme: str
    method: str
    layers: tuple[StoredLayer, ...]
    kept: Mapping[str, str]


class StoreWriter:
    """Writes a store into an existing, empty directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._layers: list[StoredLayer] = []
        self._floats: dict[str, NDArray[np.float32]] = {}
        self._inputs: dict[str, InputFacts] = {}

    def add(
        self,
        name: str,
        weight: QuantizedWeight,
        error: float,
        sensitivity: float | None = None,
        input_scale: float | None = None,
    ) -> None:
        """Write one matrix; for the figures see `StoredLayer`."""
        file = f"{len(self._layers):05d}.safetensors"
        codes = weight.codes
        if weight.format.bits == 4:
            codes = (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
        scales = weight.scales.astype(np.float16)
        if not np.array_equal(scales.astype(np.float32), weight.scales):
            raise QuantizationError(f"{name}: its scales are not float16 values")
        tensors: dict[str, NDArray[Any]] = {"codes": np.ascontiguousarray(codes), "scales": scales}
        if not weight.format.symmetric:
            tensors["zeros"] = weight.zeros
        save_file(tensors, self.path / file)
        facts = self._inputs.get(name)
        self._layers.append(
            StoredLayer(name, file, weight.shape, weight.format, error, sensitivity, facts, input_scale)
        )

    def describe_inputs(self, names: Iterable[str], found: Smoothing) -> None:
        """Remember how the inputs of some layers are rounded; before they are added."""
        before, after = found.before, found.after
        facts = InputFacts(
            found.alpha, before.row_ratio, before.tensor_error, before.row_error, after.row_error
        )
        self._inputs |= dict.fromkeys(names, facts)

    def replace(self, name: str, values: NDArray[np.float32]) -> None:
        """Let `values` take the place of a float tensor of the checkpoint."""
        self._floats[name] = np.ascontiguousarray(values, dtype=np.float32)

    def finish(self, scheme: str, method: str, kept: Mapping[str, str]) -> None:
        """Write the index; the store is complete with it."""
        if self._floats:
            save_file(self._floats, self.path / FLOATS_FILE)
        index = Index(scheme, method, tuple(self._layers), kept)
        write_json(self.path / INDEX_FILE, dataclasses.asdict(index))


class StoredWeights:
    """The quantized matrices of a store; see `QuantizedWeights`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = read_json_object(path / INDEX_FILE, QuantizationError)
        self.index = dataclass_from_json(Index, data, str(path / INDEX_FILE), QuantizationError)
        self._layers = {layer.name: layer for layer in self.index.layers}

    @property
    def formats(self) -> Mapping[str, WeightFormat]:
        return {name: layer.format for name, layer in self._layers.items()}

    def shape(self, name: str) -> tuple[int, int]:
        return self._layers[name].shape

    def input_scale(self, name: str) -> float | None:
        return self._layers[name].input_scale

    def weight(self, name: str) -> QuantizedWeight:
        layer = self._layers[name]
        stored = {info.name: read_stored(info) for info in tensors_of_file(self.path / layer.file)}
        codes, scales = stored["codes"], stored["scales"].astype(np.float32)
        if layer.format.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(layer.shape)
        zeros = stored.get("zeros")
        if zeros is None:
            zeros = np.full(scales.shape, layer.format.middle, dtype=np.uint8)
        return QuantizedWeight(layer.format, codes, scales, zeros)

    def summary(self) -> dict[str, Any]:
        """For the manifest: scheme, method, the format of each matrix, what is kept and why, bits a weight."""
        layers = {
            layer.name.removesuffix(".weight"): {
                "format": format_name(layer.format),
                "bits": layer.format.bits_per_weight(layer.shape[1]),
                "shape": list(layer.shape),
                "error": layer.error,
                **({} if layer.inputs is None else {"inputs": dataclasses.asdict(layer.inputs)}),
                **({} if layer.sensitivity is None else {"sensitivity": layer.sensitivity}),
                **({} if layer.input_scale is None else {"input_scale": layer.input_scale}),
            }
            for layer in self.index.layers
        }
        return {
            "scheme": self.index.scheme,
            "method": self.index.method,
            "bits_per_weight": bits_per_weight(self.formats, {n: self.shape(n) for n in self.formats}),
            "layers": layers,
            "kept": dict(self.index.kept),
        }


def bits_per_weight(formats: Mapping[str, WeightFormat], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Stored bits per quantized weight, scales and zero points included."""
    sizes = {name: shapes[name][0] * shapes[name][1] for name in formats}
    bits = sum(formats[name].bits_per_weight(shapes[name][1]) * size for name, size in sizes.items())
    return bits / sum(sizes.values())


def open_store(checkpoint: Checkpoint, path: Path) -> QuantizedCheckpoint:
    """`checkpoint` with the quantized matrices and the replaced tensors of the store at `path`."""
    floats: dict[str, TensorInfo] = {}
    if (path / FLOATS_FILE).is_file():
        floats = {info.name: info for info in tensors_of_file(path / FLOATS_FILE)}
    tensors = {**checkpoint.tensors, **floats}
    return QuantizedCheckpoint(checkpoint.path, checkpoint.config, tensors, StoredWeights(path))

"""Checkpoints in the format of GPTQ, which AutoGPTQ, gptqmodel, transformers and auto-round write.

Nothing is rounded on the way: the `QuantizedWeight` of a matrix says what the file says. Groups that a
`WeightFormat` cannot have are cut into smaller ones of the same scale, and a negative scale, which auto-round
writes, becomes a positive one with codes and zero point counted from the other end. `gptq_layout` describes the
tensors, `gptq_writer` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError, QuantizationError
from zreward.quant.formats.gptq_layout import SUFFIXES, VERSIONS, n_words, unpack_rows, unpack_zeros
from zreward.quant.formats.summary import origin_summary
from zreward.quant.tensor import BITS, QuantizedWeight, WeightFormat
from zreward.safetensors_file import TensorInfo, is_count

_MAX_GROUP = 256


class GptqWeights:
    """The quantized matrices of a GPTQ checkpoint; see `zreward.quant.source.QuantizedWeights`."""

    def __init__(self, reader: _Reader, layers: Mapping[str, _Layer]) -> None:
        self._reader = reader
        self._layers = layers

    @staticmethod
    def open(checkpoint: Checkpoint, config: Mapping[str, Any]) -> GptqWeights:
        """Check every quantized matrix of `checkpoint`; reads its scales and zero points, not its codes.

        Args:
            checkpoint: opened as it is, with the packed tensors.
            config: its quantization_config. It tells the version and, where there is no g_idx, the group size;
                everything else, also what `dynamic` sets module by module, is in the tensors.

        Raises:
            CheckpointError: a tensor is missing, of a wrong type or shape, or holds values that cannot be.
            QuantizationError: a version, bits, packing or groups that zreward does not read.
        """
        reader = _Reader(checkpoint, *_checked_config(checkpoint, config))
        names = sorted({name.rpartition(".")[0] for name in packed_names(checkpoint.tensors)})
        if not names:
            raise CheckpointError(
                f"{checkpoint.path}: config.json says GPTQ, but no tensor is named ….qweight; the weights are "
                "incomplete, or not quantized"
            )
        return GptqWeights(reader, {f"{name}.weight": reader.layer(name) for name in names})

    @property
    def formats(self) -> Mapping[str, WeightFormat]:
        return {name: layer.format for name, layer in self._layers.items()}

    def shape(self, name: str) -> tuple[int, int]:
        return self._layers[name].shape

    def weight(self, name: str) -> QuantizedWeight:
        return self._reader.weight(self._layers[name])

    def input_scale(self, name: str) -> float | None:
        return None

    def summary(self) -> dict[str, Any]:
        """For the manifest; see `origin_summary`."""
        tensors = self._reader.checkpoint.tensors
        floats = sorted(set(tensors) - set(packed_names(tensors)))
        shapes = {name: layer.shape for name, layer in self._layers.items()}
        return origin_summary("gptq", self.formats, shapes, floats)


def packed_names(tensors: Iterable[str]) -> list[str]:
    """The tensors that are part of a GPTQ matrix."""
    return [name for name in tensors if name.rpartition(".")[2] in SUFFIXES]


@dataclass(frozen=True)
class _Layer:
    """One quantized matrix, (out, in), checked when the checkpoint was opened."""

    name: str
    format: WeightFormat
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Grouping:
    """How the inputs of a matrix share scales.

    Attributes:
        order: inputs sorted by group, int64 [in]; None where they are sorted already.
        sizes: inputs of each group of the file.
        size: of the equal groups that they are cut into; 0: one group.
    """

    order: NDArray[np.int64] | None
    sizes: NDArray[np.int64]
    size: int

    @staticmethod
    def from_indices(g_idx: NDArray[np.int64], n_groups: int, where: str) -> _Grouping:
        sizes = np.bincount(g_idx, minlength=n_groups)
        common = int(np.gcd.reduce(sizes))
        size = 0 if n_groups == 1 else min(common & -common, _MAX_GROUP)
        if 0 < size < 16:
            raise QuantizationError(
                f"{where}: groups of {int(sizes.min())} to {int(sizes.max())} inputs cannot be cut into equal "
                "groups of 16 or more; quantize the original with a group size of 16 or more"
            )
        is_sorted = bool(np.all(np.diff(g_idx) >= 0))
        return _Grouping(None if is_sorted else np.argsort(g_idx, kind="stable"), sizes, size)

    def per_output(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values [groups of the file, out] as [out, groups of the format]."""
        cut = np.repeat(values, self.sizes // self.size, axis=0) if self.size else values
        return np.array(cut.T, order="C")


@dataclass(frozen=True)
class _Reader:
    """Reads matrices by their name without ".weight"."""

    checkpoint: Checkpoint
    version: str
    group_size: int

    def layer(self, name: str) -> _Layer:
        """Check the tensors of one matrix against each other, and their small values."""
        bits, shape = self._bits_and_shape(name)
        scales, zeros, grouping = self._groups(name, bits, shape)
        symmetric = bool((zeros == 2 ** (bits - 1)).all() and (scales >= 0).all())
        chosen = WeightFormat(bits, grouping.size, symmetric, act_order=grouping.order is not None)
        return _Layer(name, chosen, shape)

    def weight(self, layer: _Layer) -> QuantizedWeight:
        bits, inputs = layer.format.bits, layer.shape[1]
        file_scales, file_zeros, grouping = self._groups(layer.name, bits, layer.shape)
        words = self.checkpoint.read_stored(f"{layer.name}.qweight")
        codes = unpack_rows(words, bits)[:inputs]
        codes = np.ascontiguousarray((codes if grouping.order is None else codes[grouping.order]).T)
        scales, zeros = grouping.per_output(file_scales), grouping.per_output(file_zeros)
        grouped, turned, dead = codes.reshape(*scales.shape, -1), scales < 0, scales == 0
        if turned.any():
            zeros[turned] = layer.format.max_code - zeros[turned]
            grouped[turned] = layer.format.max_code - grouped[turned]
        if dead.any():  # every weight of the group was below what float16 holds
            grouped[dead] = zeros[dead][:, None]
            scales[dead] = 1
        return QuantizedWeight(layer.format, codes, np.abs(scales), zeros, grouping.order)

    def _groups(
        self, name: str, bits: int, shape: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], _Grouping]:
        """Scales and zero points of the file, [groups, out], and which inputs they belong to."""
        where = f"{self.checkpoint.path}: {name}"
        scales = self.checkpoint.read(f"{name}.scales")
        qzeros = self.checkpoint.read_stored(f"{name}.qzeros")
        zeros = unpack_zeros(qzeros, bits, self.version)[:, : shape[0]]
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{where}.scales holds NaN or infinity; the checkpoint is damaged")
        n_groups = scales.shape[0]
        indices = self._group_indices(name, shape[1], n_groups)
        if indices.min() < 0 or indices.max() >= n_groups:
            raise CheckpointError(f"{where}.g_idx names a group outside 0 to {n_groups - 1}; it is damaged")
        return scales, zeros, _Grouping.from_indices(indices, n_groups, where)

    def _group_indices(self, name: str, inputs: int, n_groups: int) -> NDArray[np.int64]:
        if f"{name}.g_idx" in self.checkpoint.tensors:
            return self.checkpoint.read_stored(f"{name}.g_idx").astype(np.int64)
        size = self.group_size
        if size <= 0 or math.ceil(inputs / size) != n_groups:
            size, rest = divmod(inputs, n_groups)
            if rest:
                raise CheckpointError(
                    f"{self.checkpoint.path}: {name} has no g_idx, and {n_groups} groups do not divide its "
                    f"{inputs} inputs; the checkpoint is incomplete"
                )
        return np.arange(inputs) // size

    def _bits_and_shape(self, name: str) -> tuple[int, tuple[int, int]]:
        """Bits and (out, in), which the shapes of the tensors tell together."""
        tensors, path = self.checkpoint.tensors, self.checkpoint.path
        if f"{name}.weight" in tensors:
            raise CheckpointError(f"{path}: {name} has a weight and a qweight; save the checkpoint again")
        qweight, qzeros, scales = (self._part(name, part, 2) for part in ("qweight", "qzeros", "scales"))
        n_groups, out = scales.shape
        for bits in BITS:
            inputs = qweight.shape[0] * 32 // bits
            if f"{name}.g_idx" in tensors:
                inputs = self._part(name, "g_idx", 1).size
            expected = {"qweight": (n_words(inputs, bits), out), "qzeros": (n_groups, n_words(out, bits))}
            if expected == {"qweight": qweight.shape, "qzeros": qzeros.shape} and n_groups and inputs and out:
                return bits, (out, inputs)
        found = ", ".join(
            f"{s} {list(tensors[f'{name}.{s}'].shape)}" for s in SUFFIXES if f"{name}.{s}" in tensors
        )
        raise CheckpointError(
            f"{path}: {name} is no matrix of 4 or 8 bits ({found}); other bits are not supported, or the "
            "checkpoint is damaged"
        )

    def _part(self, name: str, suffix: str, n_dimensions: int) -> TensorInfo:
        info = self.checkpoint.info(f"{name}.{suffix}")
        expected = "floats" if suffix == "scales" else "I32"
        if (info.dtype != "I32" if expected == "I32" else not info.is_float) or len(
            info.shape
        ) != n_dimensions:
            raise CheckpointError(
                f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}; expected {expected} of "
                f"{n_dimensions} dimensions"
            )
        return info


def _checked_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str, int]:
    """The version and the group size of a quantization_config."""
    where = f"{checkpoint.path}: quantization_config"
    version, bits = config.get("checkpoint_format") or config.get("format") or "gptq", config.get("bits")
    if version not in VERSIONS:
        raise QuantizationError(
            f"{where}: checkpoint_format {version!r} is not supported; save it as one of {', '.join(VERSIONS)}"
        )
    if bits not in BITS:
        raise QuantizationError(
            f"{where}: {bits!r} bits are not supported; quantize the original with 4 or 8"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise QuantizationError(f"{where}: pack_dtype {config['pack_dtype']!r} is not supported; use int32")
    group_size = config.get("group_size")
    return str(version), group_size if is_count(group_size) else 0

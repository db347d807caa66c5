"""Writes a quantized checkpoint in the format of GPTQ, as transformers with optimum and gptqmodel load it.

What they load sets limits, and `check_writable` holds them before any work:

- Only linear layers of the decoder's blocks: gptqmodel knows no others of Qwen3.5, and transformers puts quantized
  modules under one prefix. The vision tower, the merger and the DeltaNet projections a and b stay floats.
- One format for all of them: transformers' loader has a single `bits` and a single `group_size`.
- Groups where there are 4 bits: gptqmodel's product on the CPU fails on a scale for a whole row.

transformers loads a checkpoint without more; `GPTQModel.load` also wants the `preprocessor_config.json` of a Qwen
processor, which is copied where the source has one.

Symmetric weights are written as version 1, which every reader knows; asymmetric ones as version 2, because in
version 1 a zero point of 0 has no code.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import zreward
from zreward.checkpoint import CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE, Checkpoint
from zreward.errors import QuantizationError
from zreward.jsonfile import write_json
from zreward.progress import Progress
from zreward.quant.formats.gptq_layout import n_words, pack_rows, pack_zeros
from zreward.quant.scheme import rule_for
from zreward.quant.source import QuantizedWeights
from zreward.quant.tensor import QuantizedWeight, WeightFormat
from zreward.safetensors_file import SafetensorsWriter, TensorSpec

BLOCKS = "model.language_model.layers"
QUANTIZE_CONFIG_FILE = "quantize_config.json"
SHARD_BYTES = 2_000_000_000
_BLOCK_BYTES = 64 * 1024 * 1024
_KEPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def check_writable(weights: QuantizedWeights) -> WeightFormat:
    """The one format of `weights`.

    Raises:
        QuantizationError: the loaders of this format could not represent them; see the module's docstring.
    """
    chosen: dict[WeightFormat, str] = {}
    for name, found in weights.formats.items():
        if not isinstance(found, WeightFormat) or found.activations != "float":
            raise QuantizationError(
                f"{name}: a GPTQ checkpoint cannot hold its format; use int4 or int8-weight"
            )
        if not is_gptq_layer(name):
            raise QuantizationError(
                f"{name}: the loaders of GPTQ checkpoints quantize the decoder's linear layers alone; leave "
                "others as they are (scheme: int4,model.visual.*=none)"
            )
        chosen.setdefault(WeightFormat(found.bits, found.group_size, found.symmetric), name)
    if not chosen:
        raise QuantizationError("nothing is quantized; there is no GPTQ checkpoint to write")
    if len(chosen) > 1:
        (one, name), (other, second) = list(chosen.items())[:2]
        raise QuantizationError(
            f"the loaders of GPTQ checkpoints take one format for all layers, but {name} has {one} and {second} "
            f"has {other}; choose one whose group size divides the inputs of every layer"
        )
    only, name = next(iter(chosen.items()))
    if only.bits == 4 and not only.group_size:
        raise QuantizationError(
            f"{name}: 4 bits with a scale for a whole row are refused by gptqmodel's product; choose a group size"
        )
    return only


def is_gptq_layer(name: str) -> bool:
    """Whether a tensor is a weight that GPTQ's loaders take quantized: a linear layer of a decoder block."""
    return fnmatchcase(name, f"{BLOCKS}.*.weight") and rule_for(name).quantizable


def write_gptq_checkpoint(
    source: Checkpoint,
    weights: QuantizedWeights,
    path: Path,
    progress: Progress | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `source` with `weights` in place of its matrices into the directory `path`.

    The caller stages that directory (`zreward.staging`). One matrix is in memory at a time. Floats keep their
    type; tokenizer, contract and generation settings are copied.

    Args:
        source: config, tokenizer and the float tensors; those of quantized matrices are not read.
        weights: the quantized matrices.
        path: existing directory, without weights.
        progress: hears of the bytes written.
        shard_bytes: size of a weights file at most, where one tensor does not exceed it.

    Raises:
        QuantizationError: see `check_writable`; or scales are not float16 values.
    """
    chosen = check_writable(weights)
    version = "gptq" if chosen.symmetric else "gptq_v2"
    writers: list[_Floats | _Packed] = [
        *(_Floats(source, name) for name in source.tensors if name not in weights.formats),
        *(_Packed(weights, name, version) for name in weights.formats),
    ]
    shards = _shards(writers, shard_bytes)
    config = _quantization_config(source, weights, chosen, version)
    _copy_small_files(source.path, path)
    write_json(path / CONFIG_FILE, {**source.config, "quantization_config": config})
    write_json(path / QUANTIZE_CONFIG_FILE, config)
    _write_shards(shards, path, progress or (lambda stage, done, total: None))


@dataclass(frozen=True)
class _Floats:
    """A tensor that is copied."""

    source: Checkpoint
    name: str

    @property
    def specs(self) -> dict[str, TensorSpec]:
        info = self.source.info(self.name)
        return {self.name: TensorSpec(info.dtype, info.shape)}

    def write(self, output: SafetensorsWriter) -> None:
        info = self.source.info(self.name)
        rows = info.shape[0] if info.shape else 1
        step = max(1, _BLOCK_BYTES * rows // max(1, info.n_bytes))
        for start in range(0, rows, step):
            output.write(self.name, self.source.read_stored(self.name, start, start + step), start)


@dataclass(frozen=True)
class _Packed:
    """A quantized matrix."""

    weights: QuantizedWeights
    name: str
    version: str

    @property
    def specs(self) -> dict[str, TensorSpec]:
        form, (out, inputs) = self.weights.formats[self.name], self.weights.shape(self.name)
        assert isinstance(form, WeightFormat)
        groups, layer = form.n_groups(inputs), self.name.removesuffix(".weight")
        return {
            f"{layer}.qweight": TensorSpec("I32", (n_words(inputs, form.bits), out)),
            f"{layer}.qzeros": TensorSpec("I32", (groups, n_words(out, form.bits))),
            f"{layer}.scales": TensorSpec("F16", (groups, out)),
            f"{layer}.g_idx": TensorSpec("I32", (inputs,)),
        }

    def write(self, output: SafetensorsWriter) -> None:
        weight, layer = self.weights.weight(self.name), self.name.removesuffix(".weight")
        assert isinstance(weight, QuantizedWeight)
        for suffix, values in packed(weight, self.version).items():
            output.write(f"{layer}.{suffix}", values)


def packed(weight: QuantizedWeight, version: str) -> dict[str, NDArray[Any]]:
    """The four tensors of a matrix by their suffix.

    Raises:
        QuantizationError: a scale is not a float16 value.
    """
    codes, bits = weight.codes, weight.format.bits
    inputs, groups = codes.shape[1], weight.scales.shape[1]
    indices = np.arange(inputs, dtype=np.int32) // (inputs // groups)
    if weight.order is not None:
        codes, sorted_codes = np.empty_like(codes), codes
        codes[:, weight.order] = sorted_codes
        indices[weight.order] = indices.copy()
    with np.errstate(over="ignore"):
        scales = weight.scales.astype(np.float16)
    if not np.array_equal(scales.astype(np.float32), weight.scales):
        raise QuantizationError("scales are not float16 values, which the GPTQ format needs")
    return {
        "qweight": pack_rows(np.ascontiguousarray(codes.T), bits),
        "qzeros": pack_zeros(np.ascontiguousarray(weight.zeros.T), bits, version),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": indices,
    }


def _quantization_config(
    source: Checkpoint, weights: QuantizedWeights, chosen: WeightFormat, version: str
) -> dict[str, Any]:
    """What transformers and gptqmodel read: which modules are quantized, and how.

    transformers quantizes every linear layer under `block_name_to_quantize` whose name ends like one in
    `modules_in_block_to_quantize`; gptqmodel all that it knows but those that `dynamic` excludes.
    """
    quantized = {name.removesuffix(".weight") for name in weights.formats}
    kept = {n.removesuffix(".weight") for n in source.tensors if is_gptq_layer(n)} - quantized
    endings = sorted({name.removeprefix(BLOCKS).split(".", 2)[2] for name in quantized})
    if any(name.endswith(ending) for name in kept for ending in endings):
        endings = sorted(name.removeprefix(f"{BLOCKS}.") for name in quantized)
    formats = [f for f in weights.formats.values() if isinstance(f, WeightFormat)]
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": chosen.bits,
        "group_size": chosen.group_size or -1,
        "sym": chosen.symmetric,
        "desc_act": any(f.act_order for f in formats),
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": BLOCKS,
        "modules_in_block_to_quantize": [endings],
        "dynamic": {f"-:^{name}$".replace(".", "\\."): {} for name in sorted(kept)},
        "meta": {"quantizer": [f"zreward:{zreward.__version__}"]},
    }


def _copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, contract, templates: everything but weights, their index and the configs written here."""
    written = {CONFIG_FILE, QUANTIZE_CONFIG_FILE, WEIGHTS_INDEX_FILE}
    for pattern in _KEPT_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in written:
                shutil.copyfile(file, target / file.name)


def _shards(writers: list[_Floats | _Packed], limit: int) -> list[list[_Floats | _Packed]]:
    """Cut the tensors into files of at most `limit` bytes; a matrix is not torn apart."""
    shards: list[list[_Floats | _Packed]] = [[]]
    size = 0
    for writer in writers:
        n_bytes = sum(spec.n_bytes for spec in writer.specs.values())
        if shards[-1] and size + n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(writer)
        size += n_bytes
    return shards


def _write_shards(shards: list[list[_Floats | _Packed]], path: Path, report: Progress) -> None:
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    sizes = [[sum(spec.n_bytes for spec in w.specs.values()) for w in shard] for shard in shards]
    total, done = sum(map(sum, sizes)), 0
    weight_map: dict[str, str] = {}
    for file, shard, shard_sizes in zip(files, shards, sizes, strict=True):
        specs = {name: spec for writer in shard for name, spec in writer.specs.items()}
        weight_map.update(dict.fromkeys(specs, file))
        with SafetensorsWriter(path / file, specs) as output:
            for writer, n_bytes in zip(shard, shard_sizes, strict=True):
                writer.write(output)
                done += n_bytes
                report("writing the checkpoint", done, total)
    if len(shards) > 1:
        write_json(path / WEIGHTS_INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

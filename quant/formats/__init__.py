"""Checkpoints that others quantized: which ones can be read, and how they are opened.

A quantized checkpoint opens as a `QuantizedCheckpoint`: read as floats its matrices come dequantized, and a target
that can multiply codes takes them as they are. Nothing is quantized a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError, QuantizationError
from zreward.jsonfile import read_json_object
from zreward.quant.formats import bitsandbytes, gptq
from zreward.quant.formats.gptq_writer import QUANTIZE_CONFIG_FILE
from zreward.quant.source import QuantizedCheckpoint, QuantizedWeights

READABLE = "GPTQ (gptq, gptq_v2) and bitsandbytes (nf4, fp4, int8)"


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint; one that GPTQ or bitsandbytes quantized comes as a `QuantizedCheckpoint`.

    Args:
        source: see `Checkpoint.open`.

    Raises:
        CheckpointError: see `Checkpoint.open`; or the quantized tensors are incomplete or damaged.
        QuantizationError: it is quantized in a way that zreward does not read.
    """
    checkpoint = Checkpoint.open(source)
    config = _quantization_config(checkpoint)
    if config is None:
        if gptq.packed_names(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path}: the weights are packed (….qweight), but neither config.json nor "
                f"{QUANTIZE_CONFIG_FILE} says how; copy the checkpoint again"
            )
        return checkpoint
    weights: QuantizedWeights
    method = _method(config)
    if method == "gptq":
        weights = gptq.GptqWeights.open(checkpoint, config)
        packed = set(gptq.packed_names(checkpoint.tensors))
    elif method == "bitsandbytes":
        weights = bitsandbytes.BitsandbytesWeights.open(checkpoint)
        packed = set(bitsandbytes.packed_names(checkpoint.tensors))
    else:
        raise QuantizationError(
            f"{checkpoint.path}: quantized with {method!r}, which is not supported; zreward reads {READABLE}. "
            "Dequantize it, or quantize the original with `zreward export --quant int4` (or `zreward quantize`)"
        )
    floats = {name: info for name, info in checkpoint.tensors.items() if name not in packed}
    return QuantizedCheckpoint(checkpoint.path, checkpoint.config, floats, weights)


def _quantization_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The quantization_config of config.json, or the file of its own that AutoGPTQ wrote."""
    for section in (checkpoint.config, checkpoint.text_config):
        config = section.get("quantization_config")
        if config is not None and not isinstance(config, dict):
            raise CheckpointError(f"{checkpoint.path}: quantization_config is not an object")
        if config:
            return dict(config)
    file = checkpoint.path / QUANTIZE_CONFIG_FILE
    if file.is_file() and gptq.packed_names(checkpoint.tensors):
        return {"quant_method": "gptq", **read_json_object(file, CheckpointError)}
    return None


def _method(config: Mapping[str, Any]) -> str:
    """The `quant_method`; early bitsandbytes checkpoints have only its flags."""
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)

"""Checkpoint to quantized checkpoint: `zreward quantize` as a function.

What is written is what the loaders of GPTQ checkpoints take: the linear layers of the decoder, in one format. An
export has more freedom (other layers, mixed formats, 8-bit activations) and quantizes on its own.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError, UsageError
from zreward.progress import Progress
from zreward.quant.calibrate import calibration_items, default_data
from zreward.quant.formats import open_checkpoint
from zreward.quant.formats.gptq_writer import is_gptq_layer, write_gptq_checkpoint
from zreward.quant.quantize import QuantizeOptions, plan, quantize
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import BITS
from zreward.staging import staged_directory

_STORE = "quantized"
_LARGEST_GROUP = 128  # what tools of GPTQ take where nothing is said


def gptq_scheme(checkpoint: Checkpoint, bits: int, group_size: int | None, *, symmetric: bool) -> str:
    """The scheme of a GPTQ checkpoint: every linear layer of the decoder in one format.

    Without a group size it is the largest power of two up to 128 that divides the inputs of every layer.

    Raises:
        QuantizationError: bits that are not supported.
    """
    if bits not in BITS:
        raise QuantizationError(f"weights of {bits} bits are not supported; choose 4 or 8")
    inputs = [info.shape[1] for name, info in checkpoint.tensors.items() if is_gptq_layer(name)]
    size = group_size or math.gcd(_LARGEST_GROUP, *inputs)
    base = "int4" if bits == 4 else "int8-weight"
    return f"none,model.language_model.*={base}-g{size}{'' if symmetric else '-asym'}"


def quantize_to_gptq(
    checkpoint: str | Path,
    output: Path,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    method: str = "gptq",
    calibration: str | None = None,
    device: str = "cpu",
    replace: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `checkpoint` and write it to `output` in the format of GPTQ; returns a summary.

    Args:
        checkpoint: directory, or owner/name on the hub, of a float checkpoint.
        output: the directory to write, in one step.
        bits: 4 or 8.
        group_size: inputs that share a scale; None chooses one that fits.
        symmetric: False stores a zero point for each group.
        method: "rtn" or "gptq".
        calibration: JSONL with a prompt and an image a line, or "scenes"; None takes scenes for models up to 300
            million parameters.
        device: where calibration runs.
        replace: whether an earlier checkpoint at `output` is replaced.
        progress: hears of each stage, in bytes.

    Raises:
        CheckpointError, QuantizationError, UsageError: bad input, found before any long work.
    """
    source = open_checkpoint(checkpoint)
    if isinstance(source, QuantizedCheckpoint):
        raise UsageError(f"{source.path} is quantized already; quantize the checkpoint it was made from")
    scheme = gptq_scheme(source, bits, group_size, symmetric=symmetric)
    options = QuantizeOptions(scheme=scheme, method=method, device=device)
    plan(source, options)
    data = None if method == "rtn" else calibration or default_data(source)
    if method != "rtn" and data is None:
        raise QuantizationError(f"{method} needs calibration data; give --calibration FILE, or --method rtn")
    items = calibration_items(data) if data else ()
    with staged_directory(output, replace=replace, kind="checkpoint") as staging:
        store = staging.path / _STORE
        store.mkdir()
        quantized = quantize(source, store, options, items, progress)
        summary = quantized.weights.summary()
        write_gptq_checkpoint(quantized, quantized.weights, staging.path, progress)
        shutil.rmtree(store)
        staging.commit()
    return summary

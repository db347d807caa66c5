"""`zreward quantize`: a quantized checkpoint in the format of GPTQ, which other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zreward.commands import console
from zreward.commands.export import CheckpointArgument, Method


def quantize(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint directory to write.")],
    method: Annotated[Method, typer.Option(help="Quantization algorithm.")] = Method.GPTQ,
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4 or 8.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale; by default 128, or the next power of two that fits."),
    ] = None,
    asym: Annotated[bool, typer.Option("--asym", help="A zero point for each group.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="JSONL with prompt and image a line, or `scenes`; small models default to scenes."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where calibration runs: cpu, cuda.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Write a GPTQ checkpoint that transformers and gptqmodel load: the decoder's layers in 4 or 8 bits."""
    from zreward.quant.convert import quantize_to_gptq

    with console.progress("MB") as progress:
        summary = quantize_to_gptq(
            checkpoint,
            output,
            bits=bits,
            group_size=group_size,
            symmetric=not asym,
            method=method.value,
            calibration=calibration,
            device=device,
            replace=force,
            progress=progress,
        )
    console.print_fact("checkpoint", output)
    console.print_fact("scheme", f"{summary['scheme']} by {summary['method']}")
    console.print_fact(
        "stored", f"{summary['bits_per_weight']:.3f} bits per quantized weight, scales included"
    )

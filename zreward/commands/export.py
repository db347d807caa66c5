"""`zreward export` and `zreward contract`: from a checkpoint to what is deployed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console

if TYPE_CHECKING:
    from zreward.bundle import Bundle
    from zreward.contract import ScoreContract
    from zreward.prompt import PromptEncoder

CheckpointArgument = Annotated[
    str,
    typer.Argument(help="Checkpoint directory (config, tokenizer, safetensors), or owner/name on the hub."),
]


class Weights(StrEnum):
    """How floating-point weights are stored; a GPU computes their products in that type, a CPU in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Method(StrEnum):
    RTN = "rtn"
    GPTQ = "gptq"


class Target(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"
    ONNX = "onnx"
    TENSORRT = "tensorrt"


def export(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle directory to write.")],
    quant: Annotated[
        str,
        typer.Option(
            help="none, int8, int8-weight, int4, fp8, …; with exceptions: int4,*.down_proj=int8-weight."
        ),
    ] = "none",
    target: Annotated[Target, typer.Option(help="Where the bundle will run.")] = Target.CPU,
    weights: Annotated[Weights, typer.Option(help="Storage of floating-point weights.")] = Weights.FP32,
    label_mass: Annotated[
        bool,
        typer.Option("--label-mass", help="Also report the probability of the codes in the full vocabulary."),
    ] = False,
    parity: Annotated[
        bool | None,
        typer.Option(
            help="Compare the bundle with the torch model; by default up to 300 million parameters."
        ),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Quantization algorithm; gptq where there is calibration data.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="JSONL with prompt and image a line, or `scenes`; small models default to scenes."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Held-out JSONL that judges the quantized bundle, or `scenes`, the same default."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Mix 4 and 8 bits up to this size, for example 5.0bpw.")
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Write the bundle whatever the judgement, or without one.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where calibration runs: cpu, cuda.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint to a bundle that the runtime scores with."""
    from zreward.errors import UsageError
    from zreward.export.build import ExportOptions, export_bundle
    from zreward.export.quantized import QuantizationOptions
    from zreward.quant.allocate import parse_budget

    quantization = None
    if quant != "none":
        quantization = QuantizationOptions(
            scheme=quant,
            method=method.value if method else None,
            calibration=calibration,
            evaluation=evaluation,
            budget=parse_budget(budget) if budget else None,
            allow_drift=allow_drift,
            device=device,
        )
    elif method or calibration or evaluation or budget or allow_drift:
        raise UsageError(
            "--method, --calibration, --evaluation, --budget and --allow-drift belong to --quant"
        )
    options = ExportOptions(
        weights=weights.value,
        target=target.value,
        label_mass=label_mass,
        parity=parity,
        force=force,
        quantization=quantization,
    )
    with console.progress("MB") as progress:
        bundle = export_bundle(checkpoint, output, options, progress)
    print_bundle(bundle)
    print_drift(bundle)


def print_drift(bundle: Bundle) -> None:
    """The drift table of a quantized bundle that was judged."""
    from zreward.export.quantized import DRIFT_FILE, DRIFT_PAGE

    if DRIFT_FILE not in bundle.manifest.files:
        return
    from zreward.commands.drift import drift_table
    from zreward.quant.drift import DriftReport

    console.stdout().print(drift_table(DriftReport.load(bundle.path / DRIFT_FILE)))
    console.print_fact("report", bundle.path / DRIFT_PAGE)


def print_bundle(bundle: Bundle) -> None:
    """Where a bundle lies, how large it is and which contract it answers."""
    size_bytes = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
    console.print_fact("bundle", bundle.path)
    console.print_fact("size", f"{size_bytes / 1e6:.1f} MB")
    console.print_fact("contract", f"{bundle.contract.name} {bundle.contract.sha256}")


def contract(
    checkpoint: CheckpointArgument,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing contract.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the default score contract beside a checkpoint, once its codes are checked."""
    from zreward.checkpoint import Checkpoint
    from zreward.contract import CONTRACT_FILE, ScoreContract
    from zreward.errors import UsageError
    from zreward.prompt import PromptEncoder, load_tokenizer

    opened = Checkpoint.open(checkpoint)
    existing = opened.path / CONTRACT_FILE
    if existing.exists() and not force:
        raise UsageError(f"{existing} exists and may be what the model was trained with; --force replaces it")
    default = ScoreContract.default(image=opened.default_image_spec())
    encoder = PromptEncoder(default, load_tokenizer(opened.path))
    path = default.save(opened.path)
    if as_json:
        tokens = dict(zip(default.codes, encoder.code_ids, strict=True))
        console.print_json(
            {"path": str(path), "name": default.name, "sha256": default.sha256, "tokens": tokens}
        )
    else:
        _print_contract(path, default, encoder)


def _print_contract(path: Path, written: ScoreContract, encoder: PromptEncoder) -> None:
    console.print_fact("contract", path)
    console.print_fact("name", written.name)
    console.print_fact("sha256", written.sha256)
    console.print_fact("dimensions", ", ".join(written.dimension_names))
    table = console.plain_table("code", "token id", "score")
    for code, token, score in zip(written.codes, encoder.code_ids, written.bins, strict=True):
        table.add_row(repr(code), str(token), f"{score:g}")
    console.stdout().print(table)

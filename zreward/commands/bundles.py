"""`zreward inspect` and `zreward verify`: what a bundle is, and whether it still is that."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zreward.commands import console
from zreward.commands.providers import GpuOption, ProviderOption, gpu_options

if TYPE_CHECKING:
    from zreward.bundle import Manifest

BundleArgument = Annotated[Path, typer.Argument(help="Bundle directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show what a bundle holds, without running it."""
    from zreward.bundle import Bundle
    from zreward.engines import engines_of

    opened = Bundle.open(bundle)
    manifest, engines = opened.manifest, engines_of(opened)
    if as_json:
        built = {engine.path.name: dataclasses.asdict(engine.info) for engine in engines}
        facts = {"path": str(opened.path), "sha256": opened.sha256, **manifest.to_dict(), "engines": built}
        console.print_json(facts)
        return
    console.print_fact("bundle", opened.path)
    console.print_fact("sha256", opened.sha256)
    console.print_fact("target", f"{manifest.target}, weights stored as {manifest.weights}")
    console.print_fact(
        "model", f"{manifest.model.architecture}, {manifest.model.parameters / 1e6:,.1f} M parameters"
    )
    console.print_fact("contract", f"{opened.contract.name} {manifest.contract_sha256}")
    console.print_fact("dimensions", ", ".join(opened.contract.dimension_names))
    image = opened.contract.image
    console.print_fact(
        "images", f"{image.min_pixels:,} to {image.max_pixels:,} pixels, patch {image.patch_size}"
    )
    console.print_fact("label mass", "reported" if manifest.label_mass else "not exported")
    if manifest.quantization is None:
        console.print_fact("quantized", "no")
    else:
        print_quantization(manifest.quantization)
    console.print_fact("parity", _parity(manifest))
    console.print_fact("made with", ", ".join(f"{name} {v}" for name, v in manifest.versions.items()))
    for engine in engines:
        stale = "" if engine.info.bundle_sha256 == opened.sha256 else ", of another export"
        console.print_fact("engine", f"{engine.path.name}, {engine.info.tensorrt_version}{stale}")
    _print_files(manifest)


def print_quantization(facts: Mapping[str, Any]) -> None:
    """How much of a model is stored in which format, and what is not, with the reasons."""
    console.print_fact("quantized", f"{facts['scheme']} by {facts['method']}")
    console.print_fact("stored", f"{facts['bits_per_weight']:.3f} bits per quantized weight, scales included")
    table = console.plain_table("layers", "format", "matrices", "weights", "largest error")
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, layer in facts["layers"].items():
        grouped.setdefault((_in_any_block(name), layer["format"]), []).append(layer)
    for (name, chosen), layers in grouped.items():
        weights = sum(math.prod(layer["shape"]) for layer in layers)
        errors = [layer["error"] for layer in layers if "error" in layer]  # no error where it came quantized
        largest = f"{max(errors):.2%}" if errors else "–"
        table.add_row(name, chosen, str(len(layers)), f"{weights / 1e6:,.2f} M", largest)
    console.stdout().print(table)
    _print_inputs(facts["layers"])
    kept = console.plain_table("kept as it is", "tensors")
    for reason, n_tensors in Counter(facts["kept"].values()).items():
        kept.add_row(reason, str(n_tensors))
    console.stdout().print(kept)


def _print_inputs(layers: Mapping[str, Mapping[str, Any]]) -> None:
    """What rounding to 8 bits costs the inputs, by the layers that read them; no table where none was measured.

    Ratios and errors are the largest of all blocks. Errors are ‖x − q‖ / ‖x‖, like those of the weights; the
    manifest has their squares, for every block.
    """
    grouped: dict[str, list[Mapping[str, float]]] = {}
    for names, inputs in _rounded_inputs(layers):
        grouped.setdefault(_in_any_block(names), []).append(inputs)
    if not grouped:
        return
    table = console.plain_table(
        "inputs rounded to 8 bits,\nlargest error of all blocks",
        "row\nratio",
        "one\nscale",
        "scale\na row",
        "after\nsmoothing",
        "strength",
    )
    for names, units in grouped.items():
        ratio = max(unit["row_ratio"] for unit in units)
        table.add_row(
            names,
            f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}",
            *(
                f"{math.sqrt(max(unit[error] for unit in units)):.1%}"
                for error in ("tensor_error", "row_error", "smoothed_error")
            ),
            _range([unit["smoothing"] for unit in units]),
        )
    console.stdout().print(table)


def _rounded_inputs(
    layers: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Each input with statistics, with the names of the layers that read it: `module.first, second`."""
    readers: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, layer in layers.items():
        if "inputs" in layer:
            module, _, last = name.rpartition(".")
            readers.setdefault((module, tuple(layer["inputs"].values())), []).append(last)
    for (module, _), names in readers.items():
        yield f"{module}.{', '.join(names)}", layers[f"{module}.{names[0]}"]["inputs"]


def _in_any_block(name: str) -> str:
    """A layer's name without the number of its block, and without what all names begin with."""
    return re.sub(r"\.\d+\.", ".*.", name).removeprefix("model.").removeprefix("language_model.")


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _parity(manifest: Manifest) -> str:
    if manifest.parity is None:
        return "not measured at export"
    bins, means = manifest.parity.max_difference, manifest.parity.max_mean_difference
    n_images = manifest.parity.n_images
    return f"{bins:.1e} at most in a bin probability, {means:.1e} in a score, on {n_images} images"


def _print_files(manifest: Manifest) -> None:
    table = console.plain_table("file", "bytes", "sha256")
    for name, entry in manifest.files.items():
        table.add_row(name, f"{entry.bytes:,}", entry.sha256[:16])
    console.stdout().print(table)


def verify(
    bundle: BundleArgument,
    provider: ProviderOption = "auto",
    gpu: GpuOption = "",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the hash of every file and replay the golden inputs."""
    from zreward.runtime.verify import verify_bundle

    report = verify_bundle(bundle, provider=provider, threads=threads, gpu=gpu_options(gpu))
    if as_json:
        console.print_json(dataclasses.asdict(report))
        return
    console.print_fact("verified", bundle)
    console.print_fact("golden", f"{report.n_golden} inputs replayed by {report.backend}")
    difference, tolerance = report.max_probability_difference, report.tolerance
    console.print_fact(
        "difference", f"{difference:.1e} at most in a bin probability; allowed is {tolerance:.0e}"
    )

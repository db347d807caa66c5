"""`zreward engine`: a TensorRT engine of a bundle, for the machine that will run it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console
from zreward.commands.bundles import BundleArgument
from zreward.errors import UsageError

if TYPE_CHECKING:
    from zreward.engines import BuiltEngine


class FlavourName(StrEnum):
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


def engine(
    bundle: BundleArgument,
    flavour: Annotated[
        FlavourName, typer.Option(help="tensorrt builds on the GPU that runs it, tensorrt-rtx anywhere.")
    ] = FlavourName.TENSORRT,
    plugins: Annotated[
        Path | None,
        typer.Option(
            help="Library of plugins; by default ZREWARD_PLUGINS, or the one in the user's cache. TensorRT only."
        ),
    ] = None,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Use no plugins, even where a library is found.")
    ] = False,
    quick_head: Annotated[
        bool,
        typer.Option(
            "--quick-head",
            help="Compile the score head alone into the engine, without a library; needs nvidia-cuda-nvrtc.",
        ),
    ] = False,
    images: Annotated[
        int | None, typer.Option(help="Most images of a run; as many as the runtime scores together.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of GPU to build for, such as 8.9; TensorRT-RTX only, by default all from 8.0."
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File that keeps what the builder measures, for the next build; TensorRT only."),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds quickly, 5 searches longest.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine of this kind.")] = False,
) -> None:
    """Build TensorRT engines of a bundle that was exported with `--target tensorrt`."""
    from zreward.export.tensorrt import EngineOptions, build_engine

    options = EngineOptions(
        flavour=flavour.value,
        plugins=_library(flavour, plugins, without=no_plugins or quick_head),
        quick_head=quick_head,
        timing_cache=timing_cache,
        compute_capabilities=tuple(compute_capability or ()),
        images=images,
        optimization_level=optimization_level,
        force=force,
    )
    with console.progress("%") as progress:
        built = build_engine(bundle, options, progress)
    print_engine(built)


def _library(flavour: FlavourName, named: Path | None, *, without: bool) -> Path | None:
    """The plugins to build with: those that were named, else those that the runtime will look for too."""
    from zreward.plugins import find_library
    from zreward.tensorrt_library import flavour_named

    if named is not None and without:
        raise UsageError(
            "--plugins goes neither with --no-plugins nor with --quick-head; leave one of them out"
        )
    if named is not None or without or not flavour_named(flavour.value).takes_plugins:
        return named
    found = find_library()
    if found is not None:
        console.say(f"building with the plugins of {found}; --no-plugins goes without")
    return found


def print_engine(built: BuiltEngine) -> None:
    """What an engine was built by and for, with the sizes that it takes."""
    info = built.info
    console.print_fact("engine", built.path)
    console.print_fact("built by", f"{info.flavour} {info.tensorrt_version}, in {info.precision}")
    console.print_fact("runs on", f"compute capability {', '.join(info.compute_capabilities)}")
    for name, graph in info.graphs.items():
        layers = "layer" if graph.plugin_layers == 1 else "layers"
        plugins = f", {graph.plugin_layers} plugin {layers}" if graph.plugin_layers else ""
        console.print_fact(name, f"{graph.bytes / 1e6:,.1f} MB{plugins}")
        for profile in graph.profiles:
            sizes = ", ".join(f"{axis} {least} to {most}" for axis, (least, _, most) in profile.axes.items())
            console.print_fact("", f"{profile.name}: {sizes}")

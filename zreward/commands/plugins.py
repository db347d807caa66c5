"""`zreward plugins`: the library of TensorRT plugins, built and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zreward.commands import console
from zreward.commands.bundles import JsonOption
from zreward.errors import UsageError

if TYPE_CHECKING:
    from zreward.plugins import PluginLibrary


def build(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the library; by default zreward/plugins in the user's cache."
        ),
    ] = None,
    tensorrt: Annotated[
        Path | None,
        typer.Option(help="TensorRT's folder, or that of its headers; by default it is looked for."),
    ] = None,
    nvcc: Annotated[Path | None, typer.Option(help="CUDA compiler; by default it is looked for.")] = None,
    architectures: Annotated[
        str | None, typer.Option(help="Compute capabilities, such as 8.0,9.0,12.0 (the default).")
    ] = None,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="The CUDA kernels alone, which need no TensorRT.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile the TensorRT plugins for your TensorRT; `docs/tensorrt.md` says what they are."""
    from zreward.export.plugins.build import ARCHITECTURES, build_plugins
    from zreward.plugins import default_folder

    chosen = ARCHITECTURES if architectures is None else _architectures(architectures)
    with console.working("compiling, for a minute or so"):
        library = build_plugins(
            output or default_folder(),
            nvcc=nvcc,
            tensorrt=tensorrt,
            architectures=chosen,
            kernels_only=kernels_only,
        )
    _print(library, as_json)


def check(
    library: Annotated[
        Path | None,
        typer.Argument(help="Library; by default ZREWARD_PLUGINS, or the one in the user's cache."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a library with its record, load it, and compare its version with the TensorRT that is installed."""
    from zreward.plugins import LIBRARY_FILE, PluginLibrary, default_folder, find_library, installed_tensorrt

    opened = PluginLibrary.open(library or find_library() or default_folder() / LIBRARY_FILE)
    opened.check_contents()
    installed = installed_tensorrt()
    if installed is not None and opened.record.tensorrt is not None:
        opened.check_version(installed)
    _print(opened, as_json, {"installed_tensorrt": installed})


def _architectures(given: str) -> tuple[int, ...]:
    """80 for "8.0" and for "80"."""
    try:
        return tuple(_architecture(part.strip()) for part in given.split(","))
    except ValueError:
        raise UsageError(
            f"--architectures is {given!r}; expected compute capabilities with commas between them, such as 8.0,9.0"
        ) from None


def _architecture(given: str) -> int:
    major, point, minor = given.partition(".")
    return 10 * int(major) + int(minor) if point else int(major)


def _print(library: PluginLibrary, as_json: bool, more: dict[str, Any] | None = None) -> None:
    from dataclasses import asdict

    record = library.record
    if as_json:
        console.print_json({"path": str(library.path), **asdict(record), **(more or {})})
        return
    console.print_fact("library", library.path)
    console.print_fact("sha256", record.sha256)
    console.print_fact("plugins", ", ".join(record.plugins) or "none: kernels alone")
    console.print_fact("TensorRT", _versions(record.tensorrt, (more or {}).get("installed_tensorrt")))
    console.print_fact("CUDA", f"{record.cuda}, compute capability {', '.join(record.architectures)}")
    console.print_fact("size", f"{record.bytes / 1e6:.1f} MB")


def _versions(built: str | None, installed: str | None) -> str:
    return f"built for {built or 'none'}" + (f", {installed} is installed" if installed else "")

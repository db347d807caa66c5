"""The options that say what runs a bundle, alike in all commands that score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zreward.runtime.backends.options import GpuOptions

ProviderOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What runs the model: cpu; tensorrt or tensorrt-rtx for an engine; cuda or ort-tensorrt for ONNX Runtime "
        "on a GPU; auto for what the bundle was exported for, where that runs.",
    ),
]
GpuOption = Annotated[
    str,
    typer.Option(
        metavar="KEY=VALUE,…", help="Use of a GPU: device=0, memory=8GiB, engine-cache=DIR, plugins=FILE."
    ),
]


def gpu_options(text: str) -> GpuOptions:
    """What `--gpu` says; errors as of `GpuOptions.parse`."""
    from zreward.runtime.backends.options import GpuOptions

    return GpuOptions.parse(text)

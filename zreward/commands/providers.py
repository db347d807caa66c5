"""The options that say what runs a bundle, alike in all commands that score."""

from __future__ import annotations

from typing import Annotated

import typer

ProviderOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What runs the model: cpu, tensorrt or tensorrt-rtx for an engine, auto for an engine that runs here.",
    ),
]

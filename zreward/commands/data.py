"""`zreward data`: data sets made by this project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zreward.commands import console


def scenes(
    output: Annotated[Path, typer.Argument(help="New or empty directory to write.")],
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 100,
    candidates: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal scenes.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
) -> None:
    """Draw synthetic scenes with known rubric scores, as PNG files and scenes.jsonl."""
    from zreward.synthetic import SceneConfig, write_dataset

    config = SceneConfig() if size is None else SceneConfig(size=size)
    with console.working(f"drawing {prompts * candidates} images"):
        path = write_dataset(output, config, seed, prompts, candidates)
    console.print_fact("data set", path)
    console.print_fact("images", prompts * candidates)

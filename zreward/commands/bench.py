"""`zreward bench`: how long a bundle takes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console

if TYPE_CHECKING:
    from zreward.runtime.bench import SizeTiming


def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    image_size: Annotated[
        str, typer.Option(help="Sides of the square test images in pixels, separated by commas.")
    ] = "256,512",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    repetitions: Annotated[int, typer.Option(help="Measured runs per size, at least 10.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write every sample, machine and versions here.")
    ] = None,
) -> None:
    """Measure the stages of scoring one image, and all of it."""
    from zreward.errors import UsageError
    from zreward.jsonfile import write_json
    from zreward.runtime import Scorer
    from zreward.runtime.bench import run_bench

    try:
        sizes = [int(size) for size in image_size.split(",")]
    except ValueError:
        raise UsageError(f"--image-size {image_size!r}: expected numbers such as 256,512") from None
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UsageError(f"{json_file.parent}: no such folder for --json; create it first")
    with Scorer.open(bundle, threads=threads) as scorer, console.progress() as progress:
        report = run_bench(scorer, sizes, repetitions=repetitions, threads=threads, progress=progress)
    for result in report.results:
        print_timing(result)
    if json_file is not None:
        write_json(json_file, report.to_dict())
        console.say(f"samples, machine and versions are in {json_file}")


def print_timing(result: SizeTiming) -> None:
    """The stages of one image size in milliseconds."""
    from zreward.runtime.bench import STAGES

    title = f"{result.image_size}×{result.image_size} pixels, {result.n_tokens:,} image tokens, milliseconds"
    table = console.plain_table("stage", "min", "median", "p90", "p99", "max", title=title)
    for name, timing in result.stages.items():
        if name == "new_prompt":
            table.add_section()
        table.add_row(STAGES[name], *(f"{timing.percentile(q):,.1f}" for q in (0, 50, 90, 99, 100)))
    console.stdout().print(table)

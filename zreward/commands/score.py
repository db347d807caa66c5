"""`zreward score`: a few images on the command line, or a JSONL file of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console
from zreward.commands.providers import GpuOption, ProviderOption, gpu_options
from zreward.errors import UsageError, ZrewardError

if TYPE_CHECKING:
    from zreward.runtime import Score, Scorer


def score(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Images, candidates of one prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text that the images were generated from.")] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="JSONL with prompt, image and optionally id a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL of scores, one line per line of --input.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Empty --output first instead of going on from it.")
    ] = False,
    provider: ProviderOption = "auto",
    gpu: GpuOption = "",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image.")] = False,
) -> None:
    """Score images under a prompt, or every line of a JSONL file.

    Exit status 1 means that some items could not be scored; each of those is reported with its error.
    A JSONL run that was interrupted goes on where it stopped when it is started again.
    """
    opened = partial(_open, bundle, provider, threads, gpu)
    if source is not None:
        if images or prompt is not None or output is None or as_json:
            raise UsageError("--input goes with --output, and without images, --prompt and --json")
        n_failed = _score_file(opened, source, output, restart)
    elif prompt is None or not images:
        raise UsageError("give --prompt TEXT and at least one image, or --input FILE and --output FILE")
    elif output is not None or restart:
        raise UsageError("--output and --restart go with --input; for images, redirect the output of --json")
    else:
        n_failed = _score_images(opened, prompt, images, as_json)
    if n_failed:
        raise typer.Exit(1)


def _open(bundle: Path, provider: str, threads: int | None, gpu: str) -> Scorer:
    from zreward.runtime import Scorer

    return Scorer.open(bundle, provider=provider, threads=threads, gpu=gpu_options(gpu))


def _score_file(opened: Callable[[], Scorer], source: Path, output: Path, restart: bool) -> int:
    from zreward.runtime.jsonl import score_jsonl

    with opened() as scorer, console.progress("%") as progress:

        def report(done: int, total: int) -> None:
            stop_if_interrupted()
            progress("scoring", done, total)

        try:
            with console.remembered_interrupt() as stop_if_interrupted:
                summary = score_jsonl(scorer, source, output, restart=restart, progress=report)
        except KeyboardInterrupt:
            console.say("interrupted; the same command goes on from here")
            raise
    resumed = f", {summary.resumed:,} of them from an earlier run" if summary.resumed else ""
    console.say(f"{output}: {summary.lines:,} lines{resumed}; {summary.failed:,} failed")
    return summary.failed


def _score_images(opened: Callable[[], Scorer], prompt: str, images: Sequence[Path], as_json: bool) -> int:
    from zreward.runtime import Score

    with opened() as scorer:
        results = scorer.score(prompt=prompt, images=images, errors="return")
        scored = {index: result for index, result in enumerate(results) if isinstance(result, Score)}
        ranks = ranks_from_overall({index: result.overall for index, result in scored.items()})
        if as_json:
            _print_objects(scorer, images, results, ranks)
        elif scored:
            names = _shortest_names(images)
            print_scores([(names[index], ranks[index], scored[index]) for index in scored])
    for image, result in zip(images, results, strict=True):
        if isinstance(result, ZrewardError):
            console.say(f"error: {image}: {result}" if str(image) not in str(result) else f"error: {result}")
    return len(results) - len(scored)


def ranks_from_overall(overall: Mapping[int, float]) -> dict[int, int]:
    """Rank of each key, 1 for the highest score; equal scores rank in the order given."""
    ordered = sorted(overall, key=lambda key: -overall[key])
    return {key: rank for rank, key in enumerate(ordered, 1)}


def print_scores(rows: Sequence[tuple[str, int, Score]], title: str | None = None) -> None:
    """One line per image, best first: each dimension's mean±standard deviation, and the overall score."""
    names = list(rows[0][2].dimensions)
    table = console.plain_table("image", *names, "overall", "rank", title=title)
    for image, rank, result in sorted(rows, key=lambda row: row[1]):
        cells = (f"{d.mean:.2f}±{d.std:.2f}" for d in result.dimensions.values())
        table.add_row(image, *cells, f"{result.overall:.2f}", str(rank))
    console.stdout().print(table)


def _shortest_names(images: Sequence[Path]) -> list[str]:
    """File names where they tell the images apart, else whole paths."""
    names = [image.name for image in images]
    return names if len(set(names)) == len(set(images)) else [str(image) for image in images]


def _print_objects(
    scorer: Scorer, images: Sequence[Path], results: Sequence[Score | ZrewardError], ranks: Mapping[int, int]
) -> None:
    for index, (image, result) in enumerate(zip(images, results, strict=True)):
        record: dict[str, object] = {"image": str(image)}
        if isinstance(result, ZrewardError):
            record["error"] = {"type": type(result).__name__, "message": str(result)}
        else:
            record |= {**result.to_dict(), "rank": ranks[index]}
        console.print_json({**record, "contract": scorer.bundle.contract.sha256}, indent=None)

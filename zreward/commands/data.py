"""`zreward data`: data sets made by this project, and public ones in its form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console
from zreward.errors import UsageError

if TYPE_CHECKING:
    from zreward.training.convert.write import Summary


def chains(
    checkpoint: Annotated[
        str, typer.Argument(help="Model that writes the reasons: directory, or owner/name.")
    ],
    data: Annotated[Path, typer.Argument(exists=True, help="Labelled JSONL with an id in every line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write.")],
    per_question: Annotated[int, typer.Option(min=1, help="Chains for each labelled question.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=4, help="Longer reasons are left out.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds sample equal chains.")] = 0,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences sampled at a time.")] = 8,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="vLLM server that samples in place of this process.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name on it (else: CHECKPOINT).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Ask a model for the reasons of known scores: what `zreward train rewarddance` learns from."""
    from zreward.errors import UsageError

    if output.exists() and not force:
        raise UsageError(f"{output} exists; choose another name, or replace it with --force")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a directory; make it first")
    if served_model is not None and server is None:
        raise UsageError("--served-model is a name on a server; say which one with --server")
    try:
        from zreward.training.rollout import Sampling
        from zreward.training.rollout_server import Server
        from zreward.training.write_chains import write_chains
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this needs the package {error.name}; install it with `pip install 'zreward[train]'`"
        ) from None
    sampling = Sampling(per_question, max_new_tokens)
    serving = None if server is None else Server(server, served_model or checkpoint)
    with console.progress() as progress:
        written, left_out = write_chains(
            checkpoint,
            data,
            output,
            sampling,
            seed=seed,
            micro_batch=micro_batch,
            progress=progress,
            server=serving,
        )
    console.print_fact("chains", output)
    console.print_fact("written", written)
    console.print_fact("left out", left_out)


def benchmark(
    output: Annotated[Path, typer.Argument(help="New or empty directory to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal scenes.")] = 0,
    scale: Annotated[float, typer.Option(help="Of the number of prompts of every split.")] = 1.0,
) -> None:
    """Draw the splits of the synthetic rubric benchmark."""
    from zreward.synthetic.benchmark import SPLITS, write_benchmark

    with console.progress() as progress:
        write_benchmark(output, seed=seed, scale=scale, progress=progress)
    console.print_fact("benchmark", output)
    console.print_fact("splits", ", ".join(SPLITS))


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


def convert(
    name: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="hpdv3, hpdv2, pickapic-v2, imagerewarddb, richhf-18k, visionreward-image, genai-bench-ratings, "
            "genai-bench-votes or evalmuse-40k.",
        ),
    ],
    source: Annotated[Path, typer.Argument(help="The set's file, or a folder of such files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder that image paths start from (else: of SOURCE); for sets that hold their images, the folder "
            "to write them to (else: beside the output)."
        ),
    ] = None,
    dimension: Annotated[
        str | None,
        typer.Option(help="What a preference is about; also takes a set's overall rating, if it has one."),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="JSONL to write the comparisons of a preference set to.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts by image name, for richhf-18k: .json, .jsonl or .parquet.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many records.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out records whose image or prompt is not there.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Convert a public data set to the JSONL that training and eval read.

    docs/data.md says what is read of each set and how its scale is mapped to 1 to 5.
    """
    from zreward.contract import ScoreContract
    from zreward.training.convert.formats import FORMATS
    from zreward.training.convert.records import Request
    from zreward.training.convert.write import Target, convert_dataset, images_folder

    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    folder = images or images_folder(name, source, output)
    request = Request(source, folder, dimension, prompts)
    with console.working(f"converting {source}"):
        summary = convert_dataset(
            name, request, Target(output, pairs, force), limit=limit, skip_missing=skip_missing
        )
    console.print_fact("data set", output)
    console.print_fact("lines", summary.lines)
    if pairs is not None:
        console.print_fact("pairs file", pairs)
        console.print_fact("pairs", summary.pairs)
    _tell_left_out(summary)
    known = ScoreContract.default().dimension_names
    if dimension and dimension not in known:
        console.say(
            f"note: {dimension!r} is not one of the default contract's dimensions, {', '.join(known)}"
        )


def _tell_left_out(summary: Summary) -> None:
    for reason, count in summary.left_out.items():
        console.say(f"left out {count:,} records: {reason}")
    if summary.n_missing:
        console.say(f"left out {summary.n_missing:,} that are missing, the first is {summary.first_missing}")

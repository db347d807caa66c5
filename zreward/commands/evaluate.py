"""`zreward eval`: agreement with a labelled data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console

if TYPE_CHECKING:
    from zreward.evaluation import Agreement, Floats, Labels

_CHUNK = 32  # pairs scored between two steps of the progress bar


def evaluate(
    source: Annotated[
        Path, typer.Argument(exists=True, help="Bundle, or scores.jsonl that `zreward score` wrote for DATA.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            exists=True, help="JSONL with prompt, image and scores a line (a folder: its scenes.jsonl)."
        ),
    ],
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare scores with labels: PLCC, SRCC, HPA and margin HPA."""
    import numpy as np

    from zreward.evaluation import compare, read_labels, read_predictions

    labels = read_labels(data / "scenes.jsonl" if data.is_dir() else data)
    predictions = _score(source, labels, threads) if source.is_dir() else read_predictions(source, labels)
    rows = compare(predictions, labels)
    if as_json:
        console.print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_rows(rows)
    n_failed = int(np.isnan(predictions).any(axis=1).sum())
    if n_failed:
        console.say(f"{n_failed} of {len(labels.pairs)} items could not be scored and are left out")
        raise typer.Exit(1)


def _score(bundle: Path, labels: Labels, threads: int | None) -> Floats:
    """Means of every item, float64 [n, dimensions]; a failed item is NaN and its reason is told."""
    import numpy as np

    from zreward.runtime import Score, Scorer

    predictions = np.full(labels.scores.shape, np.nan)
    with Scorer.open(bundle, threads=threads) as scorer, console.progress() as progress:
        for name in labels.dimensions:
            scorer.bundle.contract.dimension(name)  # an unknown one is refused before the work, not after it
        for start in range(0, len(labels.pairs), _CHUNK):
            chunk = labels.pairs[start : start + _CHUNK]
            results = scorer.score_pairs([(pair.prompt, pair.image) for pair in chunk], errors="return")
            for row, result in enumerate(results, start):
                if isinstance(result, Score):
                    predictions[row] = [result[name].mean for name in labels.dimensions]
                else:
                    console.say(f"item {row + 1}: {result}")
            progress("scoring", min(start + _CHUNK, len(labels.pairs)), len(labels.pairs))
    return predictions


def print_rows(rows: Sequence[Agreement]) -> None:
    table = console.plain_table("dimension", "PLCC", "SRCC", "HPA", "pairs", "margin HPA", "pairs")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(
            row.dimension,
            _figure(row.plcc),
            _figure(row.srcc),
            _figure(row.hpa),
            f"{row.n_pairs:,}",
            _figure(row.margin_hpa),
            f"{row.n_margin_pairs:,}",
        )
    console.stdout().print(table)


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"

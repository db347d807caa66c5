"""`zreward eval`: agreement with a labelled data set, and calibration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console
from zreward.commands.providers import GpuOption, ProviderOption, gpu_options

if TYPE_CHECKING:
    from zreward.commands.evaluate_sources import Scored
    from zreward.evaluation import Agreement, Labels
    from zreward.evaluation_report import EvaluationReport, Reasoning, Row
    from zreward.metrics import Interval
    from zreward.progress import Progress

_DEFAULT_TRACES, _DEFAULT_NEW_TOKENS = (
    1,
    1024,
)  # as in training, where the paper's traces have about 750 tokens


def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True, help="Bundle, checkpoint, or scores.jsonl that `zreward score` wrote for DATA."
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            exists=True, help="JSONL with prompt, image and scores a line (a folder: its scenes.jsonl)."
        ),
    ],
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap draws of prompts for the intervals; 0 for none.")
    ] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap draws and of sampled traces.")] = 0,
    provider: ProviderOption = "auto",
    gpu: GpuOption = "",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    reasons: Annotated[
        bool, typer.Option("--reasoning", help="A checkpoint reasons before it answers.")
    ] = False,
    traces: Annotated[
        int | None, typer.Option(min=1, help="Reasoning traces of each question, averaged (1).")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=4, help="Longest reasoning trace with its answer (1024).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with plots here.")
    ] = None,
) -> None:
    """Compare scores with labels: agreement and calibration, with intervals.

    docs/evaluation.md says what the figures mean.
    """
    from zreward.evaluation import read_labels
    from zreward.evaluation_page import write_evaluation_page
    from zreward.evaluation_report import evaluation_report

    path = data / "scenes.jsonl" if data.is_dir() else data
    reasoning = _reasoning(reasons, traces, max_new_tokens, seed)
    _check_page(html, source, path)
    labels = read_labels(path)
    with console.progress() as progress:
        predictions, facts = _scored(source, labels, reasoning, threads, (provider, gpu), progress)
        report = evaluation_report(
            facts, path, predictions, labels, n_resamples=resamples, seed=seed, progress=progress
        )
    if as_json:
        console.print_json(report.to_dict())
    else:
        print_report(report)
    if html is not None:
        write_evaluation_page(html, report, predictions, labels)
        console.say(f"written: {html}")
    if report.failures:
        console.say(report.failures)
        raise typer.Exit(1)


def print_report(report: EvaluationReport) -> None:
    """Agreement, its intervals and calibration, as tables of 80 columns."""
    print_rows([row.agreement for row in report.rows])
    if report.n_resamples:
        _print_intervals(report)
    _print_calibration(report.rows)
    for text in (*_definitions(report), *report.notes):
        console.stdout().print(text, markup=False)


def print_rows(rows: Sequence[Agreement]) -> None:
    """Agreement alone: what training shows of its validation."""
    table = console.plain_table("dimension", "PLCC", "SRCC", "HPA", "pairs", "margin\nHPA", "pairs")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(
            row.dimension,
            _number(row.plcc),
            _number(row.srcc),
            _number(row.hpa),
            f"{row.n_pairs:,}",
            _number(row.margin_hpa),
            f"{row.n_margin_pairs:,}",
        )
    console.stdout().print(table)


def _print_intervals(report: EvaluationReport) -> None:
    table = console.plain_table("dimension", "PLCC", "SRCC", "HPA", "margin\nHPA", title="95 % intervals")
    for row in report.rows:
        if row is report.overall:
            table.add_section()
        found = row.intervals
        cells = (_interval(item) for item in (found.plcc, found.srcc, found.hpa, found.margin_hpa))
        table.add_row(row.dimension, *cells)
    console.stdout().print(table)


def _print_calibration(rows: Sequence[Row]) -> None:
    table = console.plain_table(
        "dimension", "scores", "bias", "error", "NLL", "floor", "std", title="Calibration"
    )
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        found = row.calibration
        likelihood, sharpness = found.likelihood, found.sharpness
        table.add_row(
            row.dimension,
            f"{row.agreement.n_items:,}",
            "–" if found.bias is None else f"{found.bias:+.3f}",
            _number(found.error),
            _number(likelihood.nll if likelihood else None),
            _number(likelihood.floor if likelihood else None),
            _number(sharpness.std if sharpness else None),
        )
    console.stdout().print(table)


def _definitions(report: EvaluationReport) -> list[str]:
    """What the columns of the calibration mean."""
    from zreward.calibration import likelihood_target

    lines = [
        "bias: mean prediction − mean label; error: mean |prediction − label| over groups of like predictions; in "
        "score points."
    ]
    if of := likelihood_target([row.calibration for row in report.rows]):
        lines.append(
            f"NLL: of {of}, in nats; floor: what predicting exactly these would get; std: of the predicted "
            "distributions, in points."
        )
    if reasoning := report.source.reasoning:
        lines.append(
            f"traces: {reasoning.n_answered:,} of {reasoning.n_sampled:,} ended in an answer; the others are left out."
        )
    return lines


def _scored(
    source: Path,
    labels: Labels,
    reasoning: Reasoning | None,
    threads: int | None,
    runs_on: tuple[str, str],
    progress: Progress,
) -> Scored:
    """`runs_on` is what --provider and --gpu say, for bundles."""
    from zreward.commands import evaluate_sources as sources
    from zreward.errors import UsageError

    kind = sources.source_kind(source)
    if reasoning and kind != "checkpoint":
        what = "a bundle" if kind == "bundle" else "a file of scores"
        raise UsageError(f"--reasoning is for checkpoints, and {source} is {what}, which answers directly")
    if kind != "bundle" and runs_on != ("auto", ""):
        what = "a checkpoint is run by torch" if kind == "checkpoint" else "scores in a file are read"
        raise UsageError(f"--provider and --gpu are for bundles: {what}; leave them out")
    if kind == "checkpoint":
        return sources.from_checkpoint(source, labels, reasoning, threads, progress)
    if kind == "bundle":
        provider, gpu = runs_on
        options = gpu_options(gpu)
        return sources.from_bundle(source, labels, threads, progress, provider=provider, gpu=options)
    return sources.from_score_file(source, labels)


def _reasoning(wanted: bool, traces: int | None, max_new_tokens: int | None, seed: int) -> Reasoning | None:
    from zreward.errors import UsageError
    from zreward.evaluation_report import Reasoning

    if not wanted:
        for option, value in (("--traces", traces), ("--max-new-tokens", max_new_tokens)):
            if value is not None:
                raise UsageError(f"{option} is about reasoning traces; add --reasoning, or leave it out")
        return None
    return Reasoning(traces or _DEFAULT_TRACES, max_new_tokens or _DEFAULT_NEW_TOKENS, seed)


def _check_page(html: Path | None, source: Path, data: Path) -> None:
    """Before the work: a page that cannot be written is a wrong call."""
    from zreward.errors import UsageError

    if html is None:
        return
    folder = html.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{html.parent}: no such folder for --html; create it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{html.parent}: nothing can be written here for --html")
    if html.is_dir():
        raise UsageError(f"{html}: is a folder; --html takes the name of a file")
    if html.exists() and any(path.exists() and html.samefile(path) for path in (source, data)):
        raise UsageError(f"{html}: --html would replace what is evaluated; choose another name")


def _interval(interval: Interval | None) -> str:
    """Both ends without the zero before the point, so that four of them fit beside a name."""
    if interval is None:
        return "–"
    return "–".join(f"{end:.3f}".replace("0.", ".", 1) for end in (interval.low, interval.high))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

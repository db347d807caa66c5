"""`zreward bench` and `zreward bench compare`: how long a bundle takes, and what changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from zreward.commands import console
from zreward.commands.outputs import check_files, say_written
from zreward.commands.providers import GpuOption

if TYPE_CHECKING:
    from zreward.runtime.bench.compare import Compared, Comparison
    from zreward.runtime.bench.report import BenchReport, Result

T = TypeVar("T")

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write everything here, every sample included."),
]
MarkdownFile = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the tables here, as Markdown.")
]


def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    image_size: Annotated[
        str, typer.Option(metavar="LIST", help="Sides of the square test images in pixels.")
    ] = "256,512",
    candidates: Annotated[
        str, typer.Option(metavar="LIST", help="Images of one prompt that are scored at once.")
    ] = "1",
    threads: Annotated[
        str | None, typer.Option(metavar="LIST", help="CPU threads; without it what the backend chooses.")
    ] = None,
    provider: Annotated[
        str, typer.Option(metavar="LIST", help="Providers, those of `zreward score`.")
    ] = "auto",
    gpu: GpuOption = "",
    repetitions: Annotated[
        int, typer.Option(help="Measured runs of each configuration, 10 or more: at least these,")
    ] = 10,
    min_seconds: Annotated[float, typer.Option(help="and at least for so long.")] = 3.0,
    starts: Annotated[int, typer.Option(help="Processes that are started to time a start.")] = 3,
    separate: Annotated[
        bool, typer.Option("--separate", help="Also measure one full pass for each question, nothing shared.")
    ] = False,
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with plots here.")
    ] = None,
) -> None:
    """Measure the stages of scoring, and all of it.

    A LIST has commas, as in 256,512: every combination is measured. `zreward bench compare` lines up what --json wrote;
    docs/bench.md says what the figures mean.
    """
    from zreward.runtime.bench import BenchPlan, run_bench
    from zreward.runtime.bench.page import write_page
    from zreward.runtime.bench.tables import write_markdown

    plan = BenchPlan(
        image_sizes=_listed("--image-size", image_size, int, "256,512"),
        candidates=_listed("--candidates", candidates, int, "1,4"),
        threads=(None,) if threads is None else _listed("--threads", threads, int, "1,2"),
        providers=_listed("--provider", provider, str, "auto,cpu"),
        repetitions=repetitions,
        min_seconds=min_seconds,
        starts=starts,
        separate=separate,
        gpu=gpu,
    )
    check_files(("--json", json_file), ("--markdown", markdown), ("--html", html))
    with console.progress("%") as progress, console.remembered_interrupt() as stop_if_interrupted:

        def heard(stage: str, done: int, total: int) -> None:
            stop_if_interrupted()
            progress(stage, done, total)

        report = run_bench(bundle, plan, heard)
    _print_report(report)
    if json_file is not None:
        report.save(json_file)
    if markdown is not None:
        write_markdown(markdown, report)
    if html is not None:
        write_page(html, report)
    say_written(json_file, markdown, html)


def bench_compare(
    reports: Annotated[
        list[Path],
        typer.Argument(metavar="REPORT.json", help="What `zreward bench --json` wrote, the baseline first."),
    ],
    threshold: Annotated[
        str, typer.Option(metavar="PERCENT", help="How much slower is a regression.")
    ] = "10%",
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Also compare other bundles and contracts.")
    ] = False,
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
) -> None:
    """Line up reports with the first one; exit with 1 if something became slower.

    Counted are regressions end to end: slower by more than the threshold, and not within the noise.
    """
    from zreward.runtime.bench.compare import compare
    from zreward.runtime.bench.comparison_tables import write_comparison_markdown
    from zreward.runtime.bench.report import BenchReport

    share = _percentage(threshold)
    check_files(("--json", json_file), ("--markdown", markdown))
    loaded = [BenchReport.load(path) for path in reports]
    compared = compare(loaded, _labels(reports), threshold=share, allow_different=allow_different)
    _print_comparison(compared, loaded)
    if json_file is not None:
        compared.save(json_file)
    if markdown is not None:
        write_comparison_markdown(markdown, compared, loaded)
    say_written(json_file, markdown)
    if compared.n_regressions:
        raise typer.Exit(1)


def print_stages(result: Result) -> None:
    """The stages of one configuration in milliseconds."""
    from zreward.runtime.bench import tables

    table = console.plain_table(*tables.STAGE_COLUMNS, title=tables.stage_title(result))
    for index, row in enumerate(tables.stage_rows(result)):
        if index == tables.n_parts(result):
            table.add_section()
        table.add_row(*row)
    console.stdout().print(table)


def _print_report(report: BenchReport) -> None:
    from zreward.runtime.bench import tables

    console.print_facts(tables.facts(report))
    for result in report.results:
        print_stages(result)
    console.print_table(tables.START_COLUMNS, tables.start_rows(report.sessions))
    console.print_table(tables.SUMMARY_COLUMNS, tables.summary_rows(report.results), title="Summary")
    for text in (*tables.DEFINITIONS, *report.notes):
        console.stdout().print(text, markup=False)


def _print_comparison(compared: Compared, reports: Sequence[BenchReport]) -> None:
    from zreward.runtime.bench import comparison_tables as tables

    console.print_table(tables.MACHINE_COLUMNS, tables.machine_rows(compared, reports))
    for comparison in compared.comparisons:
        _print_changes(compared, comparison)
    for text in tables.remarks(compared):
        console.stdout().print(text, markup=False)


def _print_changes(compared: Compared, comparison: Comparison) -> None:
    from zreward.runtime.bench import comparison_tables as tables

    console.stdout().print(
        f"{comparison.label} against {compared.baseline}, medians in milliseconds", markup=False
    )
    for heading, rows in tables.change_sections(comparison):
        console.print_table(tables.CHANGE_COLUMNS, rows, title=heading)


def _listed(option: str, text: str, kind: Callable[[str], T], example: str) -> tuple[T, ...]:
    from zreward.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    try:
        if all(words):
            return tuple(kind(word) for word in words)
    except ValueError:
        pass
    what = "numbers" if kind is int else "names"
    raise UsageError(f"{option} {text!r}: expected {what} such as {example}")


def _percentage(text: str) -> float:
    """`10%` or `10` as 0.1. A bare number below 1 is refused: 0.1 may be meant as a share."""
    from zreward.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if found is None or not math.isfinite(float(found[1])) or (not found[2] and 0 < float(found[1]) < 1):
        raise UsageError(f"--threshold {text!r}: expected a percentage such as 10% or 2.5%")
    return float(found[1]) / 100


def _labels(paths: Sequence[Path]) -> list[str]:
    """The names of the files without their suffix; where two are alike, the paths, and a number if need be."""
    labels = [path.stem for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    return [
        label if label not in labels[:index] else f"{label} ({labels[: index + 1].count(label)})"
        for index, label in enumerate(labels)
    ]

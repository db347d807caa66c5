"""The report as one HTML page, see `zreward.page`, with charts of `zreward.runtime.bench.charts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import zreward
from zreward.charts import cell_bar
from zreward.jsonfile import write_text
from zreward.page import facts, figure, html_page, row, section, table
from zreward.runtime.bench import charts, tables
from zreward.runtime.bench.plan import threads_label
from zreward.runtime.bench.report import BenchReport, Result
from zreward.runtime.bench.stages import STAGES

_SHOWN = 12  # configurations whose samples and stages are not folded away

_ENDS_KEY = " ".join(
    f'<span class="key {name.replace("_", "-")}">{STAGES[name]}</span>' for name in charts.ENDS
)
_STAGES_KEY = " ".join(f'<span class="key {kind}">{title}</span>' for kind, title in charts.stage_classes())


def write_page(path: Path, report: BenchReport) -> None:
    """Write the page of `bench_page` to `path` in one step."""
    write_text(path, bench_page(report))


def bench_page(report: BenchReport) -> str:
    """The page as HTML, made from the report alone."""
    intro = f'<p class="soft">{escape(tables.processor(report.machine))}. {escape(report.date[:10])}.</p>'
    sections = [
        intro,
        _headline(report),
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _summary(report),
        _by_stage(report),
        _by_size(report),
        _by_candidates(report),
        _samples(report),
        _stages(report),
        _starts(report),
        _facts(report),
    ]
    title = f"Benchmark: {escape(report.bundle.name)}"
    return html_page(
        title,
        "\n".join(part for part in sections if part),
        f"zreward {escape(zreward.__version__)}. The JSON report has every sample.",
        styles=["drift-report.css", "bench-report.css"],
    )


def _headline(report: BenchReport) -> str:
    fastest = max(report.results, key=lambda r: r.scores_per_s["same_prompt"])
    first = min(report.sessions, key=lambda s: s.median_start("total_s"))
    peaks = [session.peak_memory_bytes for session in report.sessions]
    return facts(
        [
            (
                f"most scores a second, {escape(fastest.configuration.label)}",
                tables.per_second(fastest.scores_per_s["same_prompt"]),
            ),
            ("process start to first score", f"{first.median_start('total_s'):.2f} <small>s</small>"),
            ("most memory", f"{max(peaks) / 1e6:,.0f} <small>MB</small>"),
            ("bundle", f"{report.bundle.n_bytes / 1e6:,.1f} <small>MB</small>"),
        ]
    )


def _summary(report: BenchReport) -> str:
    columns = [name.replace("\n", " ") for name in tables.SUMMARY_COLUMNS]
    rows = (row(cells) for cells in tables.summary_rows(report.results))
    return section("Summary", escape(" ".join(tables.DEFINITIONS)), table(columns, rows))


def _by_stage(report: BenchReport) -> str:
    figures = []
    for key, group in _groups(report.results, lambda r: (r.configuration.candidates,)):
        chart = charts.stage_chart(group, lambda r: f"{r.configuration.image_size}²")
        figures.append(figure(chart, _caption(group[0], candidates=key[0])))
    return section(
        "Stages",
        "Medians in milliseconds of the stages that follow each other, by the side of the image. The line across a "
        f"column is the bound of its operations. {_STAGES_KEY}",
        _grid(figures),
    )


def _by_size(report: BenchReport) -> str:
    groups = _groups(report.results, lambda r: (r.configuration.candidates,))
    figures = [
        figure(charts.size_chart(group), _caption(group[0], candidates=key[0]))
        for key, group in groups
        if len(group) > 1
    ]
    return _lines("Latency against image size", "Milliseconds for all candidates of a call", figures)


def _by_candidates(report: BenchReport) -> str:
    groups = _groups(report.results, lambda r: (r.configuration.image_size,))
    figures = [
        figure(charts.candidates_chart(group), _caption(group[0], size=key[0]))
        for key, group in groups
        if len(group) > 1
    ]
    return _lines("Latency against candidates", "Milliseconds for one candidate of a call", figures)


def _lines(title: str, what: str, figures: Sequence[str]) -> str:
    if not figures:
        return ""
    how = "points are medians, upright strokes the middle half of the samples, dashed lines the bounds"
    return section(title, f"{what}; {how}. {_ENDS_KEY}", _grid(figures))


def _samples(report: BenchReport) -> str:
    figures = [
        figure(charts.sample_chart(result), escape(result.configuration.label)) for result in report.results
    ]
    return section(
        "Spread of the samples",
        "Milliseconds in the order taken, evenly thinned where there are many. A level that drifts or jumps is the "
        f"machine, and a median of it is worth less. {_ENDS_KEY}",
        _grid(figures[:_SHOWN]) + _folded(_grid(figures[_SHOWN:]), len(figures) - _SHOWN),
    )


def _stages(report: BenchReport) -> str:
    parts = [_stage_table(result) for result in report.results]
    return section(
        "Stages in figures",
        "Milliseconds. IQR is the range of the middle half of the samples. A full bar would be as fast as the machine "
        "multiplies.",
        "".join(parts[:_SHOWN]) + _folded("".join(parts[_SHOWN:]), len(parts) - _SHOWN),
    )


def _stage_table(result: Result) -> str:
    rows = []
    for cells, timing in zip(tables.stage_rows(result), tables.timings(result), strict=True):
        name, *others = (escape(cell) for cell in cells)
        bar = "" if timing.share is None else cell_bar(min(timing.share, 1.0))
        values = "".join(f"<td>{cell}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{name}{bar}</th>{values}</tr>')
    title = escape(tables.stage_title(result)).replace("\n", ": ")
    return f"<h3>{title}</h3>{table(['stage', *tables.STAGE_COLUMNS[1:]], rows)}"


def _starts(report: BenchReport) -> str:
    columns = [name.replace("\n", " ") for name in tables.START_COLUMNS]
    rows = (row(cells) for cells in tables.start_rows(report.sessions))
    return section(
        "Start",
        "From the start of a process to the first scores of an image, which is cold: medians over processes of their "
        "own. The files of the bundle may be in the system’s cache.",
        table(columns, rows),
    )


def _facts(report: BenchReport) -> str:
    rows = (row(cells) for cells in tables.facts(report).items())
    return section("Measured with", "The JSON report has all digits of the hashes.", table("", rows, "about"))


def _caption(result: Result, *, candidates: int | None = None, size: int | None = None) -> str:
    one = result.configuration
    what = (
        f"{size}×{size}" if size else f"{candidates} candidate{'s' * (candidates != 1)}"
    )  # of a group that shares it
    return escape(f"{what}, {threads_label(one.threads)}, {one.provider}")


def _groups(
    results: Iterable[Result], shared: Callable[[Result], tuple[int, ...]]
) -> list[tuple[tuple[int, ...], list[Result]]]:
    """Results of one provider and thread count that share something besides."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        one = result.configuration
        groups.setdefault((one.provider, one.threads, shared(result)), []).append(result)
    return [(shared(group[0]), group) for group in groups.values()]


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _folded(content: str, n: int) -> str:
    return f"<details><summary>{n} more configurations</summary>{content}</details>" if content else ""

"""A comparison in rows and columns, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from zreward.jsonfile import write_text
from zreward.runtime.bench.compare import RULE, Change, Compared, Comparison
from zreward.runtime.bench.report import BenchReport
from zreward.runtime.bench.stages import STAGES
from zreward.runtime.bench.tables import Row, escaped, markdown_table, milliseconds

MACHINE_COLUMNS = ("report", "zreward", "onnxruntime", "kernels", "first score", "date")
CHANGE_COLUMNS = ("", "before", "after", "ratio", "95 %", "")

_VERDICTS = {"same": "≈ noise", "faster": "faster", "slower": "slower", "regression": "REGRESSION"}


def machine_rows(compared: Compared, reports: Sequence[BenchReport]) -> list[Row]:
    """One row for each report: what it was taken on and with."""
    labels = [compared.baseline, *(one.label for one in compared.comparisons)]
    return [
        (
            f"{label}: {report.machine.processor}, {_cores(report.machine.usable_cpus)}",
            report.versions.get("zreward", "–"),
            report.versions.get("onnxruntime") or report.versions.get("onnxruntime-gpu", "–"),
            "yes" if all(session.kernels for session in report.sessions) else "no",
            f"{report.sessions[0].median_start('total_s'):.2f} s",
            report.date[:10],
        )
        for label, report in zip(labels, reports, strict=True)
    ]


def change_sections(comparison: Comparison) -> Iterator[tuple[str, list[Row]]]:
    """For each configuration that both have: its heading, and a row for each stage."""
    groups = groupby(comparison.changes, key=lambda change: change.configuration)
    for (configuration, changes), peak in zip(groups, comparison.peak_ratio, strict=True):
        memory = "" if peak is None else f", peak memory × {peak:.2f}"
        yield configuration.label + memory, [_change_row(change) for change in changes]


def remarks(compared: Compared) -> list[str]:
    """The rule, what differs, what is missing, and the outcome, in sentences."""
    said = [RULE]
    said += [f"Different: {text}." for text in compared.different]
    for one in compared.comparisons:
        if one.missing:
            said.append(
                f"{one.label}: only one of the two reports has {'; '.join(c.label for c in one.missing)}."
            )
    n = compared.n_regressions
    said.append(
        f"No regression above {_percent(compared.threshold)}."
        if not n
        else f"{n} regression{'s' * (n != 1)} above {_percent(compared.threshold)}."
    )
    return said


def comparison_markdown(compared: Compared, reports: Sequence[BenchReport]) -> str:
    """The comparison as Markdown."""
    parts = [f"# Benchmarks against {escaped(compared.baseline)}"]
    parts.append(markdown_table(MACHINE_COLUMNS, machine_rows(compared, reports)))
    for comparison in compared.comparisons:
        parts.append(f"## {escaped(comparison.label)}")
        for heading, rows in change_sections(comparison):
            parts += [heading, markdown_table(("stage", *CHANGE_COLUMNS[1:]), rows)]
    return "\n\n".join([*parts, *map(escaped, remarks(compared))]) + "\n"


def write_comparison_markdown(path: Path, compared: Compared, reports: Sequence[BenchReport]) -> None:
    """Write `comparison_markdown` to `path` in one step."""
    write_text(path, comparison_markdown(compared, reports))


def _change_row(change: Change) -> Row:
    return (
        STAGES[change.stage],
        milliseconds(change.before_ms),
        milliseconds(change.after_ms),
        f"{change.ratio:.3f}",
        f"{change.low:.3f} to {change.high:.3f}",
        _VERDICTS[change.verdict],
    )


def _cores(number: int) -> str:
    return f"{number} processor" + "s" * (number != 1)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"

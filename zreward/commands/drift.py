"""The drift report on a terminal: a table of 80 columns, for `zreward quantize` and `zreward export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zreward.commands import console

if TYPE_CHECKING:
    from rich.table import Table

    from zreward.quant.drift import DriftReport, PreferenceChange


def drift_table(report: DriftReport) -> Table:
    """One row per dimension and one for the overall score.

    KL is in nats, |Δμ| and regret in score points, and the HPA columns are changes in points (hundredths). A
    dash stands for what is undefined on the held-out set. The JSON form of the report has every other figure.
    """
    table = console.plain_table(
        "",
        "mean\nKL",
        "mean\n|Δμ|",
        "p99\n|Δμ|",
        "flips",
        "flips\n> ½",
        "ΔHPA",
        "margin\nΔHPA",
        "best-of-4\nregret",
    )
    for row in report.rows:
        if row is report.overall:
            table.add_section()
        flips, clear, regret = row.pair_flips, row.clear_pair_flips, row.best_of_4_regret
        table.add_row(
            row.dimension,
            f"{row.kl.mean:.4f}",
            f"{row.abs_difference.mean:.4f}",
            f"{row.abs_difference.p99:.3f}",
            f"{flips.value:.2%}" if flips else "–",
            f"{clear.value:.2%}" if clear else "–",
            _points(row.hpa),
            _points(row.margin_hpa),
            f"{regret.value:+.4f}" if regret else "–",
        )
    return table


def _points(change: PreferenceChange | None) -> str:
    return "–" if change is None else f"{100 * change.change:+.2f}"

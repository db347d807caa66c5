"""The drift report as one HTML page, see `zreward.page`.

The page is made from the report alone (and the limits it is judged by), so it can be written again from a
bundle's JSON. Its charts are those of `zreward.quant.report_charts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import zreward
from zreward.charts import cell_bar, number
from zreward.contract import DriftLimits
from zreward.jsonfile import write_text
from zreward.metrics import PairShare
from zreward.page import facts, figure, html_page, section, table
from zreward.quant.drift import CorrelationChange, DimensionDrift, DriftReport, LayerFacts, PreferenceChange
from zreward.quant.report import check_drift, limited_figures
from zreward.quant.report_charts import (
    Point,
    distribution_chart,
    histogram_chart,
    sensitivity,
    size_chart,
)

_LAYERS_SHOWN = 24
_KEY = '<span class="key before">before</span> <span class="key after">after</span>'


def write_report_page(
    path: Path, report: DriftReport, limits: DriftLimits, points: Sequence[Point] = ()
) -> None:
    """Write the page of `report_page` to `path`, replacing it in one step."""
    write_text(path, report_page(report, limits, points))


def report_page(report: DriftReport, limits: DriftLimits, points: Sequence[Point] = ()) -> str:
    """The page as HTML.

    Args:
        report: what is shown.
        limits: the contract's limits, which decide the verdict.
        points: models to compare by size (label, bits per weight, mean KL in nats); that of this report has its
            title as label.
    """
    sections = [
        _verdict(report, limits),
        _facts(report),
        _limits(report, limits),
        _score_table(report),
        _agreement_table(report),
        _distributions(report),
        _histograms(report),
        _layers(report),
        _sizes(report, points),
    ]
    title = f"Score drift: {escape(report.title)}"
    body = (
        f'<p class="soft">{report.n_items:,} held-out images of {report.n_prompts:,} prompts, '
        "scored before and after quantization.</p>\n" + "\n".join(part for part in sections if part)
    )
    footer = (
        f"zreward {escape(zreward.__version__)}. Intervals: 95 %, {report.n_resamples:,} "
        f"bootstrap draws of prompts, seed {report.seed}."
    )
    return html_page(title, body, footer, styles=["drift-report.css"])


def _verdict(report: DriftReport, limits: DriftLimits) -> str:
    found = check_drift(report, limits)
    if not found:
        return '<div class="verdict pass"><p>✓ Within the contract’s drift limits</p></div>'
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    what = "limit is" if len(found) == 1 else "limits are"
    return f'<div class="verdict fail"><p>✗ {len(found)} drift {what} exceeded</p><ul>{items}</ul></div>'


def _facts(report: DriftReport) -> str:
    row, size = report.overall, report.size
    found = [
        ("mean KL, overall", f"{number(row.kl.mean)} <small>nats</small>"),
        ("mean |Δμ|, overall", f"{number(row.abs_difference.mean)} <small>points</small>"),
        ("pair flips, overall", _share(row.pair_flips)),
    ]
    if row.hpa:
        found.append(("HPA change, overall", f"{_points(row.hpa.change)} <small>points</small>"))
    if size:
        found.append(("quantized weights", f"{number(size.bits_per_weight, 4)} <small>bits each</small>"))
        before, after = size.weight_bytes_before / 1e6, size.weight_bytes_after / 1e6
        found.append(("all weights", f"{number(after)} <small>of {number(before)} MB</small>"))
    return facts(found)


def _limits(report: DriftReport, limits: DriftLimits) -> str:
    """For each limit the row that comes closest to it."""
    rows = []
    for figures in zip(*(limited_figures(row, limits) for row in report.rows), strict=True):
        known = [
            (f.value, row.dimension)
            for f, row in zip(figures, report.rows, strict=True)
            if f.value is not None
        ]
        value, dimension = max(known, default=(0.0, "undefined"))
        name, limit = figures[0].name, figures[0].limit
        shown = _percent if figures[0].unit == "share" else number
        over = ' class="over"' if value > limit else ""
        rows.append(
            f'<tr><th scope="row">{name}{cell_bar(value / limit)}</th><td{over}>{shown(value) if known else "–"}</td>'
            f"<td>{escape(dimension)}</td><td>{shown(limit)}</td></tr>"
        )
    return section(
        "The limits",
        "For each limit of the contract, the dimension that comes closest, or the overall score. A full bar is the "
        "limit. |Δμ| is in score points, KL in nats.",
        table(["", "largest", "in", "limit"], rows, kind="bars"),
    )


def _score_table(report: DriftReport) -> str:
    head = (
        '<tr><th rowspan="2" scope="col">dimension</th><th colspan="3" class="span" scope="colgroup">KL, nats</th>'
        '<th colspan="3" class="span" scope="colgroup">|Δμ|, score points</th><th rowspan="2" scope="col">mean Δμ</th>'
        '<th colspan="2" class="span" scope="colgroup">pair flips</th>'
        '<th colspan="2" class="span" scope="colgroup">after with before</th></tr>'
        "<tr>" + "".join(f'<th scope="col">{name}</th>' for name in ("mean", "p99", "max") * 2)
        + "".join(f'<th scope="col">{name}</th>' for name in ("all", "gap &gt; ½", "SRCC", "PLCC")) + "</tr>"
    )  # fmt: skip
    rows = []
    for row in report.rows:
        spreads = [v for s in (row.kl, row.abs_difference) for v in (s.mean, s.p99, s.max)]
        cells = [*(number(v) for v in spreads), _signed(row.mean_difference)]
        cells += [_share(row.pair_flips), _share(row.clear_pair_flips)]
        cells += ["–" if v is None else f"{v:.4f}" for v in (row.srcc, row.plcc)]
        rows.append(_row(report, row, cells))
    return section(
        "How far the scores moved",
        "KL is the divergence of each score distribution from the one before. μ is the expected score, Δμ its "
        "change. A flip is a pair of images of one prompt that changes its order; flips among pairs that were "
        "more than half a point apart are the ones that matter for selection. The mean Δμ, with its sign, is a "
        "shift of the whole scale, which does not change any order.",
        table(head, rows),
    )


def _agreement_table(report: DriftReport) -> str:
    overall = report.overall
    if not any((overall.hpa, overall.label_srcc, overall.best_of_4_regret)):
        return ""
    names = [
        "dimension",
        "HPA",
        "change (95 %)",
        "margin HPA",
        "change (95 %)",
        "SRCC",
        "PLCC",
        "best-of-4 regret",
    ]
    rows = []
    for row in report.rows:
        regret = row.best_of_4_regret
        cells = [*_preference(row.hpa), *_preference(row.margin_hpa)]
        cells += [_correlation(row.label_srcc), _correlation(row.label_plcc)]
        rows.append(_row(report, row, [*cells, "–" if regret is None else _signed(regret.value)]))
    return section(
        "What it means for selection",
        "HPA is the share of same-prompt pairs that are ordered as the labels order them, margin HPA the same where "
        "the labels differ by more than half a point; changes are in points (hundredths). SRCC and PLCC are the "
        "changes of the correlation with the labels. Regret is what is lost, in score points, when the quantized "
        f"model picks the best of four candidates instead of the float model. {_regret_note(overall)}",
        table(names, rows),
    )


def _regret_note(row: DimensionDrift) -> str:
    regret = row.best_of_4_regret
    if regret is None:
        return ""
    judge = (
        "the labels" if regret.judge == "labels" else "the float model’s own score, since there are no labels"
    )
    short = f"; {regret.n_short_prompts:,} have fewer than four" if regret.n_short_prompts else ""
    return f"It is judged by {judge}, on {regret.n_prompts:,} prompts{short}."


def _distributions(report: DriftReport) -> str:
    figures = []
    for example in report.examples:
        caption = (
            f"<b>{example.rank}</b>, {escape(example.dimension)} of item {example.item}: "
            f"KL {number(example.kl)} nats, μ {_mean(report.bins, example.before)} → "
            f"{_mean(report.bins, example.after)}"
        )
        figures.append(figure(distribution_chart(report.bins, example), caption))
    return section(
        "Distributions, from the typical to the worst",
        "Examples by their rank among all divergences. The triangles are the expected scores. "
        f"The worst deserve a look: is the answer still sensible, or is it another one? {_KEY}",
        f'<div class="grid">{"".join(figures)}</div>',
    )


def _histograms(report: DriftReport) -> str:
    figures = []
    for row, counts in zip(report.rows, report.histogram.counts, strict=True):
        chart = histogram_chart(report.histogram.edges, counts, f"Histogram of Δμ, {row.dimension}")
        caption = f"<b>{escape(row.dimension)}</b>: mean {_signed(row.mean_difference)}, largest "
        figures.append(figure(chart, caption + f"{number(row.abs_difference.max)}"))
    return section(
        "Change of the expected score",
        "Images by Δμ, in score points; the outermost bars hold everything beyond the axis. A narrow peak at zero "
        "is good. A peak beside zero is a shift of the scale; tall ends are images that are scored anew.",
        f'<div class="grid">{"".join(figures)}</div>',
    )


def _layers(report: DriftReport) -> str:
    if not report.layers:
        return ""
    layers = sorted(report.layers, key=sensitivity, reverse=True)
    largest = max(sensitivity(layers[0]), 1e-300)
    names = ["layer", "KL, nats", "error", "bits", "format"]
    rows = [_layer(layer, largest) for layer in layers]
    body = table(names, rows[:_LAYERS_SHOWN], kind="bars")
    if rows[_LAYERS_SHOWN:]:
        rest = table(names, rows[_LAYERS_SHOWN:], kind="bars")
        body += f"<details><summary>{len(rows) - _LAYERS_SHOWN} more layers</summary>{rest}</details>"
    measured = any(layer.sensitivity_kl is not None for layer in layers)
    how = (
        "KL is the mean divergence of the scores when that layer alone is quantized; layers at the top are the first "
        "to deserve more bits."
        if measured
        else "Sensitivities were not measured; bars show the relative error of the weights."
    )
    return section("Layers", f"{how} Error is ‖Ŵ − W‖ / ‖W‖.", body)


def _layer(layer: LayerFacts, largest: float) -> str:
    cells = ["–" if v is None else number(v) for v in (layer.sensitivity_kl, layer.relative_error)]
    name = escape(layer.name).replace(".", ".<wbr>")
    return (
        f'<tr><th scope="row">{name}{cell_bar(sensitivity(layer) / largest)}</th><td>{cells[0]}</td><td>{cells[1]}</td>'
        f"<td>{number(layer.bits, 4)}</td><td>{escape(layer.format)}</td></tr>"
    )


def _sizes(report: DriftReport, points: Sequence[Point]) -> str:
    if len(points) < 2:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(label)}</th><td>{number(bits, 4)}</td><td>{number(kl)}</td></tr>'
        for label, bits, kl in sorted(points, key=lambda p: (p[1], p[2]))
    ]
    return section(
        "Size against drift",
        "Lower is better, and so is further left: a model that is above and to the right of another one is worse in "
        "both. The filled point is the model of this report.",
        f'<div class="pair"><figure>{size_chart(points, report.title)}</figure>'
        f"{table(['model', 'bits', 'mean KL, nats'], rows)}</div>",
    )


def _row(report: DriftReport, row: DimensionDrift, cells: Iterable[str]) -> str:
    kind = ' class="overall"' if row is report.overall else ""
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{kind}><th scope="row">{escape(row.dimension)}</th>{values}</tr>'


def _preference(change: PreferenceChange | None) -> tuple[str, str]:
    if change is None:
        return "–", "–"
    interval = change.interval
    between = f" ({_points(interval.low)} to {_points(interval.high)})" if interval else ""
    return f"{change.after:.4f}", _points(change.change) + between


def _correlation(change: CorrelationChange | None) -> str:
    return "–" if change is None else f"{change.change:+.4f}".replace("-", "−")


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"


def _share(share: PairShare | None) -> str:
    return "–" if share is None else f"{100 * share.value:.2f} %"


def _mean(bins: Sequence[float], probs: Sequence[float]) -> str:
    return f"{sum(b * p for b, p in zip(bins, probs, strict=True)):.2f}"

"""An evaluation as one HTML page, see `zreward.page`, with charts of `zreward.evaluation_charts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import zreward
from zreward.calibration import Calibration, likelihood_target
from zreward.evaluation import Labels, Predictions, Scores, compared_scores
from zreward.evaluation_charts import Bar, bar_chart, density_chart, reliability_chart, score_range
from zreward.evaluation_intervals import LEVEL
from zreward.evaluation_report import EvaluationReport, Row
from zreward.jsonfile import write_text
from zreward.metrics import Interval
from zreward.page import facts, figure, html_page, row, section, table

_PREFERENCE_KEY = '<span class="key after">HPA</span> <span class="key before">margin HPA</span>'
_CORRELATION_KEY = '<span class="key after">PLCC</span> <span class="key before">SRCC</span>'


def write_evaluation_page(
    path: Path, report: EvaluationReport, predictions: Predictions, labels: Labels
) -> None:
    """Write the page of `evaluation_page` to `path`, replacing it in one step."""
    write_text(path, evaluation_page(report, predictions, labels))


def evaluation_page(report: EvaluationReport, predictions: Predictions, labels: Labels) -> str:
    """The page as HTML, from a report and the scores that it is about."""
    scores = compared_scores(predictions.means, labels)
    data, source = report.data, report.source
    name = Path(source.path).resolve().name
    sections = [
        f'<p class="soft">{data.n_items:,} images of {data.n_prompts:,} prompts, scored by '
        f"{_KINDS[source.kind]}.</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(report)),
        _headline(report),
        _agreement(report),
        _reliability(report, scores),
        _density(report, scores),
        _calibration(report),
        _about(report),
    ]
    intervals = (
        f"Intervals: {LEVEL:.0%}".replace("%", " %")
        + f", {report.n_resamples:,} bootstrap draws of prompts, "
    )
    footer = f"zreward {escape(zreward.__version__)}. " + (
        f"{intervals}seed {report.seed}." if report.n_resamples else "No intervals."
    )
    body = "\n".join(part for part in sections if part)
    styles = ["drift-report.css", "bench-report.css"]
    return html_page(f"Evaluation: {escape(name)}", body, footer, styles=styles)


_KINDS = {"bundle": "a bundle", "checkpoint": "a checkpoint", "scores": "a bundle before"}


def _notes(report: EvaluationReport) -> list[str]:
    return [*([report.failures] if report.failures else []), *report.notes]


def _headline(report: EvaluationReport) -> str:
    figures, found = report.overall.agreement, report.overall.calibration
    pairs = [
        ("HPA", _figure(figures.hpa)),
        ("margin HPA", _figure(figures.margin_hpa)),
        ("PLCC", _figure(figures.plcc)),
        ("SRCC", _figure(figures.srcc)),
        ("calibration error", f"{_figure(found.error)} <small>points</small>"),
    ]
    if found.likelihood:
        pairs.append(("NLL", f"{_figure(found.likelihood.nll)} <small>nats</small>"))
    return '<p class="soft">Over all dimensions:</p>\n' + facts(pairs)


def _agreement(report: EvaluationReport) -> str:
    names = ["dimension", "scores", "PLCC", "SRCC", "HPA", "pairs", "margin HPA", "pairs"]
    rows = []
    for item in report.rows:
        figures, around = item.agreement, item.intervals
        cells = [
            item.dimension,
            f"{figures.n_items:,}",
            _with_interval(figures.plcc, around.plcc),
            _with_interval(figures.srcc, around.srcc),
            _with_interval(figures.hpa, around.hpa),
            f"{figures.n_pairs:,}",
            _with_interval(figures.margin_hpa, around.margin_hpa),
            f"{figures.n_margin_pairs:,}",
        ]
        rows.append(row(cells, _kind(report, item)))
    preference = bar_chart([(r.dimension, _preferences(r)) for r in report.rows], 0.5, "HPA and margin HPA")
    correlation = bar_chart([(r.dimension, _correlations(r)) for r in report.rows], 0.0, "PLCC and SRCC")
    charts = figure(preference, f"Pairs in the labels’ order; guessing gets 0.5. {_PREFERENCE_KEY}") + figure(
        correlation, f"Correlation with the labels. {_CORRELATION_KEY}"
    )
    return section(
        "Agreement with the labels",
        "HPA is the share of same-prompt pairs with different labels that the model orders as the labels do, margin "
        "HPA the same where the labels differ by more than half a point. The last row pools the scores and the pairs "
        "of all dimensions. Lines on the bars are intervals.",
        table(names, rows) + f'<div class="grid">{charts}</div>',
    )


def _reliability(report: EvaluationReport, scores: Sequence[Scores]) -> str:
    def chart(item: Row, found: Scores) -> str:
        scale = score_range(found.predicted, found.truth, bins=report.bins)
        drawn = reliability_chart(
            item.calibration.groups, scale, f"Mean label against mean prediction, {item.dimension}"
        )
        bias, error = _signed(item.calibration.bias), _figure(item.calibration.error)
        return figure(drawn, f"<b>{escape(item.dimension)}</b>: bias {bias}, calibration error {error}")

    return section(
        "Expected against observed",
        "Images in groups of like predictions. A model whose scores mean what they say has its points on the diagonal; "
        "below it, it is too generous. Upright lines are two standard errors of the mean label to each side.",
        _grid(report, scores, chart),
    )


def _density(report: EvaluationReport, scores: Sequence[Scores]) -> str:
    def chart(item: Row, found: Scores) -> str:
        scale = score_range(found.predicted, found.truth, bins=report.bins)
        drawn = density_chart(
            found.predicted, found.truth, scale, f"Labels against predictions, {item.dimension}"
        )
        return figure(drawn, f"<b>{escape(item.dimension)}</b>: {item.agreement.n_items:,} scores")

    return section(
        "Labels against predictions",
        "The area of a disc is the number of scores there, within its own chart.",
        _grid(report, scores, chart),
    )


def _grid(report: EvaluationReport, scores: Sequence[Scores], chart: Callable[[Row, Scores], str]) -> str:
    """A chart for each row that has scores, the overall one first."""
    pairs = list(zip(report.rows, scores, strict=True))
    charts = [chart(item, found) for item, found in [pairs[-1], *pairs[:-1]] if len(found.predicted)]
    return f'<div class="grid">{"".join(charts)}</div>'


def _calibration(report: EvaluationReport) -> str:
    names = ["dimension", "bias", "calibration error", "NLL", "floor", "std", "entropy"]
    rows = [row(_calibration_cells(item), _kind(report, item)) for item in report.rows]
    of = likelihood_target([item.calibration for item in report.rows])
    words = (
        f"NLL is the mean negative log-likelihood of {of}, in nats; the floor is what predicting exactly these for "
        "each image would get, which no model can. Std and entropy (nats) are means over the predicted "
        "distributions: of two models that are as well calibrated, the sharper one says more."
        if of
        else "The source has no distributions for the likelihood of the annotations."
    )
    return section(
        "Calibration in figures",
        "Bias is the mean prediction minus the mean label, calibration error the mean distance from the diagonal "
        f"above, both in score points. {words}",
        table(names, rows) + _groups(report),
    )


def _calibration_cells(item: Row) -> list[str]:
    found = item.calibration
    return [
        item.dimension,
        _signed(found.bias),
        _figure(found.error),
        _figure(found.likelihood.nll if found.likelihood else None),
        _figure(found.likelihood.floor if found.likelihood else None),
        _figure(found.sharpness.std if found.sharpness else None),
        _figure(found.sharpness.entropy if found.sharpness else None),
    ]


def _groups(report: EvaluationReport) -> str:
    """The points of the reliability charts, folded away."""
    names = ["dimension", "mean prediction", "mean label", "standard error", "scores"]
    rows = [
        row([name, f"{g.predicted:.3f}", f"{g.label:.3f}", _figure(g.standard_error), f"{g.n:,}"])
        for name, found in _named_calibrations(report)
        for g in found.groups
    ]
    return f"<details><summary>The {len(rows)} groups of the charts above</summary>{table(names, rows)}</details>"


def _named_calibrations(report: EvaluationReport) -> Iterable[tuple[str, Calibration]]:
    return ((item.dimension, item.calibration) for item in report.rows)


def _about(report: EvaluationReport) -> str:
    source, data = report.source, report.data
    found = [
        (source.kind, source.path),
        ("contract", source.contract_sha256 or "not known"),
        ("data", f"{data.path}, {data.n_items:,} images of {data.n_prompts:,} prompts"),
        ("data, SHA-256", data.sha256),
    ]
    if source.bundle_sha256:
        found.insert(1, ("manifest", source.bundle_sha256))
    if reasoning := source.reasoning:
        found.append(
            (
                "traces",
                f"{reasoning.traces} of each question, at most {reasoning.max_new_tokens:,} tokens, seed "
                f"{reasoning.seed}; {reasoning.n_answered:,} of {reasoning.n_sampled:,} ended in an answer",
            )
        )
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return section("What was evaluated", "", table("", (row(pair) for pair in found), kind="about"))


def _preferences(item: Row) -> list[Bar]:
    figures, around = item.agreement, item.intervals
    return [Bar("after", figures.hpa, around.hpa), Bar("before", figures.margin_hpa, around.margin_hpa)]


def _correlations(item: Row) -> list[Bar]:
    figures, around = item.agreement, item.intervals
    return [Bar("after", figures.plcc, around.plcc), Bar("before", figures.srcc, around.srcc)]


def _kind(report: EvaluationReport, item: Row) -> str:
    return "overall" if item is report.overall else ""


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if interval is None:
        return _figure(value)
    between = " to " if interval.low < 0 else "–"  # a minus after a dash cannot be read
    return f"{_figure(value)} ({_figure(interval.low)}{between}{_figure(interval.high)})"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")

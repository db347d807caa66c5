"""The page of an evaluation: one file that loads nothing, escapes everything, and draws what the report says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.evaluation import DIMENSIONS, drawn_labels, drawn_predictions
from tests.support.pages import read
from zreward.calibration import Group
from zreward.evaluation import Labels, Predictions
from zreward.evaluation_charts import Bar, bar_chart, density_chart, reliability_chart, score_range
from zreward.evaluation_page import evaluation_page, write_evaluation_page
from zreward.evaluation_report import EvaluationReport, Reasoning, Source, evaluation_report
from zreward.metrics import Interval

NASTY = "<script>alert('x')</script>&\"δ"
SCALE = (1.0, 5.0)
LABELS = drawn_labels(np.random.default_rng(0))
PREDICTIONS = drawn_predictions(np.random.default_rng(1), LABELS)


def report(
    folder: Path, predictions: Predictions = PREDICTIONS, labels: Labels = LABELS, **source: Any
) -> EvaluationReport:
    data = folder / "data.jsonl"
    data.write_text("the data", encoding="utf-8")
    facts = dataclasses.replace(Source("bundle", "a/bundle", "ab" * 32, "cd" * 32), **source)
    return evaluation_report(facts, data, predictions, labels, n_resamples=20)


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    source = {"kind": "checkpoint", "path": f"a/{NASTY}", "notes": (NASTY,), "bundle_sha256": None}
    reasoning = Reasoning(4, 512, 0, 96, 90)
    page = evaluation_page(report(tmp_path, **source, reasoning=reasoning), PREDICTIONS, LABELS)
    reader = read(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object"}
    assert not {name for _, attrs in reader.tags for name in attrs} & {"src", "href", "srcset", "onload"}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert "alert(" in reader.text
    assert "90 of 96 ended in an answer" in reader.text
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Agreement with the labels",
        "Expected against observed",
        "Labels against predictions",
        "Calibration in figures",
        "What was evaluated",
    ]


def test_the_figures_are_those_of_the_report(tmp_path: Path) -> None:
    found = report(tmp_path)
    text = read(evaluation_page(found, PREDICTIONS, LABELS)).text
    for row in found.rows:
        figures, interval, calibration = row.agreement, row.intervals.hpa, row.calibration
        assert interval is not None
        assert calibration.likelihood is not None
        assert f"{figures.hpa:.3f} ({interval.low:.3f}–{interval.high:.3f})" in text
        assert f"{figures.n_pairs:,}" in text
        assert f"{calibration.likelihood.nll:.3f}" in text
        assert f"calibration error {calibration.error:.3f}" in text
    assert "single annotations, or of labels" in text
    assert "20 bootstrap draws" in text
    assert found.data.sha256 in text


def test_every_chart_is_an_image_with_words_and_is_drawn_for_each_row(tmp_path: Path) -> None:
    page = evaluation_page(report(tmp_path), PREDICTIONS, LABELS)
    charts = re.findall("<svg.*?</svg>", page)
    labels = []
    for chart in charts:
        tree = ElementTree.fromstring(chart)
        assert tree.get("role") == "img"
        labels.append(tree.get("aria-label"))
        assert not re.search("nan|inf", re.sub(">[^<]*<", "><", chart))
        for element in tree.iter():
            assert "style" not in element.keys()  # noqa: SIM118  # an element is no dictionary
    for name in (*DIMENSIONS, "overall"):
        assert f"Mean label against mean prediction, {name}" in labels
        assert f"Labels against predictions, {name}" in labels
    assert len(charts) == 2 + 2 * 3


def test_what_is_missing_is_a_dash_or_a_note(tmp_path: Path) -> None:
    means = np.full_like(LABELS.scores, 3.0)
    means[0], means[:, 1] = np.nan, np.nan
    constant = Predictions(means)
    found = report(tmp_path, constant, notes=("No distributions.",), contract_sha256=None)
    reader = read(evaluation_page(found, constant, LABELS))
    assert "48 of 48 images could not be scored in every labelled dimension" in reader.text
    assert "No distributions." in reader.text
    assert "not known" in reader.text
    assert "–" in reader.text
    assert "has no distributions for the likelihood" in reader.text


def test_the_page_is_written_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before", encoding="utf-8")
    found = report(tmp_path)
    write_evaluation_page(path, found, PREDICTIONS, LABELS)
    assert path.read_text(encoding="utf-8") == evaluation_page(found, PREDICTIONS, LABELS)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def circles(chart: str) -> list[tuple[float, float, float]]:
    tree = ElementTree.fromstring(chart)
    return [(float(c.get("cx", 0)), float(c.get("cy", 0)), float(c.get("r", 0))) for c in tree.iter("circle")]


def test_reliability_points_lie_on_the_diagonal_where_both_agree() -> None:
    groups = [Group(1.0, 1.0, 0.1, 20), Group(3.0, 3.0, 0.1, 20), Group(5.0, 4.0, None, 1)]
    chart = reliability_chart(groups, SCALE, NASTY)
    low, middle, high = circles(chart)
    tree = ElementTree.fromstring(chart)
    diagonal = next(line for line in tree.iter("line") if line.get("class") == "zero")
    assert (low[0], low[1]) == (float(diagonal.get("x1", 0)), float(diagonal.get("y1", 0)))
    assert middle[0] == pytest.approx((low[0] + high[0]) / 2)
    assert (high[1] - middle[1]) / (middle[1] - low[1]) == pytest.approx(0.5)
    assert len(list(tree.iter("path"))) == 2  # a single score has no error
    assert tree.get("aria-label") == NASTY


def test_disc_areas_are_counts() -> None:
    predicted = np.array([1.0] * 4 + [5.0])
    small, large = sorted(circles(density_chart(predicted, predicted, SCALE, "x")), key=lambda c: c[2])
    assert large[2] / small[2] == pytest.approx(2, rel=0.02)
    labels = np.array([2.5, 2.5, 2.4])
    assert (
        len(circles(density_chart(labels, labels, SCALE, "x"))) == 1
    )  # a half point is the middle of a cell


def test_bars_reach_their_values() -> None:
    rows = [("a", [Bar("after", 0.75, Interval(0.7, 0.8, 9)), Bar("before", None, None)]), (NASTY, [])]
    tree = ElementTree.fromstring(bar_chart(rows, 0.5, "x"))
    (bar,) = tree.iter("rect")
    lines = [float(line.get("x1", 0)) for line in tree.iter("line")]
    start, end = min(lines), max(lines)
    assert float(bar.get("x", 0)) == start
    assert float(bar.get("width", 0)) == pytest.approx((end - start) / 2, abs=0.1)
    assert len(list(tree.iter("path"))) == 1
    assert "–" in [text.text for text in tree.iter("text")]


def test_negative_correlations_have_room() -> None:
    tree = ElementTree.fromstring(
        bar_chart([("a", [Bar("after", -0.62, Interval(-0.71, -0.5, 9))])], 0.0, "x")
    )
    (bar,) = tree.iter("rect")
    ticks = [text.text for text in tree.iter("text") if text.get("class") == "tick"]
    assert "0.0" in ticks
    assert "1.0" in ticks
    assert any(tick and tick.startswith("−") for tick in ticks)
    assert 0 <= float(bar.get("x", -1)) < float(bar.get("x", 0)) + float(bar.get("width", 0)) <= 340


@pytest.mark.parametrize(
    ("values", "bins", "expected"),
    [
        ([2.2, 3.3], (1.0, 5.0), (1.0, 5.0)),
        ([2.2, 3.3], None, (2.0, 4.0)),
        ([3.0, 3.0], None, (3.0, 4.0)),
        ([0.4, 87.2], (1.0, 5.0), (0.0, 88.0)),
    ],
)
def test_ranges_hold_the_scale_and_all_scores(
    values: list[float], bins: tuple[float, ...] | None, expected: tuple[float, float]
) -> None:
    assert score_range(np.array(values), bins=bins) == expected

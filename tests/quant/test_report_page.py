"""zreward.quant.report_page: one file that loads nothing, escapes everything, and draws what the report says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.pages import read
from zreward.charts import number
from zreward.contract import DriftLimits
from zreward.quant.drift import DriftReport, LayerFacts, SizeFacts
from zreward.quant.report import check_drift, drift_report
from zreward.quant.report_charts import distribution_chart, histogram_chart, size_chart
from zreward.quant.report_page import report_page, write_report_page

BINS = np.arange(1.0, 5.5, 0.5)
LOOSE, TIGHT = DriftLimits(10, 10, 1, 1000), DriftLimits(1e-9, 1e-9, 1e-9, 1e-9)
NASTY = "<script>alert('x')</script>&\"δ"
POINTS = [("int4", 4.125, 0.01), (NASTY, 4.5, 0.002), ("int8", 8.0, 0.0)]


def report(**changes: object) -> DriftReport:
    rng = np.random.default_rng(0)
    before = rng.dirichlet(np.ones(9), (30, 2))
    after = 0.9 * before + 0.1 * rng.dirichlet(np.ones(9), (30, 2))
    arguments: dict[str, object] = {
        "bins": BINS,
        "dimensions": ("realism", NASTY),
        "labels": rng.uniform(1, 5, (30, 2)),
        "size": SizeFacts(1_000_000, 300_000, 4.125),
        "layers": [LayerFacts(f"{NASTY}.{i}", "int4-g128", 4.125, 0.001 * i, 0.1) for i in range(30)],
        "title": NASTY,
        "n_resamples": 20,
        **changes,
    }
    groups = arguments.pop("groups", np.arange(30) // 5)
    return drift_report(before, after, groups, **arguments)  # type: ignore[arg-type]


def rectangles(svg: str, kind: str) -> Iterator[dict[str, float]]:
    for node in ElementTree.fromstring(svg).iter("rect"):
        if node.get("class") == kind:
            yield {key: float(node.get(key, "nan")) for key in ("x", "y", "width", "height")}


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = report_page(report(), LOOSE, POINTS)
    reader = read(page)
    assert page.startswith("<!DOCTYPE html>")
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object"}
    assert not {name for _, attrs in reader.tags for name in attrs} & {"src", "href", "srcset", "onload"}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    headings = [
        "The limits",
        "How far the scores moved",
        "What it means for selection",
        "Distributions, from the typical to the worst",
        "Change of the expected score",
        "Layers",
        "Size against drift",
    ]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    assert [tag for tag, _ in reader.tags].count("h1") == 1


def test_all_text_is_escaped() -> None:
    page = report_page(report(), TIGHT, POINTS)
    assert "<script" not in page
    assert read(page).text.count(NASTY) > 40  # title, rows, layers, points and violations


def test_every_chart_has_a_text_alternative_and_every_table_cell_a_header() -> None:
    for tag, attrs in read(report_page(report(), LOOSE, POINTS)).tags:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs["aria-label"])
        if tag == "th":
            assert attrs["scope"] in ("row", "col", "colgroup")


def test_the_verdict_is_that_of_the_gate() -> None:
    good, bad = report_page(report(), LOOSE), report_page(report(), TIGHT)
    assert "Within the contract’s drift limits" in good
    assert 'class="over"' not in good
    assert "12 drift limits are exceeded" in bad
    text = read(bad).text
    for violation in check_drift(report(), TIGHT):
        assert violation in text
    one = report(dimensions=("realism", "taste"))
    row = one.rows[0]
    limits = dataclasses.replace(LOOSE, mean_kl=max(r.kl.mean for r in one.rows) * 0.9999)
    assert row.kl.mean <= max(r.kl.mean for r in one.rows)
    assert "1 drift limit is exceeded" in report_page(one, limits)


def test_what_was_not_given_is_left_out_and_what_is_undefined_is_a_dash() -> None:
    bare = report(labels=None, size=None, layers=(), groups=np.arange(30))
    page = report_page(bare, TIGHT, POINTS[:1])
    read(page)
    for absent in ("What it means", "<h2>Layers", "Size against drift", "HPA change", "bits each"):
        assert absent not in page
    assert "undefined" in page
    assert "<td>–</td>" in page
    unlabelled = report_page(report(labels=None), LOOSE)
    assert "float model’s own score" in unlabelled


def test_layers_come_most_sensitive_first_and_unmeasured_ones_by_their_error() -> None:
    page = report_page(report(), LOOSE)
    order = [int(i) for i in re.findall(r"<wbr>(\d+)<svg", page)]
    assert order == list(range(29, -1, -1))
    assert "6 more layers" in page
    unmeasured = [LayerFacts("a", "int8", 8.0, None, 0.1), LayerFacts("b", "int8", 8.0, None, 0.2)]
    page = report_page(report(layers=unmeasured), LOOSE)
    assert page.index(">b<svg") < page.index(">a<svg")
    assert "Sensitivities were not measured" in page


def test_the_bars_of_a_distribution_are_its_probabilities() -> None:
    example = report().examples[-1]
    svg = distribution_chart(list(BINS), example)
    for kind, probs in (("before", example.before), ("after", example.after)):
        bars = list(rectangles(svg, kind))
        assert [b["x"] for b in bars] == sorted(b["x"] for b in bars)
        heights = np.array([b["height"] for b in bars])
        assert heights / heights.sum() == pytest.approx(np.array(probs), abs=0.005)
        assert {round(b["y"] + b["height"]) for b in bars} == {122}  # all stand on the axis


def test_a_model_that_is_sure_fits_its_chart() -> None:
    sure = dataclasses.replace(report().examples[0], before=(1.0, *[0.0] * 8), after=(*[0.0] * 8, 1.0))
    svg = distribution_chart(list(BINS), sure)
    assert max(b["height"] for b in rectangles(svg, "before")) <= 150
    assert min(b["y"] for b in rectangles(svg, "after")) >= 0


def test_the_bars_of_a_histogram_are_its_counts() -> None:
    svg = histogram_chart([-0.3, -0.1, 0.1, 0.3], [10, 0, 40], "x")
    heights = [b["height"] for b in rectangles(svg, "after")]
    assert heights[0] == pytest.approx(heights[2] / 4, abs=0.1)
    assert heights[1] == 0
    rare = [b["height"] for b in rectangles(histogram_chart([-1, 0, 1], [1, 100000], "x"), "after")]
    assert rare[0] >= 1  # one item is seen among thousands


def test_points_lie_where_their_figures_say_and_labels_do_not_overlap() -> None:
    points = [
        ("a", 4.0, 0.1),
        ("b", 4.0, 0.001),
        ("c", 8.0, 0.01),
        ("no drift", 8.0, 0.0),
        ("bb", 4.02, 0.0011),
    ]
    tree = ElementTree.fromstring(size_chart(points, "a"))
    at = [(float(c.get("cx", "")), float(c.get("cy", "")), c.get("class")) for c in tree.iter("circle")]
    (a, b, c, none, _) = at
    assert [kind for *_, kind in at] == ["after"] + 4 * ["open"]
    assert a[0] == b[0] < c[0] == none[0]
    assert c[1] - a[1] == pytest.approx(b[1] - c[1], abs=0.2)  # equal decades, equal distances
    assert none[1] == max(y for _, y, _ in at)
    labels = [t for t in tree.iter("text") if t.get("class") == "label"]
    assert [t.text for t in labels] == [label for label, *_ in points]
    assert len({(t.get("x"), t.get("y")) for t in labels}) == len(labels)


@pytest.mark.parametrize("points", [[("a", 4.0, 0.0), ("b", 4.0, 0.0)], [("a", 4.0, 1e-3)] * 9])
def test_any_points_can_be_drawn(points: list[tuple[str, float, float]]) -> None:
    tree = ElementTree.fromstring(size_chart(points, "a"))
    assert len(list(tree.iter("circle"))) == len(points)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.071234, "0.0712"),
        (-0.5, "−0.500"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.00002, "2.0×10⁻⁵"),
        (-0.0000213, "−2.1×10⁻⁵"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_the_page_is_written_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "drift.html"
    write_report_page(path, report(), LOOSE)
    assert path.read_text(encoding="utf-8") == report_page(report(), LOOSE)
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_without_drift_has_a_page_too() -> None:
    flat = np.full((4, 1, 2), 0.5)
    same = drift_report(flat, flat, [0, 0, 1, 1], bins=(0.0, 1.0), dimensions=("yes",))
    assert "Within the contract’s drift limits" in report_page(same, DriftLimits(), [("quantized", 4, 0)] * 2)

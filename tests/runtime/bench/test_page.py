"""zreward.runtime.bench.page and tables: one file that loads nothing, escapes everything, draws what was measured."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.bench import report
from tests.support.pages import read
from zreward.runtime.bench.charts import ENDS, candidates_chart, sample_chart, size_chart, stage_chart
from zreward.runtime.bench.page import bench_page, write_page
from zreward.runtime.bench.report import BenchReport
from zreward.runtime.bench.stages import PARTS
from zreward.runtime.bench.tables import markdown_report, milliseconds, stage_rows, summary_rows

NASTY = "<script>alert('x')</script>&\"δ|"


def nasty() -> BenchReport:
    plain = report((120, 240), (1, 4), (1, None), separate=True, notes=(NASTY,))
    bundle = dataclasses.replace(plain.bundle, name=NASTY, contract_name=NASTY)
    return dataclasses.replace(
        plain, bundle=bundle, machine=dataclasses.replace(plain.machine, processor=NASTY)
    )


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = bench_page(nasty())
    reader = read(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object"}
    assert not {name for _, attrs in reader.tags for name in attrs} & {"src", "href", "srcset", "onload"}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert "<script" not in page
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Summary",
        "Stages",
        "Latency against image size",
        "Latency against candidates",
        "Spread of the samples",
        "Stages in figures",
        "Start",
        "Measured with",
    ]


def test_every_chart_has_a_text_alternative_and_every_cell_a_header() -> None:
    for tag, attrs in read(bench_page(nasty())).tags:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs["aria-label"])
        if tag == "th":
            assert attrs["scope"] in ("row", "col")


def test_charts_of_one_point_are_left_out_and_many_are_folded() -> None:
    page = bench_page(report())
    assert "Latency against" not in page
    assert "more configurations" not in page
    assert "2 more configurations" in bench_page(report(tuple(range(100, 800, 100)), (1, 2)))


def test_columns_are_as_tall_as_the_medians() -> None:
    results = report((120, 240)).results
    tree = ElementTree.fromstring(stage_chart(results, lambda r: "x"))
    rects = [(r.get("class"), float(r.get("height", "nan"))) for r in tree.iter("rect")]
    assert [kind for kind, _ in rects] == [name.replace("_", "-") for name in PARTS] * 2
    medians = [timing.median_ms for result in results for timing in result.parts.values()]
    scale = sum(medians) / sum(height for _, height in rects)
    assert [height * scale for _, height in rects] == pytest.approx(medians, abs=0.05 * scale + 0.01)


def test_points_lie_at_their_medians_and_stay_inside() -> None:
    sizes, many = report((100, 200, 400)).results, report(candidates=(1, 2, 8)).results
    for svg in (size_chart(sizes), candidates_chart(many), sample_chart(sizes[0])):
        tree = ElementTree.fromstring(svg)
        _, _, width, height = map(float, (tree.get("viewBox") or "").split())
        for circle in tree.iter("circle"):
            assert 0 < float(circle.get("cx", "")) < width
            assert 0 < float(circle.get("cy", "")) < height
    tree = ElementTree.fromstring(size_chart(sizes))
    ys = [float(c.get("cy", "")) for c in tree.iter("circle") if c.get("class") == "same-prompt"]
    medians = [r.stages["same_prompt"].median_ms for r in sizes]
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(
        (medians[1] - medians[0]) / (medians[2] - medians[0]), abs=0.01
    )


def test_a_chart_of_many_samples_is_thinned() -> None:
    one = report().results[0]
    long = {name: type(timing).of(timing.samples_ms * 50) for name, timing in one.stages.items()}
    tree = ElementTree.fromstring(sample_chart(dataclasses.replace(one, stages=long)))
    assert len(list(tree.iter("circle"))) <= len(ENDS) * 240


def test_rows_have_the_figures() -> None:
    found = report(separate=True).results[0]
    rows = stage_rows(found)
    assert [row[0] for row in rows][-1] == "total, not shared"
    vision = found.stages["vision"]
    assert rows[1][2] == milliseconds(vision.median_ms)
    assert rows[1][-1] == f"{vision.share:.0%}"
    assert rows[0][-2:] == ("–", "–")
    assert summary_rows([found])[0][:3] == ("120²", "1", "2")
    assert [milliseconds(v) for v in (0.123, 12.34, 1234.5)] == ["0.12", "12.3", "1,234"]


def test_markdown_has_every_table_and_no_stray_bar() -> None:
    text = markdown_report(nasty())
    assert text.count("|---|") == 2 + len(nasty().results)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {10, 9, 7}
    assert "<script" not in text


def test_it_is_written_in_one_step(tmp_path: Path) -> None:
    write_page(tmp_path / "bench.html", report())
    assert (tmp_path / "bench.html").read_text(encoding="utf-8") == bench_page(report())
    assert len(list(tmp_path.iterdir())) == 1

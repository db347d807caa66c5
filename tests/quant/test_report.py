"""zreward.quant.report: every figure against slow loops from its definition, laws, bad input, and the gate."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from zreward.commands.drift import drift_table
from zreward.contract import DriftLimits
from zreward.errors import QuantizationError
from zreward.metrics import Interval, PairShare, bootstrap_interval, hpa
from zreward.quant.drift import (
    CorrelationChange,
    DimensionDrift,
    DriftReport,
    Example,
    Histogram,
    LayerFacts,
    PreferenceChange,
    Regret,
    SizeFacts,
    Spread,
)
from zreward.quant.figures import best_of_regret, kl_divergence
from zreward.quant.report import check_drift, drift_report

BINS = np.arange(1.0, 5.5, 0.5)
NAMES = ("alignment", "realism")
Array = np.ndarray[Any, Any]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@dataclasses.dataclass
class Case:
    before: Array
    after: Array
    groups: Array
    labels: Array

    def report(self, **changes: Any) -> DriftReport:
        given_ = {"bins": BINS, "dimensions": NAMES, "labels": self.labels, "n_resamples": 50, **changes}
        before, after = given_.pop("before", self.before), given_.pop("after", self.after)
        return drift_report(before, after, given_.pop("groups", self.groups), **given_)


def case(n: int = 60, noise: float = 0.3, seed: int = 0, n_dimensions: int = 2) -> Case:
    """Two models on items of one to six candidates a prompt, in random order."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, n_dimensions, len(BINS)))
    labels = np.round(rng.uniform(1, 5, (n, n_dimensions)) * 5) / 5
    groups = rng.permutation(np.repeat(np.arange(n), rng.permutation(np.arange(n) % 6 + 1))[:n])
    return Case(softmax(logits), softmax(logits + rng.normal(0, noise, logits.shape)), groups, labels)


def overall(column: Array) -> Array:
    return np.column_stack([column, column.mean(axis=1)])


def flips_by_loops(a: Array, b: Array, groups: Array, margin: float = -1.0) -> tuple[float, int]:
    pairs = [
        (i, j)
        for i, j in combinations(range(len(a)), 2)
        if groups[i] == groups[j] and abs(a[i] - a[j]) > margin
    ]
    return sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs) / len(pairs), len(pairs)


def regret_by_enumeration(before: Array, after: Array, judge: Array, groups: Array) -> tuple[float, int, int]:
    """Every set of four candidates of every prompt, by brute force."""
    regrets, n_short = [], 0
    for prompt in np.unique(groups):
        own = np.flatnonzero(groups == prompt)
        if len(own) < 2:
            continue
        n_short += len(own) < 4
        sets = [list(chosen) for chosen in combinations(own, min(4, len(own)))]
        lost = [judge[s[np.argmax(before[s])]] - judge[s[np.argmax(after[s])]] for s in sets]
        regrets.append(np.mean(lost))
    return float(np.mean(regrets)), len(regrets), n_short


@pytest.mark.parametrize("seed", range(4))
def test_figures_match_loops(seed: int) -> None:
    c = case(seed=seed)
    report = c.report()
    kl = [[sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in zip(b, a, strict=True)]
          for b, a in zip(c.before, c.after, strict=True)]  # fmt: skip
    before, after = overall(c.before @ BINS), overall(c.after @ BINS)
    assert [row.dimension for row in report.rows] == ["alignment", "realism", "overall"]
    assert (report.n_items, report.n_prompts) == (60, len(np.unique(c.groups)))
    for d, row in enumerate(report.rows):
        b, a, label = before[:, d], after[:, d], overall(c.labels)[:, d]
        for spread, values in ((row.kl, overall(np.array(kl))[:, d]), (row.abs_difference, np.abs(a - b))):
            expected = (values.mean(), np.percentile(values, 99), values.max())
            assert dataclasses.astuple(spread) == pytest.approx(expected, abs=1e-12)
        assert row.mean_difference == pytest.approx(np.mean(a - b), abs=1e-12)
        assert row.pair_flips == PairShare(*flips_by_loops(b, a, c.groups))
        assert row.clear_pair_flips == PairShare(*flips_by_loops(b, a, c.groups, 0.5))
        assert row.srcc == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
        assert row.plcc == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
        for change, reference in (
            (row.label_srcc, scipy.stats.spearmanr),
            (row.label_plcc, scipy.stats.pearsonr),
        ):
            assert change is not None
            expected = (reference(b, label).statistic, reference(a, label).statistic)
            assert (change.before, change.after) == pytest.approx(expected)
            assert change.change == pytest.approx(expected[1] - expected[0])
        assert row.best_of_4_regret is not None
        value, n_prompts, n_short = regret_by_enumeration(b, a, label, c.groups)
        assert row.best_of_4_regret == Regret(pytest.approx(value, abs=1e-12), "labels", n_prompts, n_short)


def slow_interval(before: Array, after: Array, labels: Array, groups: Array, margin: float) -> Interval:
    """Drawn by items, with the whole metric computed on each draw."""

    def difference(rows: Array, drawn: Array) -> float:
        new = hpa(after[rows], labels[rows], drawn, margin).value
        return new - hpa(before[rows], labels[rows], drawn, margin).value

    return bootstrap_interval(difference, groups, n_resamples=40, seed=3)


def test_preference_changes_and_their_intervals_are_those_of_resampled_items() -> None:
    c = case(n=80, noise=0.8)
    for d, row in enumerate(c.report(n_resamples=40, seed=3).rows):
        b, a, label = (overall(x)[:, d] for x in (c.before @ BINS, c.after @ BINS, c.labels))
        for change, margin in ((row.hpa, 0.0), (row.margin_hpa, 0.5)):
            assert change is not None
            old, new = hpa(b, label, c.groups, margin), hpa(a, label, c.groups, margin)
            assert (change.before, change.after) == pytest.approx((old.value, new.value))
            assert change.change == pytest.approx(new.value - old.value)
            assert change.n_pairs == old.n_pairs
            assert change.interval is not None
            slow = slow_interval(b, a, label, c.groups, margin)
            assert dataclasses.astuple(change.interval) == pytest.approx(dataclasses.astuple(slow), abs=1e-12)


probabilities = st.integers(2, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.floats(-30, 30), min_size=18, max_size=18), min_size=2 * n, max_size=2 * n
    ).map(lambda rows: softmax(np.array(rows).reshape(2, n, 2, 9)))
)


@given(probabilities, st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_laws(both: Array, n_prompts: int) -> None:
    before, after = both
    groups = np.arange(len(before)) % n_prompts
    forth, back, same = (
        drift_report(x, y, groups, bins=BINS, dimensions=NAMES, n_resamples=10)
        for x, y in ((before, after), (after, before), (before, before))
    )
    for one, other, zero in zip(forth.rows, back.rows, same.rows, strict=True):
        assert 0 <= one.kl.mean <= one.kl.max
        assert one.kl.p99 <= one.kl.max
        assert one.abs_difference == other.abs_difference
        assert one.pair_flips == other.pair_flips
        assert one.mean_difference == -other.mean_difference
        assert one.hpa is None
        if one.best_of_4_regret is not None:  # the float model's pick is the best in its own eyes
            assert one.best_of_4_regret.value >= -1e-12
            assert one.best_of_4_regret.judge == "before"
        assert zero.kl == zero.abs_difference == Spread(0.0, 0.0, 0.0)
        for flips in (zero.pair_flips, zero.clear_pair_flips):
            assert flips is None or flips.value == 0
        assert zero.srcc is None or zero.srcc == pytest.approx(1)
        assert zero.best_of_4_regret is None or zero.best_of_4_regret.value == 0
    assert check_drift(same, DriftLimits()) == []
    assert sum(map(sum, forth.histogram.counts)) == 3 * len(before)


def test_a_bin_that_the_quantized_model_rules_out_gives_a_large_finite_divergence() -> None:
    before, after = np.full((2, 1, 2), 0.5), np.array([[[1.0, 0.0]], [[0.5, 0.5]]])
    kl = kl_divergence(before, after)
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / float(np.finfo(np.float32).tiny))
    assert kl[:, 0] == pytest.approx([expected, 0.0])
    assert kl_divergence(after, before)[0, 0] == pytest.approx(math.log(2))  # 0·ln 0 = 0


def test_best_of_four_looks_at_every_set_and_prefers_the_earlier_of_equals() -> None:
    before, after = np.array([5.0, 4, 3, 2, 1]), np.array([1.0, 2, 3, 4, 5])
    judge, prompts = np.array([10.0, 20, 30, 40, 50]), np.zeros(5, int)
    assert best_of_regret(before, after, judge, prompts) == (
        pytest.approx(regret_by_enumeration(before, after, judge, prompts)[0]),
        1,
        0,
    )
    tied = np.ones(5)
    value = regret_by_enumeration(before, tied, judge, prompts)[0]
    assert best_of_regret(before, tied, judge, prompts) == (pytest.approx(value), 1, 0)
    assert best_of_regret(before, after, judge, np.arange(5)) is None


def test_what_is_undefined_is_none() -> None:
    c = case()
    alone = c.report(groups=np.arange(60))
    for row in alone.rows:
        assert row.pair_flips is row.clear_pair_flips is row.hpa is row.best_of_4_regret is None
        assert row.label_srcc is not None
    unlabelled = c.report(labels=None)
    for row in unlabelled.rows:
        assert row.label_srcc is row.label_plcc is row.hpa is row.margin_hpa is None
        assert row.pair_flips is not None
    constant = c.report(labels=np.full_like(c.labels, 3.0))
    for row in constant.rows:
        assert row.label_srcc is row.hpa is None
        assert row.best_of_4_regret is not None
        assert row.best_of_4_regret.value == pytest.approx(0, abs=1e-12)
    one_prompt = c.report(groups=np.zeros(60, int)).rows[0]
    assert one_prompt.hpa is not None
    assert one_prompt.hpa.interval is None
    flat = np.full_like(c.before, 1 / 9)
    assert c.report(after=flat).rows[0].srcc is None
    assert check_drift(alone, DriftLimits(100, 100, 1e-6, 1e6)) == []


def test_prompts_may_be_texts_and_sums_need_not_be_exact() -> None:
    c = case()
    texts = [f"prompt {g:03}" for g in c.groups]
    assert (
        c.report(groups=texts, before=c.before * 1.0005).rows[0].pair_flips == c.report().rows[0].pair_flips
    )


def nan_at(values: Array, value: float = math.nan) -> Array:
    values = values.copy()
    values[3, 1] = value
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": nan_at(case().before)}, r"before\[3, 1\] is not a probability distribution"),
        ({"after": nan_at(case().after, math.inf)}, r"after\[3, 1\] is not a probability distribution"),
        ({"after": nan_at(case().after, -0.1)}, r"after\[3, 1\] is not"),
        ({"after": case().after * 1.1}, r"120 of 120 are not"),
        ({"after": case().after[:, :, :8]}, r"after has shape \[60, 2, 8\]; expected \[items, 2 dim"),
        ({"after": case().after[:50]}, "60 items before and 50 after"),
        ({"before": case().before[:1], "after": case().after[:1]}, "at least two"),
        ({"labels": nan_at(case().labels)}, r"labels\[3\] is not finite"),
        ({"labels": case().labels[:, 0]}, r"labels have shape \[60\]; expected \[60, 2\]"),
        ({"groups": np.arange(59)}, r"groups has shape \[59\]"),
        ({"groups": np.zeros(60)}, "groups has .*float64"),
        ({"dimensions": ("alignment",)}, "1 dimensions"),
        ({"bins": BINS[::-1]}, "strictly increasing"),
        ({"bins": [*BINS[:8], math.nan]}, "strictly increasing"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        case().report(**change)


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_facts_must_be_amounts(bad: float) -> None:
    with pytest.raises(QuantizationError, match="layer up_proj: relative_error"):
        LayerFacts("up_proj", "int4-g128", 4.125, relative_error=bad)
    with pytest.raises(QuantizationError, match="size: bits_per_weight"):
        SizeFacts(2, 1, bad)


def test_the_gate_names_each_limit_that_is_exceeded() -> None:
    report = case(noise=1.0).report()
    row = report.rows[1]
    assert row.pair_flips is not None
    limits = DriftLimits(1e3, 1e3, 1.0, 1e3)
    assert check_drift(report, limits) == []
    tight = dataclasses.replace(limits, mean_abs_difference=row.abs_difference.mean * 0.999999)
    words = [text for text in check_drift(report, tight) if text.startswith("realism")]
    assert len(words) == 1
    shown, allowed = words[0].removeprefix("realism: mean |Δμ| ").split(" exceeds the contract's ")
    assert float(shown) > float(allowed)
    exact = dataclasses.replace(limits, mean_kl=max(r.kl.mean for r in report.rows))
    assert check_drift(report, exact) == []  # a limit may be reached
    everything = check_drift(report, DriftLimits(1e-9, 1e-9, 1e-9, 1e-9))
    assert len(everything) == 12
    assert f"realism: share of flipped pairs {100 * row.pair_flips.value:.2g} % exceeds" in everything[6]


def test_the_default_limits_part_good_quantization_from_broken_one() -> None:
    """Figures of a student of 2.4 million parameters (mean |Δμ|, p99, flips)."""
    report = case().report()

    def judged(mean: float, p99: float, flips: float) -> list[str]:
        rows = [
            dataclasses.replace(
                row,
                abs_difference=Spread(mean, p99, p99),
                pair_flips=PairShare(flips, 3000),
                kl=Spread(0.001, 0.01, 0.1),
            )
            for row in report.rows
        ]
        return check_drift(dataclasses.replace(report, rows=tuple(rows)), DriftLimits())

    assert judged(0.0047, 0.047, 0.0046) == []  # 8 bits, activations per token
    assert judged(0.022, 0.29, 0.012) == []  # 4 bits, groups of 64
    assert len(judged(0.070, 0.68, 0.043)) == 9  # 8 bits, activations per tensor
    assert judged(0.070, 0.1, 0.01)[0] == "alignment: mean |Δμ| 0.07 exceeds the contract's 0.03"


def full_report() -> DriftReport:
    layers = [
        LayerFacts("model.layers.0.mlp.up_proj", "int4-g128", 4.125, 0.002, 0.08),
        LayerFacts("model.layers.1.mlp.up_proj", "int8", 8.02),
    ]
    return case().report(size=SizeFacts(1000, 300, 4.2), layers=layers, title="int4 <GPTQ>")


def test_json_round_trip(tmp_path: Path) -> None:
    report = full_report()
    report.save(tmp_path / "drift.json")
    assert DriftReport.load(tmp_path / "drift.json") == report
    bare = case().report(labels=None, groups=np.arange(60))
    assert DriftReport.from_dict(json.loads(json.dumps(bare.to_dict(), allow_nan=False))) == bare


def damaged(change: dict[str, Any]) -> dict[str, Any]:
    return {**json.loads(json.dumps(full_report().to_dict())), **change}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"schema": "zreward.contract"},
        {"rows": []},
        {"colour": 1},
        {"histogram": {"edges": [0, 1], "counts": []}},
        {"bins": [1.0, 2.0]},
        {"n_items": "60"},
    ],
)
def test_what_is_not_a_report_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match=r"^drift report"):
        DriftReport.from_dict(damaged(change))


SCHEMA = json.loads(
    (resources.files("zreward") / "assets" / "schemas" / "drift.schema.json").read_text(encoding="utf-8")
)


def test_the_schema_accepts_reports_and_refuses_others() -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for report in (full_report(), case().report(labels=None, groups=np.arange(60))):
        validator.validate(json.loads(json.dumps(report.to_dict())))
    for change in ({"version": 2}, {"rows": []}, {"colour": 1}, {"n_items": 1}, {"size": {}}):
        assert not validator.is_valid(damaged(change))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        (None, DriftReport),
        ("row", DimensionDrift),
        ("spread", Spread),
        ("pair_share", PairShare),
        ("correlation_change", CorrelationChange),
        ("preference_change", PreferenceChange),
        ("interval", Interval),
        ("regret", Regret),
        ("histogram", Histogram),
        ("example", Example),
        ("size", SizeFacts),
        ("layer", LayerFacts),
    ],
)
def test_the_schema_has_the_fields_of_the_dataclasses(name: str | None, cls: type) -> None:
    node = SCHEMA["$defs"][name] if name else SCHEMA
    stamp = set() if name else {"schema", "version"}
    fields = dataclasses.fields(cls)
    assert set(node["properties"]) == stamp | {f.name for f in fields}
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    assert set(node["required"]) == stamp | required
    assert node["additionalProperties"] is False
    for inner in node["properties"].values():
        assert "description" in inner or "description" in SCHEMA["$defs"][inner["$ref"].rsplit("/")[-1]]


def test_examples_go_from_the_median_to_the_worst() -> None:
    c = case()
    kl = kl_divergence(c.before, c.after)
    examples = c.report().examples
    assert [e.rank for e in examples] == ["median", "90th percentile", "worst", "worst", "worst"]
    assert [e.kl for e in examples] == sorted(e.kl for e in examples)
    assert examples[0].kl == pytest.approx(np.quantile(kl, 0.5, method="nearest"))
    assert examples[-1].kl == pytest.approx(kl.max())
    for example in examples:
        d = NAMES.index(example.dimension)
        assert example.kl == pytest.approx(kl[example.item, d])
        assert example.after == pytest.approx(tuple(c.after[example.item, d]))


def test_the_histogram_counts_each_item_once_and_what_lies_outside_at_the_ends() -> None:
    c = case(n=400)
    after = c.after.copy()
    after[0, 0] = np.eye(9)[0 if c.before[0, 0] @ BINS > 3 else 8]
    histogram = c.report(after=after).histogram
    assert [sum(counts) for counts in histogram.counts] == [400] * 3
    assert histogram.edges[0] == -histogram.edges[-1]
    difference = (after - c.before)[:, 0] @ BINS
    inside = np.histogram(difference, histogram.edges)[0]
    assert list(histogram.counts[0][1:-1]) == inside[1:-1].tolist()
    assert abs(difference[0]) > histogram.edges[-1]


def test_the_table_fits_80_columns() -> None:
    from rich.console import Console

    for report in (full_report(), case(noise=3.0).report(), case().report(labels=None, groups=np.arange(60))):
        console = Console(width=80, file=io.StringIO())
        with console.capture() as capture:
            console.print(drift_table(report))
        text = capture.get()
        assert max(map(len, text.splitlines())) <= 80
        assert f"{report.rows[0].kl.mean:.4f}" in text
        assert "…" not in text
    assert "–" in text


def test_a_report_on_thousands_of_items_takes_seconds() -> None:
    c = case(n=6000, n_dimensions=4)
    start = time.process_time()
    c.report(groups=np.repeat(np.arange(1000), 6), dimensions=("a", "b", "c", "d"), n_resamples=1000)
    assert time.process_time() - start < 10

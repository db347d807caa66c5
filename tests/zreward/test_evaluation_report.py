"""The report of an evaluation: intervals against a plain bootstrap, what calibration rests on, and the JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.support.evaluation import CANDIDATES, N_PROMPTS, drawn_labels, drawn_predictions
from zreward.contract import DEFAULT_BINS
from zreward.errors import MetricError
from zreward.evaluation import Floats, Labels, Predictions, compare, compared_scores
from zreward.evaluation_intervals import Intervals, agreement_intervals
from zreward.evaluation_report import EvaluationReport, Source, evaluation_report

Evaluate = Callable[..., EvaluationReport]


@pytest.fixture
def labels() -> Labels:
    return drawn_labels(np.random.default_rng(0))


@pytest.fixture
def predictions(labels: Labels) -> Predictions:
    return drawn_predictions(np.random.default_rng(1), labels)


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """An evaluation whose data file exists, without intervals."""

    def evaluate(predictions: Predictions, labels: Labels, n_resamples: int = 0) -> EvaluationReport:
        data = tmp_path / "data.jsonl"
        data.write_text("the data", encoding="utf-8")
        source = Source("bundle", "a/bundle", "ab" * 32, "cd" * 32, packages=("onnxruntime", "no-such"))
        return evaluation_report(source, data, predictions, labels, n_resamples=n_resamples)

    return evaluate


def plain_hpa(predicted: Floats, truth: Floats, groups: list[tuple[int, ...]], margin: float) -> float:
    """Pairs by a double loop."""
    credits = [
        (np.sign(predicted[a] - predicted[b]) * np.sign(truth[a] - truth[b]) + 1) / 2
        for a in range(len(truth))
        for b in range(a)
        if groups[a] == groups[b] and abs(truth[a] - truth[b]) > margin + 1e-9
    ]
    return float(np.mean(credits))


def test_intervals_against_a_bootstrap_in_plain_loops(labels: Labels, predictions: Predictions) -> None:
    """The overall row: a drawn prompt comes with its images in all dimensions; its copies are not compared."""
    n_resamples, seed = 25, 3
    found = agreement_intervals(compared_scores(predictions.means, labels)[-1], n_resamples, seed)
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in ("plcc", "srcc", "hpa", "margin_hpa")}
    for _ in range(n_resamples):
        predicted, truth, groups = [], [], []
        for copy, prompt in enumerate(rng.integers(N_PROMPTS, size=N_PROMPTS)):
            for item in range(prompt * CANDIDATES, (prompt + 1) * CANDIDATES):
                for dimension in range(2):
                    predicted.append(predictions.means[item, dimension])
                    truth.append(labels.scores[item, dimension])
                    groups.append((copy, dimension))
        p, t = np.array(predicted), np.array(truth)
        draws["plcc"].append(float(stats.pearsonr(p, t).statistic))
        draws["srcc"].append(float(stats.spearmanr(p, t).statistic))
        draws["hpa"].append(plain_hpa(p, t, groups, 0.0))
        draws["margin_hpa"].append(plain_hpa(p, t, groups, 0.5))
    for name, values in draws.items():
        interval = getattr(found, name)
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
        assert interval.n_resamples == n_resamples


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """Figures of 60 data sets against those of a very large one from the same source."""
    rng = np.random.default_rng(5)
    whole = drawn_labels(rng, 3000)
    truth = compare(drawn_predictions(rng, whole).means, whole)[0]
    names = ("plcc", "srcc", "hpa", "margin_hpa")
    hits = dict.fromkeys(names, 0)
    for _ in range(60):
        labels = drawn_labels(rng, 40)
        found = agreement_intervals(
            compared_scores(drawn_predictions(rng, labels).means, labels)[0], 120, int(rng.integers(1 << 30))
        )
        for name in names:
            interval = getattr(found, name)
            hits[name] += interval.low <= getattr(truth, name) <= interval.high
    for name in names:
        assert 50 <= hits[name] <= 60, (name, hits)


def test_no_intervals_where_none_are_asked_for_or_too_few_prompts_decide(
    labels: Labels, predictions: Predictions
) -> None:
    scores = compared_scores(predictions.means, labels)[0]
    assert agreement_intervals(scores, 0, 0) == Intervals()
    one_prompt = dataclasses.replace(
        labels, pairs=tuple(dataclasses.replace(p, prompt="p") for p in labels.pairs)
    )
    assert agreement_intervals(compared_scores(predictions.means, one_prompt)[0], 20, 0) == Intervals()
    constant = compared_scores(np.full_like(labels.scores, 3.0), labels)[0]
    found = agreement_intervals(constant, 20, 0)
    assert found.plcc is None
    assert found.hpa is not None
    assert (found.hpa.low, found.hpa.high) == (0.5, 0.5)


def test_rows_are_the_agreement_with_calibration_beside_it(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    report = evaluate(predictions, labels, 20)
    assert [row.agreement for row in report.rows] == compare(predictions.means, labels)
    difference = predictions.means - labels.scores
    for column, row in enumerate(report.rows[:2]):
        assert row.calibration.bias == pytest.approx(difference[:, column].mean())
        assert sum(group.n for group in row.calibration.groups) == row.agreement.n_items == 48
    assert report.overall.calibration.bias == pytest.approx(difference.mean())
    assert report.overall.calibration.sharpness is not None
    assert predictions.probs is not None
    entropies = stats.entropy(predictions.probs, axis=-1)
    assert report.overall.calibration.sharpness.entropy == pytest.approx(entropies.mean())


def test_likelihoods_are_of_annotations_where_there_are_any(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    alignment, realism, overall = (row.calibration.likelihood for row in evaluate(predictions, labels).rows)
    assert alignment is not None
    assert realism is not None
    assert predictions.probs is not None
    expected = [
        -sum(
            count * np.log(predictions.probs[item, 0, DEFAULT_BINS.index(score)])
            for score, count in zip(histogram.scores, histogram.counts, strict=True)
        )
        / histogram.n
        for item, histogram in enumerate(pair.annotations["alignment"] for pair in labels.pairs)
    ]
    assert (alignment.of, alignment.n_items) == ("annotations", 48)
    assert alignment.nll == pytest.approx(np.mean(expected))
    assert alignment.nll > alignment.floor > 0
    assert realism.of == "labels"
    places = [DEFAULT_BINS.index(score) for score in labels.scores[:, 1]]
    likelihoods = predictions.probs[np.arange(48), 1, places]
    assert realism.nll == pytest.approx(-np.log(likelihoods).mean())
    assert realism.floor == 0
    assert overall == alignment  # never mixed


def test_some_annotated_items_are_not_mixed_with_labels(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    few = tuple(dataclasses.replace(p, annotations={}) if i >= 10 else p for i, p in enumerate(labels.pairs))
    found = evaluate(predictions, dataclasses.replace(labels, pairs=few)).rows[0].calibration.likelihood
    assert found is not None
    assert (found.of, found.n_items) == ("annotations", 10)


def test_failed_and_unlabelled_scores_are_left_out_and_only_failed_ones_counted(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    assert predictions.probs is not None
    scores, probs = labels.scores.copy(), predictions.probs.copy()
    scores[7, 1] = probs[7, 1] = np.nan
    probs[3] = probs[5, 0] = np.nan
    report = evaluate(
        Predictions.of_distributions(probs, DEFAULT_BINS), dataclasses.replace(labels, scores=scores)
    )
    assert [row.n_failed for row in report.rows] == [2, 1, 3]
    assert [row.agreement.n_items for row in report.rows] == [46, 46, 92]
    assert (report.data.n_items, report.data.n_failed) == (48, 2)
    assert report.failures is not None
    assert "2 of 48 images" in report.failures
    assert "3 scores" in report.failures
    everything = np.full_like(probs, np.nan)
    with pytest.raises(MetricError, match="no item of the data set was scored"):
        evaluate(Predictions.of_distributions(everything, DEFAULT_BINS), labels)


def test_a_dimension_may_be_called_overall(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    assert predictions.probs is not None
    probs = predictions.probs.copy()
    probs[4, 0] = probs[4:6, 1] = np.nan
    named = dataclasses.replace(labels, dimensions=("alignment", "overall"))
    report = evaluate(Predictions.of_distributions(probs, DEFAULT_BINS), named)
    assert [row.n_failed for row in report.rows] == [1, 2, 3]
    assert report.overall.agreement.n_items == 96 - 3


def test_a_dimension_that_failed_everywhere_has_no_figures(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    assert predictions.probs is not None
    probs = predictions.probs.copy()
    probs[:, 1] = np.nan
    _, realism, overall = evaluate(Predictions.of_distributions(probs, DEFAULT_BINS), labels, 20).rows
    assert realism.agreement.n_items == 0
    assert realism.agreement.plcc is realism.agreement.hpa is realism.calibration.bias is None
    assert realism.calibration.groups == ()
    assert realism.intervals == Intervals()
    assert overall.agreement.n_items == 48


def test_without_distributions_means_are_still_judged(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    report = evaluate(Predictions(predictions.means), labels)
    full = evaluate(predictions, labels)
    assert report.bins is None
    for row, other in zip(report.rows, full.rows, strict=True):
        assert row.agreement == other.agreement
        assert row.calibration.groups == other.calibration.groups
        assert row.calibration.likelihood is row.calibration.sharpness is None


def test_labels_off_the_scale_are_said_and_have_no_likelihood(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    scores = labels.scores.copy()
    scores[:, 1] *= 20
    report = evaluate(predictions, dataclasses.replace(labels, scores=scores))
    alignment, realism, overall = (row.calibration for row in report.rows)
    assert alignment.likelihood is not None
    assert realism.likelihood is overall.likelihood is None
    assert realism.sharpness is not None
    assert len(report.notes) == 1
    assert "realism lie off the model's scale from 1 to 5" in report.notes[0]


def test_the_json_is_complete_and_plain(labels: Labels, predictions: Predictions, evaluate: Evaluate) -> None:
    report = evaluate(predictions, labels, 20)
    value = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(value) == [
        "schema", "version", "source", "data", "bins", "bootstrap", "rows", "notes", "versions",
    ]  # fmt: skip
    assert value["source"] == {
        "kind": "bundle",
        "path": "a/bundle",
        "contract_sha256": "ab" * 32,
        "bundle_sha256": "cd" * 32,
        "reasoning": None,
    }
    assert value["data"]["sha256"] == hashlib.sha256(b"the data").hexdigest()
    assert (value["data"]["n_items"], value["data"]["n_prompts"]) == (48, 12)
    assert value["bootstrap"] == {"level": 0.95, "resamples": 20, "seed": 0}
    assert {"zreward", "python", "numpy", "onnxruntime"} == set(value["versions"])
    row = value["rows"][0]
    assert row["dimension"] == "alignment"
    assert row["intervals"]["hpa"]["low"] <= row["hpa"] <= row["intervals"]["hpa"]["high"]
    assert row["calibration"]["groups"][0].keys() == {"predicted", "label", "standard_error", "n"}
    assert row["calibration"]["likelihood"]["of"] == "annotations"


def test_every_field_of_the_json_is_documented(
    labels: Labels, predictions: Predictions, evaluate: Evaluate
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list | tuple) else set()

    found = keys({k: v for k, v in evaluate(predictions, labels, 20).to_dict().items() if k != "versions"})
    assert [key for key in sorted(found) if f"`{key}`" not in text] == []

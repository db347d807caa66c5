"""Agreement of scores with labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from zreward.errors import MetricError, UsageError
from zreward.evaluation import Labels, Predictions, compare, compared_scores, read_labels
from zreward.pairs import Pair

DIMENSIONS = ("alignment", "realism")


@pytest.fixture
def labels() -> Labels:
    """Ten prompts with four candidates each."""
    scores = np.random.default_rng(0).integers(2, 11, (40, 2)) / 2
    pairs = tuple(Pair(f"prompt {i // 4}", Path(f"{i}.png"), {}) for i in range(40))
    return Labels(DIMENSIONS, pairs, tuple(str(i) for i in range(40)), scores)


def test_perfect_scores_agree_perfectly(labels: Labels) -> None:
    for row in compare(labels.scores, labels):
        assert row.plcc == pytest.approx(1.0)
        assert row.hpa == row.margin_hpa == 1.0


def test_figures_against_scipy_and_counting(labels: Labels) -> None:
    predictions = labels.scores + np.random.default_rng(1).normal(0, 1, labels.scores.shape)
    alignment, _, overall = compare(predictions, labels)
    truth = labels.scores[:, 0]
    assert alignment.srcc == pytest.approx(stats.spearmanr(predictions[:, 0], truth).statistic)
    right = [
        (predictions[a, d] > predictions[b, d]) == (labels.scores[a, d] > labels.scores[b, d])
        for d in range(2)
        for a in range(40)
        for b in range(a)
        if a // 4 == b // 4 and labels.scores[a, d] != labels.scores[b, d]
    ]
    assert overall.hpa == pytest.approx(np.mean(right))
    assert overall.n_pairs == len(right)


def test_failed_items_are_left_out_and_counted(labels: Labels) -> None:
    predictions = labels.scores.copy()
    predictions[3] = np.nan
    alignment, _, overall = compare(predictions, labels)
    assert (alignment.n_items, overall.n_items) == (39, 78)
    with pytest.raises(MetricError, match="no item"):
        compare(np.full_like(predictions, np.nan), labels)


def test_a_constant_has_no_correlation_but_an_accuracy(labels: Labels) -> None:
    row = compare(np.full_like(labels.scores, 3.0), labels)[0]
    assert row.plcc is None
    assert row.srcc is None
    assert row.hpa == 0.5


def write_data(path: Path, *dimensions: tuple[str, ...]) -> Path:
    lines = [
        json.dumps({"prompt": "p", "image": "x.png", "scores": dict.fromkeys(names, 3.0)})
        for names in dimensions
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_dimensions_may_be_missing(tmp_path: Path) -> None:
    labels = read_labels(write_data(tmp_path / "data.jsonl", ("realism",), ("alignment", "realism")))
    assert labels.dimensions == ("realism", "alignment")
    np.testing.assert_equal(labels.scores, [[3.0, np.nan], [3.0, 3.0]])
    with pytest.raises(UsageError, match="empty"):
        read_labels(write_data(tmp_path / "empty.jsonl"))


def test_missing_labels_are_left_out_of_their_dimension_alone(labels: Labels) -> None:
    predictions = labels.scores + np.random.default_rng(1).normal(0, 1, labels.scores.shape)
    gaps = labels.scores.copy()
    gaps[::3, 1] = np.nan
    full, _, _ = compare(predictions, labels)
    alignment, realism, overall = compare(predictions, dataclasses.replace(labels, scores=gaps))
    kept = ~np.isnan(gaps[:, 1])
    alone = Labels(
        ("realism",), tuple(p for p, k in zip(labels.pairs, kept, strict=True) if k), (), gaps[kept][:, 1:]
    )
    assert alignment == full
    assert realism == compare(predictions[kept][:, 1:], alone)[0]
    assert overall.n_pairs == alignment.n_pairs + realism.n_pairs


def test_rows_hold_what_has_prediction_and_label(labels: Labels) -> None:
    predictions, gaps = labels.scores + 0.25, labels.scores.copy()
    predictions[3, 0] = gaps[5, 1] = np.nan
    rows = compared_scores(predictions, dataclasses.replace(labels, scores=gaps))
    assert [row.dimension for row in rows] == [*DIMENSIONS, "overall"]
    assert [len(row.items) for row in rows] == [39, 39, 78]
    for row in rows:
        np.testing.assert_array_equal(row.predicted, row.truth + 0.25)
        np.testing.assert_array_equal(row.truth, gaps[row.items, row.columns])
        np.testing.assert_array_equal(row.prompts, row.items // 4)
        assert len(set(row.groups)) == 10 * len(set(row.columns))


def test_means_of_distributions() -> None:
    probs = np.array([[[0.25, 0.75], [1.0, 0.0]], [[np.nan, np.nan], [0.5, 0.5]]])
    predictions = Predictions.of_distributions(probs, (1.0, 3.0))
    np.testing.assert_array_equal(predictions.means, [[2.5, 1.0], [np.nan, 2.0]])
    assert predictions.bins == (1.0, 3.0)

"""Calibration against scipy, brute force and examples by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zreward.annotations import Histogram
from zreward.calibration import (
    annotation_shares,
    bias,
    calibration_error,
    expected_against_observed,
    likelihood,
    shares_on_bins,
    sharpness,
)
from zreward.contract import DEFAULT_BINS

RNG = np.random.default_rng(0)


def test_groups_by_hand() -> None:
    """40 scores make two groups: twenty predicted 2 and labelled 2.5, twenty predicted 4 and labelled 1 or 5."""
    predicted = np.array([4.0] * 20 + [2.0] * 20)
    truth = np.array([1.0, 5.0] * 10 + [2.5] * 20)
    low, high = expected_against_observed(predicted, truth)
    assert (low.predicted, low.label, low.standard_error, low.n) == (2.0, 2.5, 0.0, 20)
    assert (high.predicted, high.label, high.n) == (4.0, 3.0, 20)
    assert high.standard_error == pytest.approx(stats.sem(truth[:20]))
    assert calibration_error((low, high)) == pytest.approx((20 * 0.5 + 20 * 1.0) / 40)
    assert bias(predicted, truth) == pytest.approx(3.0 - 2.75)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 1), (19, 1), (39, 1), (40, 2), (75, 3), (200, 10), (5000, 10)]
)
def test_groups_have_twenty_scores_and_there_are_ten_at_most(n: int, expected: int) -> None:
    predicted, truth = RNG.normal(3, 1, n), RNG.normal(3, 1, n)
    groups = expected_against_observed(predicted, truth)
    assert len(groups) == expected
    assert sum(group.n for group in groups) == n
    assert n < 20 or min(group.n for group in groups) >= 20
    assert max(group.n for group in groups) - min(group.n for group in groups) <= 1
    ranked = np.argsort(predicted)
    for group, members in zip(groups, np.array_split(ranked, expected), strict=True):
        assert group.predicted == pytest.approx(predicted[members].mean())
        assert group.label == pytest.approx(truth[members].mean())
        if n > 1:
            assert group.standard_error == pytest.approx(stats.sem(truth[members]))


def test_equal_predictions_stay_together() -> None:
    """A model of two answers has two groups however many scores there are."""
    predicted = np.repeat([2.0, 4.0], [150, 50])
    groups = expected_against_observed(predicted, predicted + 1)
    assert [(group.predicted, group.n) for group in groups] == [(2.0, 150), (4.0, 50)]
    assert calibration_error(groups) == pytest.approx(1.0)


def test_a_calibrated_model_has_little_error_and_a_generous_one_its_bias() -> None:
    predicted = RNG.uniform(1, 5, 20_000)
    truth = predicted + RNG.normal(0, 0.5, len(predicted))
    assert calibration_error(expected_against_observed(predicted, truth)) == pytest.approx(0, abs=0.02)
    assert calibration_error(expected_against_observed(predicted + 0.5, truth)) == pytest.approx(
        0.5, abs=0.02
    )


def test_likelihood_against_every_single_annotation() -> None:
    """Three images with annotations on the bins: the mean of each image's mean −log q."""
    probs = RNG.dirichlet(np.ones(9), 3)
    given_scores = [[1.0, 1.0, 4.5], [3.0], [2.0, 2.5, 2.5, 5.0]]
    targets = annotation_shares([Histogram.from_json(scores) for scores in given_scores], DEFAULT_BINS)
    found = likelihood(probs, targets, "annotations")
    each = [
        np.mean([-math.log(q[DEFAULT_BINS.index(score)]) for score in scores])
        for q, scores in zip(probs, given_scores, strict=True)
    ]
    assert found is not None
    assert found.nll == pytest.approx(np.mean(each))
    entropies = [stats.entropy(np.unique(scores, return_counts=True)[1]) for scores in given_scores]
    assert found.floor == pytest.approx(np.mean(entropies))
    assert found.n_items == 3


def test_the_likelihood_is_lowest_at_the_histogram_itself() -> None:
    targets = RNG.dirichlet(np.ones(9), 50)
    itself = likelihood(targets, targets, "annotations")
    other = likelihood(RNG.dirichlet(np.ones(9), 50), targets, "annotations")
    assert itself is not None
    assert other is not None
    assert itself.nll == pytest.approx(itself.floor)
    assert other.nll > other.floor


def test_a_probability_of_zero_is_finite() -> None:
    found = likelihood(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), "labels")
    assert found is not None
    assert found.nll == pytest.approx(-math.log(np.finfo(np.float32).tiny))


def test_sharpness_against_scipy() -> None:
    probs = RNG.dirichlet(np.ones(9), 30)
    found = sharpness(probs, DEFAULT_BINS)
    assert found is not None
    deviations = [stats.rv_discrete(values=(np.arange(9), p)).std() / 2 for p in probs]
    assert found.std == pytest.approx(np.mean(deviations))
    assert found.entropy == pytest.approx(np.mean([stats.entropy(p) for p in probs]))
    certain = sharpness(np.eye(9), DEFAULT_BINS)
    assert certain is not None
    assert (certain.std, certain.entropy) == (0.0, 0.0)


@given(st.lists(st.floats(1, 5), min_size=1, max_size=20))
def test_shares_keep_the_score_and_touch_two_bins(scores: list[float]) -> None:
    shares = shares_on_bins(np.array(scores), DEFAULT_BINS)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_allclose(shares @ DEFAULT_BINS, scores)
    assert ((shares > 0).sum(axis=1) <= 2).all()
    for row in shares:
        places = np.flatnonzero(row)
        assert places[-1] - places[0] <= 1


def test_shares_are_those_that_training_learns() -> None:
    from zreward.training.data import shares_on_bins as of_training

    scores = RNG.uniform(1, 5, 100)
    np.testing.assert_array_equal(
        shares_on_bins(scores, DEFAULT_BINS), of_training(scores, np.array(DEFAULT_BINS))
    )


def test_annotations_between_bins_and_counts() -> None:
    histograms = [Histogram.from_json({"1": 3, "1.25": 1}), Histogram.from_json([5.0])]
    shares = annotation_shares(histograms, DEFAULT_BINS)
    np.testing.assert_allclose(shares[0], [(3 + 0.5) / 4, 0.5 / 4, *[0] * 7])
    np.testing.assert_allclose(shares[1], [*[0] * 8, 1])
    assert annotation_shares([], DEFAULT_BINS).shape == (0, 9)


@pytest.mark.parametrize("score", [0.99, 5.01, math.nan])
def test_what_is_off_the_scale_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="must lie from 1 to 5"):
        shares_on_bins(np.array([3.0, score]), DEFAULT_BINS)


def test_without_scores_there_is_nothing() -> None:
    none = np.empty(0)
    assert bias(none, none) is None
    assert calibration_error(()) is None
    assert likelihood(np.empty((0, 9)), np.empty((0, 9)), "labels") is None
    assert sharpness(np.empty((0, 9)), DEFAULT_BINS) is None

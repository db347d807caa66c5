"""Whether predicted scores mean what they say: expected against observed, likelihood of annotations, sharpness.

Order is judged elsewhere (`zreward.metrics`); a model can order images well and still be half a point too generous,
or too sure of itself. Every function works on the scores of one row of an evaluation, [m], as plain arrays.

Shape suffixes: m scores, k bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zreward.annotations import Histogram

MAX_GROUPS = 10
"""Groups of expected against observed."""

MIN_GROUP = 20
"""Scores of a group where there are enough for two: their mean label is then known to a quarter of its spread."""

_SMALLEST = float(np.finfo(np.float32).tiny)
# A float32 softmax rounds smaller probabilities to zero, and the likelihood would be infinite.

Floats = NDArray[np.float64]
Target = Literal["annotations", "labels"]


@dataclass(frozen=True)
class Group:
    """Scores of like predictions.

    Attributes:
        predicted: mean of their predictions.
        label: mean of their labels.
        standard_error: of the mean label, as if the labels were independent; None for a single score.
        n: how many they are.
    """

    predicted: float
    label: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Likelihood:
    """How well the predicted distributions foretell what was said of the images, in nats.

    Attributes:
        of: what was said: single annotations, or labels where there are none.
        n_items: scores behind the means.
        nll: mean negative log-likelihood.
        floor: what predicting each image's own histogram would give, the mean entropy of the histograms.
    """

    of: Target
    n_items: int
    nll: float
    floor: float


@dataclass(frozen=True)
class Sharpness:
    """How narrow the predicted distributions are.

    Attributes:
        std: mean standard deviation, in score points.
        entropy: mean entropy, in nats.
    """

    std: float
    entropy: float


@dataclass(frozen=True)
class Calibration:
    """One row's calibration; None or empty where the row has no scores or the source no distributions.

    Attributes:
        bias: mean prediction minus mean label, in score points.
        error: mean over the scores of |mean prediction − mean label| of their group, in score points.
        groups: by rising prediction.
        likelihood: of annotations or labels.
        sharpness: of the predicted distributions.
    """

    bias: float | None
    error: float | None
    groups: tuple[Group, ...]
    likelihood: Likelihood | None
    sharpness: Sharpness | None


def expected_against_observed(predicted_m: Floats, truth_m: Floats) -> tuple[Group, ...]:
    """Scores sorted by prediction in equal parts: at most `MAX_GROUPS`, each of about `MIN_GROUP` or more.

    Equal predictions stay in one group, so groups can be larger and fewer where many are equal.
    """
    count = int(np.clip(len(predicted_m) // MIN_GROUP, 1, MAX_GROUPS))
    ranked = np.sort(predicted_m)
    firsts = np.unique([part[0] for part in np.array_split(ranked, count) if len(part)])
    group_m = np.searchsorted(firsts, predicted_m, side="right")
    return tuple(_group(predicted_m[group_m == g], truth_m[group_m == g]) for g in np.unique(group_m))


def bias(predicted_m: Floats, truth_m: Floats) -> float | None:
    """Mean prediction minus mean label; None without scores."""
    return float((predicted_m - truth_m).mean()) if len(predicted_m) else None


def calibration_error(groups: Sequence[Group]) -> float | None:
    """Mean over the scores of |mean prediction − mean label| of their group; None without groups."""
    total = sum(group.n for group in groups)
    return sum(group.n * abs(group.predicted - group.label) for group in groups) / total if total else None


def likelihood(probs_mk: Floats, targets_mk: Floats, of: Target) -> Likelihood | None:
    """Mean cross entropy −Σ t log q of targets under predictions, and its floor −Σ t log t; None without scores.

    With t the shares of an image's annotations, −Σ t log q is the mean negative log-likelihood of its annotations.
    """
    if not len(probs_mk):
        return None
    losses_m = -(targets_mk * np.log(np.maximum(probs_mk, _SMALLEST))).sum(axis=1)
    return Likelihood(of, len(probs_mk), float(losses_m.mean()), float(_entropies(targets_mk).mean()))


def sharpness(probs_mk: Floats, bins: Sequence[float]) -> Sharpness | None:
    """Mean standard deviation and mean entropy; None without scores."""
    if not len(probs_mk):
        return None
    bins_k = np.array(bins)
    deviations_mk = bins_k - (probs_mk @ bins_k)[:, None]
    stds_m = np.sqrt((probs_mk * deviations_mk**2).sum(axis=1))
    return Sharpness(float(stds_m.mean()), float(_entropies(probs_mk).mean()))


def likelihood_target(rows: Sequence[Calibration]) -> str | None:
    """What the likelihoods of an evaluation are of, in words; None where it has none."""
    found = {row.likelihood.of for row in rows if row.likelihood}
    if len(found) > 1:
        return "single annotations, or of labels in dimensions without any"
    return {"annotations": "single annotations", "labels": "labels"}[found.pop()] if found else None


def shares_on_bins(scores_m: Floats, bins: Sequence[float]) -> Floats:
    """[m, bins]: all of a score on its bin, or shared between the two around it, so that the mean is the score.

    Raises:
        ValueError: a score is off the scale or NaN.
    """
    bins_k = np.array(bins)
    if not ((scores_m >= bins_k[0]) & (scores_m <= bins_k[-1])).all():
        raise ValueError(f"scores must lie from {bins_k[0]:g} to {bins_k[-1]:g}")
    return np.stack([np.interp(scores_m, bins_k, row) for row in np.eye(len(bins_k))], axis=1)


def annotation_shares(histograms: Sequence[Histogram], bins: Sequence[float]) -> Floats:
    """[m, bins]: every annotation of an image on the bins, as shares of one.

    Raises:
        ValueError: an annotation is off the scale.
    """
    of_m = np.repeat(np.arange(len(histograms)), [len(h.scores) for h in histograms])
    scores = np.array([score for h in histograms for score in h.scores])
    weights = np.array([count / h.n for h in histograms for count in h.counts])
    shares_mk = np.zeros((len(histograms), len(bins)))
    np.add.at(shares_mk, of_m, weights[:, None] * shares_on_bins(scores, bins))
    return shares_mk


def _group(predicted_m: Floats, truth_m: Floats) -> Group:
    n = len(predicted_m)
    error = float(truth_m.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Group(float(predicted_m.mean()), float(truth_m.mean()), error, n)


def _entropies(probs_mk: Floats) -> Floats:
    """Shannon entropies in nats, [m]; 0 log 0 is 0."""
    return np.asarray(-(probs_mk * np.log(np.where(probs_mk > 0, probs_mk, 1.0))).sum(axis=1))

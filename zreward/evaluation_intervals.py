"""Bootstrap intervals of an evaluation's figures: prompts are drawn, with all their images in all dimensions of a row.

Images of one prompt, and the four scores of one image, are not independent; drawing them one by one would give
intervals that are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from zreward.evaluation import Indices, Scores, defined
from zreward.metrics import MARGIN, Interval, bootstrap_interval, hpa_per_prompt, plcc, srcc

LEVEL = 0.95

Statistic = Callable[[Indices, Indices], float]


@dataclass(frozen=True)
class Intervals:
    """Bootstrap intervals of one row; None where not asked for, or where the figure is defined on too few draws."""

    plcc: Interval | None = None
    srcc: Interval | None = None
    hpa: Interval | None = None
    margin_hpa: Interval | None = None


def agreement_intervals(scores: Scores, n_resamples: int, seed: int) -> Intervals:
    """Intervals of the figures of one row, from the same draws; none with 0 resamples."""
    if n_resamples == 0:
        return Intervals()

    def drawn(statistic: Statistic | None, groups: Indices) -> Interval | None:
        if statistic is None:
            return None
        return defined(bootstrap_interval, statistic, groups, level=LEVEL, n_resamples=n_resamples, seed=seed)

    predicted, truth = scores.predicted, scores.truth
    prompts = np.arange(len(np.unique(scores.prompts)))
    return Intervals(
        plcc=drawn(lambda rows, _: plcc(predicted[rows], truth[rows]), scores.prompts),
        srcc=drawn(lambda rows, _: srcc(predicted[rows], truth[rows]), scores.prompts),
        hpa=drawn(_preference(scores, 0.0), prompts),
        margin_hpa=drawn(_preference(scores, MARGIN), prompts),
    )


def _preference(scores: Scores, margin: float) -> Statistic | None:
    """HPA of drawn prompts, as the ratio of two sums that each prompt brings; None where no pair decides."""
    sums = defined(hpa_per_prompt, scores.predicted, scores.truth, scores.groups, margin)
    if sums is None:
        return None
    # A group is a prompt in one dimension; its prompt is the remainder.
    present, prompts = np.unique(np.unique(scores.groups) % scores.n_prompts, return_inverse=True)
    credit, pairs = (np.bincount(prompts, values, minlength=len(present)) for values in sums)

    def share(rows: Indices, _: Indices) -> float:
        n = pairs[rows].sum()
        return float(credit[rows].sum() / n) if n else math.nan

    return share

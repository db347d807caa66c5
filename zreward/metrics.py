"""Agreement of predicted scores with human scores: PLCC, SRCC, HPA and margin HPA, with intervals.

HPA compares only candidates of the same prompt, since that is how a reward model is used (best of n,
preference pairs). ``groups`` names the prompt of each item. Ties in the prediction earn half a point, so
that a constant prediction scores 0.5, not 0 and not 1. Undefined results are errors: a correlation with a
constant is not 0. Used by training (evaluation), quantization (the drift report) and the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zreward.errors import MetricError

MARGIN = 0.5
"""Score gap above which a pair counts for margin HPA, in score points (paper, section Metrics)."""

_TIE = 1e-9
# Human scores are means over annotators, and 4.4 − 3.9 is 0.5000000000000004 in float64. Gaps are compared
# with this slack: far above rounding, far below any difference that annotators can make.

_MAX_PAIRS = 50_000_000
# 0.8 GB of indices. More than that means that groups are not prompts.


@dataclass(frozen=True)
class PairShare:
    """A share of same-prompt pairs.

    Attributes:
        value: In 0…1.
        n_pairs: How many pairs it is a share of; unordered, each counted once.
    """

    value: float
    n_pairs: int


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval.

    Attributes:
        low: Lower end.
        high: Upper end.
        n_resamples: How many resamples it rests on: those on which the statistic was defined.
    """

    low: float
    high: float
    n_resamples: int


def plcc(pred: ArrayLike, truth: ArrayLike) -> float:
    """Pearson's linear correlation of two vectors of length n ≥ 2, in −1…1.

    Raises:
        MetricError: Lengths differ, values are not finite numbers, fewer than two items, or a constant.
    """
    x, y = _vectors(pred=pred, truth=truth)
    return float(np.clip(_standardized(x, "pred") @ _standardized(y, "truth"), -1.0, 1.0))


def srcc(pred: ArrayLike, truth: ArrayLike) -> float:
    """Spearman's rank correlation of two vectors of length n ≥ 2; tied values share their average rank.

    Raises:
        MetricError: As for ``plcc``.
    """
    x, y = _vectors(pred=pred, truth=truth)
    return plcc(_average_ranks(x), _average_ranks(y))


def hpa(pred: ArrayLike, truth: ArrayLike, groups: ArrayLike, margin: float = 0.0) -> PairShare:
    """Human preference accuracy (paper, eq. 17): the share of same-prompt pairs ordered as people do.

    Counted are pairs of one group whose truth differs by more than ``margin``. A pair that ``pred``
    orders like ``truth`` counts 1, one that ``pred`` ties exactly counts 0.5.

    Args:
        pred: Predicted scores, [n].
        truth: Human scores, [n].
        groups: Prompt of each item, [n] integers or strings, in any order.
        margin: In score points, not negative.

    Raises:
        MetricError: Malformed input as for ``plcc`` (constants are fine), or no pair qualifies.
    """
    credit, pairs = hpa_per_prompt(pred, truth, groups, margin)
    return PairShare(float(credit.sum() / pairs.sum()), int(pairs.sum()))


def hpa_per_prompt(
    pred: ArrayLike, truth: ArrayLike, groups: ArrayLike, margin: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two sums of which ``hpa`` is the ratio, for each prompt.

    Where prompts are resampled, only these sums are drawn: Σ credit / Σ pairs of the drawn prompts is the
    ``hpa`` of their items.

    Returns:
        Credit and number of counted pairs of each distinct prompt, float64 [g] each, prompts sorted.

    Raises:
        MetricError: As for ``hpa``.
    """
    if not margin >= 0:
        raise MetricError(f"margin is {margin}; expected a number of score points of at least 0")
    p, t = _vectors(pred=pred, truth=truth)
    left, right = _same_group_pairs(groups, len(p))
    gap = t[left] - t[right]
    counted = np.abs(gap) > margin + _TIE
    if not counted.any():
        raise MetricError(
            f"none of the {len(left)} same-prompt pairs differs in truth by more than {margin}; "
            "the accuracy is undefined: add candidates per prompt, or lower the margin"
        )
    left, right = left[counted], right[counted]
    credit = (np.sign(p[left] - p[right]) * np.sign(gap[counted]) + 1.0) / 2.0
    _, prompt_of_item = np.unique(np.asarray(groups), return_inverse=True)
    prompts, n_prompts = prompt_of_item[left], int(prompt_of_item.max()) + 1
    return (
        np.asarray(np.bincount(prompts, credit, minlength=n_prompts), np.float64),
        np.asarray(np.bincount(prompts, minlength=n_prompts), np.float64),
    )


def margin_hpa(pred: ArrayLike, truth: ArrayLike, groups: ArrayLike) -> PairShare:
    """``hpa`` on the pairs whose truth differs by more than ``MARGIN``."""
    return hpa(pred, truth, groups, margin=MARGIN)


def pair_flips(
    pred_a: ArrayLike, pred_b: ArrayLike, groups: ArrayLike, margin: float | None = None
) -> PairShare:
    """The share of same-prompt pairs that two predictions order differently; no truth is needed.

    Opposite orders count 1, a tie in only one of the two counts 0.5. With that, HPA on truth without
    ties cannot move by more than the flips.

    Args:
        pred_a: Predicted scores, [n].
        pred_b: Predicted scores, [n].
        groups: Prompt of each item, [n] integers or strings.
        margin: Where given, only pairs whose scores in ``pred_a`` differ by more than this are counted.

    Raises:
        MetricError: Malformed input as for ``plcc`` (constants are fine), no two items share a prompt, or
            no pair differs by more than the margin.
    """
    a, b = _vectors(pred_a=pred_a, pred_b=pred_b)
    left, right = _same_group_pairs(groups, len(a))
    if len(left) == 0:
        raise MetricError("no two items share a prompt, so no pair can flip; check groups")
    if margin is not None:
        counted = np.abs(a[left] - a[right]) > margin + _TIE
        if not counted.any():
            raise MetricError(f"no same-prompt pair of pred_a differs by more than {margin}")
        left, right = left[counted], right[counted]
    differing = np.abs(np.sign(a[left] - a[right]) - np.sign(b[left] - b[right]))
    return PairShare(float(differing.mean()) / 2.0, len(left))


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp], NDArray[np.intp]], float],
    groups: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A percentile interval of ``statistic`` when prompts, not items, are drawn with replacement.

    Candidates of one prompt are correlated, so resampling items would give intervals that are too narrow.

    Args:
        statistic: Takes the drawn row numbers [m] and their group labels [m] and returns a number, e.g.
            ``lambda rows, drawn: hpa(pred[rows], truth[rows], drawn).value``. A prompt that is drawn
            twice comes with two labels, so that its copies are not paired with each other.
        groups: Prompt of each item, [n] integers or strings.
        level: Coverage, between 0 and 1.
        n_resamples: Number of draws.
        seed: Of numpy's default generator; equal seeds give equal intervals.

    Raises:
        MetricError: Malformed arguments, fewer than two prompts, or a statistic that is undefined (raises
            MetricError or is NaN) on more than 5 % of the draws.
    """
    if not 0 < level < 1 or n_resamples < 1:
        raise MetricError(f"level {level} must lie between 0 and 1, n_resamples {n_resamples} be at least 1")
    order, starts, sizes = _sorted_groups(groups)
    if len(sizes) < 2:
        raise MetricError(f"{len(sizes)} prompt(s): resampling prompts needs at least two")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n_resamples):
        drawn = rng.integers(len(sizes), size=len(sizes))
        labels = np.repeat(np.arange(len(drawn)), sizes[drawn])
        try:
            value = statistic(order[_ranges(starts[drawn], sizes[drawn])], labels)
        except MetricError:
            continue
        if not np.isnan(value):
            values.append(value)
    if len(values) < 0.95 * n_resamples:
        raise MetricError(
            f"the statistic is undefined on {n_resamples - len(values)} of {n_resamples} resamples of "
            f"{len(sizes)} prompts; too few prompts for an interval"
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), len(values))


def _vectors(**named: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    """The arguments as finite float64 vectors of one length ≥ 2; names are for the messages."""
    vectors = []
    for name, values in named.items():
        try:
            vector = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise MetricError(f"{name} does not hold numbers: {error}") from error
        if vector.ndim != 1:
            raise MetricError(f"{name} has shape {list(vector.shape)}; expected one score per item, [n]")
        bad = np.flatnonzero(~np.isfinite(vector))
        if len(bad):
            raise MetricError(
                f"{name}[{bad[0]}] is {vector[bad[0]]} ({len(bad)} of {len(vector)} values are not finite); "
                "leave failed items out of both vectors"
            )
        vectors.append(vector)
    lengths = {name: len(vector) for name, vector in zip(named, vectors, strict=True)}
    if len(set(lengths.values())) != 1:
        raise MetricError(f"lengths differ: {lengths}; pass one score per item in the same order")
    if len(vectors[0]) < 2:
        raise MetricError(f"{len(vectors[0])} item(s) given; at least two are needed")
    return tuple(vectors)


def _standardized(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Centred and of Euclidean norm 1."""
    magnitude = np.abs(x).max()
    centred = x / magnitude if magnitude > 0 else x  # so that sums and squares cannot overflow
    centred = centred - centred.mean()
    largest = np.abs(centred).max()
    # What is left of 0.3 and 0.1 + 0.2 after centring is rounding noise, not a ranking.
    if largest <= 1e-13:
        raise MetricError(f"{name} is constant ({x[0]:g}, {len(x)} items): the correlation is undefined")
    centred /= largest
    return np.asarray(centred / np.linalg.norm(centred))


def _average_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[inverse])


def _sorted_groups(groups: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Item numbers sorted by group [n], and each group's start [g] and size [g] in that order."""
    labels = np.asarray(groups)
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
        raise MetricError(
            f"groups has shape {list(labels.shape)} and dtype {labels.dtype}; expected one prompt per item, "
            "[n] integers or strings"
        )
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.argsort(inverse, kind="stable"), np.cumsum(sizes) - sizes, sizes


def _same_group_pairs(groups: ArrayLike, n_items: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Item numbers (left [p], right [p]) of each unordered pair of two items in one group."""
    order, starts, sizes = _sorted_groups(groups)
    if len(order) != n_items:
        raise MetricError(f"groups has length {len(order)} but there are {n_items} scores; pass one per item")
    n_pairs = int((sizes * (sizes - 1) // 2).sum())
    if n_pairs > _MAX_PAIRS:
        raise MetricError(
            f"{len(sizes)} group(s) make {n_pairs} pairs, more than {_MAX_PAIRS}; groups should name prompts"
        )
    # Groups of one size share one index pattern, and there are few sizes.
    left, right = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for size in np.unique(sizes[sizes > 1]):
        first, second = np.triu_indices(size, k=1)
        base = starts[sizes == size, None]
        left.append(order[base + first].ravel())
        right.append(order[base + second].ravel())
    return np.concatenate(left), np.concatenate(right)


def _ranges(starts: NDArray[np.intp], sizes: NDArray[np.intp]) -> NDArray[np.intp]:
    """``arange(start, start + size)`` for each pair, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.asarray(np.repeat(starts - before, sizes) + np.arange(sizes.sum()))

"""Figures of score drift that the core's metrics do not have, and the checks of what they are computed from.

Drift compares two models on the same items: the float model ("before") and its quantized form ("after"). Both
are given as probabilities of the score bins. Correlations, HPA and pair flips are those of `zreward.metrics`;
`zreward.quant.report` puts all of them together.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zreward.errors import QuantizationError

Floats = NDArray[np.float64]

PROBABILITY_FLOOR = float(np.finfo(np.float32).tiny)
"""Smaller probabilities of the quantized model count as this in the KL divergence. Graphs compute the softmax in
float32, where a bin becomes exactly 0 below this, and the divergence would be infinite for a rounding."""

BEST_OF = 4

_SUM_TOLERANCE = 1e-3


def checked_probabilities(which: str, values: ArrayLike, n_dimensions: int, n_bins: int) -> Floats:
    """`values` as distributions, float64 [n, dimensions, bins], each scaled to a sum of exactly one.

    Raises:
        QuantizationError: another shape, fewer than two items, a value that is negative or not finite, or a sum
            further than 1e-3 from one. `which` names the argument in the message.
    """
    probs = np.array(values, dtype=np.float64)
    if probs.ndim != 3 or probs.shape[1:] != (n_dimensions, n_bins):
        raise QuantizationError(
            f"{which} has shape {list(probs.shape)}; expected [items, {n_dimensions} dimensions, {n_bins} bins]"
        )
    if len(probs) < 2:
        raise QuantizationError(f"{which} has {len(probs)} item(s); drift is measured on at least two")
    total = probs.sum(axis=2)
    good = np.isfinite(probs).all(axis=2) & (probs >= 0).all(axis=2) & (np.abs(total - 1) <= _SUM_TOLERANCE)
    if not good.all():
        item, dimension = (int(i) for i in np.argwhere(~good)[0])
        raise QuantizationError(
            f"{which}[{item}, {dimension}] is not a probability distribution: {probs[item, dimension].tolist()} "
            f"({int((~good).sum())} of {good.size} are not); leave failed items out of both models"
        )
    return np.asarray(probs / total[:, :, None])


def checked_groups(groups: ArrayLike, n_items: int) -> NDArray[np.generic]:
    """The prompt of each item, [n] integers or strings."""
    prompts = np.asarray(groups)
    if prompts.shape != (n_items,) or prompts.dtype.kind not in "iuUS":
        raise QuantizationError(
            f"groups has shape {list(prompts.shape)} and dtype {prompts.dtype}; expected the prompt of each of "
            f"{n_items} items, integers or strings"
        )
    return prompts


def checked_labels(labels: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """`labels` as float64 of the given shape, all finite."""
    truth = np.asarray(labels, np.float64)
    if truth.shape != shape:
        raise QuantizationError(f"labels have shape {list(truth.shape)}; expected {list(shape)}")
    if not np.isfinite(truth).all():
        item = int(np.argwhere(~np.isfinite(truth))[0][0])
        raise QuantizationError(f"labels[{item}] is not finite: {truth[item].tolist()}")
    return truth


def kl_divergence(before: Floats, after: Floats) -> Floats:
    """KL(before ‖ after) = Σ p·ln(p/q) in nats, [n, dimensions] from two arrays [n, dimensions, bins].

    Bins that `before` rules out contribute nothing, and q is at least `PROBABILITY_FLOOR`.
    """
    q = np.maximum(after, PROBABILITY_FLOOR)
    p = np.where(before > 0, before, q)  # ln 1 = 0
    terms = np.where(before > 0, p * (np.log(p) - np.log(q)), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=2), 0.0))


def best_of_regret(
    before: Floats, after: Floats, judge: Floats, groups: NDArray[np.generic]
) -> tuple[float, int, int] | None:
    """What is lost when the quantized model picks the best of four candidates instead of the float model.

    Of each prompt, every set of four candidates is considered: the judge's score of the float model's pick minus
    that of the quantized model's pick, averaged over the sets and then over the prompts. A prompt with fewer than
    four candidates is one set of all of them; one with a single candidate leaves no choice and is not counted. Of
    equal scores, the earlier candidate is picked.

    No set is enumerated: the candidate that r of k candidates rank below is picked in C(r, 3) of C(k, 4) sets.

    Args:
        before: scores of the float model, [n].
        after: scores of the quantized model, [n].
        judge: the labels, [n]; or `before` again, which makes the regret non-negative.
        groups: prompt of each item, [n].

    Returns:
        The regret in units of `judge`, the number of prompts behind it, and how many of these have fewer than four
        candidates; None if no prompt has two.
    """
    _, prompt, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if sizes.max() < 2:
        return None
    difference = _pick_chances(before, prompt, sizes) - _pick_chances(after, prompt, sizes)
    regret = np.bincount(prompt, difference * judge)[sizes >= 2]
    return float(regret.mean()), len(regret), int((sizes[sizes >= 2] < BEST_OF).sum())


def _pick_chances(scores: Floats, prompt: NDArray[np.intp], sizes: NDArray[np.intp]) -> Floats:
    """How likely each item is the best of four random candidates of its prompt, [n]."""
    n = len(scores)
    order = np.lexsort((-np.arange(n), scores, prompt))
    below = np.empty(n, np.intp)
    below[order] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    choose = np.array([[math.comb(r, m) for m in range(BEST_OF + 1)] for r in range(sizes.max() + 1)], float)
    among = np.minimum(BEST_OF, sizes)[prompt]
    return np.asarray(choose[below, among - 1] / choose[sizes[prompt], among])

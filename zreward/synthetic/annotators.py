"""Simulated annotators, their aggregate, and the ceiling that their disagreement puts on any model.

An annotator sees the latent score with a constant offset of their own and a fresh error at each
judgement, and answers on the half-point bins. The aggregate drops the highest and the lowest answer and
rounds the mean of the rest to the nearest bin, as in the paper's label protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zreward.errors import UsageError
from zreward.synthetic.config import DIMENSIONS, SceneConfig
from zreward.synthetic.truth import BEST, WORST

FloatArray = NDArray[np.float64]

_BIAS_STREAM, _CEILING_STREAM = 0x0B1A5, 0xCE111


class _Judged(Protocol):
    """What the ceiling needs to know of a candidate."""

    @property
    def true_scores(self) -> Mapping[str, float]: ...


class _Prompted(Protocol):
    @property
    def candidates(self) -> Sequence[_Judged]: ...


def on_grid(scores: FloatArray) -> FloatArray:
    """Scores clipped to [1, 5] and rounded to the nearest half point (ties upwards)."""
    return np.clip(np.floor(np.asarray(scores) * 2 + 0.5) / 2, WORST, BEST)


def annotate(rng: np.random.Generator, true_scores: FloatArray, config: SceneConfig) -> FloatArray:
    """One judgement per annotator.

    Args:
        true_scores: [..., dimensions], in the order of `DIMENSIONS`.

    Returns:
        Half-point scores [..., dimensions, annotators].
    """
    biases = np.random.default_rng([_BIAS_STREAM, config.panel_seed]).normal(
        0.0, config.annotator_bias, (len(DIMENSIONS), config.annotators)
    )
    noise = rng.normal(0.0, config.annotator_noise, (*true_scores.shape, config.annotators))
    return on_grid(true_scores[..., None] + biases + noise)


def aggregate(annotations: FloatArray) -> FloatArray:
    """The human score: the highest and lowest answer dropped, the rest averaged and put on the grid.

    Args:
        annotations: [..., annotators], at least three annotators.

    Raises:
        UsageError: there are fewer than three annotators.
    """
    if annotations.shape[-1] < 3:
        raise UsageError(f"trimming needs at least 3 annotators, found {annotations.shape[-1]}")
    return on_grid(np.sort(annotations, axis=-1)[..., 1:-1].mean(axis=-1))


def label_noise_ceiling(scenes: Sequence[_Prompted], config: SceneConfig, seed: int = 0) -> dict[str, float]:
    """HPA of the latent truth against the aggregate of annotators who were not seen before.

    It is what a model that reads every scene perfectly would reach. A pair that the truth ties but the
    labels order counts one half: no model can do better than a coin there.

    Returns:
        HPA per dimension, and under "overall" that of all dimensions' pairs together.

    Raises:
        UsageError: no same-prompt pair has different labels.
    """
    rng = np.random.default_rng([_CEILING_STREAM, seed])
    held_out = SceneConfig(**{**config.to_dict(), "panel_seed": config.panel_seed + 1 + seed})
    right, total = np.zeros(len(DIMENSIONS)), np.zeros(len(DIMENSIONS))
    for scene in scenes:
        truth = np.array([[c.true_scores[name] for name in DIMENSIONS] for c in scene.candidates])
        labels = aggregate(annotate(rng, truth, held_out))
        first, second = np.triu_indices(len(truth), 1)
        ordered = labels[first] != labels[second]
        agreement = np.sign(truth[first] - truth[second]) * np.sign(labels[first] - labels[second])
        right += ((agreement + 1) / 2 * ordered).sum(axis=0)
        total += ordered.sum(axis=0)
    if not total.all():
        raise UsageError("the ceiling needs same-prompt pairs whose labels differ in every dimension")
    ceiling = dict(zip(DIMENSIONS, (right / total).tolist(), strict=True))
    return {**ceiling, "overall": float(right.sum() / total.sum())}

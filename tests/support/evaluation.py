"""Drawn labels and predictions, as an evaluation compares them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zreward.annotations import Histogram
from zreward.contract import DEFAULT_BINS
from zreward.evaluation import Labels, Predictions
from zreward.pairs import Pair

DIMENSIONS = ("alignment", "realism")
N_PROMPTS, CANDIDATES = 12, 4


def drawn_labels(rng: np.random.Generator, n_prompts: int = N_PROMPTS) -> Labels:
    """Half-point labels of two dimensions; five annotations of each label in the first one."""
    scores = rng.integers(2, 11, (n_prompts * CANDIDATES, 2)) / 2
    pairs = []
    for index, score in enumerate(scores[:, 0]):
        votes = Histogram.from_json(np.clip(score + rng.integers(-1, 2, 5) / 2, 1, 5).tolist())
        pairs.append(Pair(f"prompt {index // CANDIDATES}", Path("x.png"), {}, {"alignment": votes}))
    return Labels(DIMENSIONS, tuple(pairs), ("",) * len(pairs), scores)


def drawn_predictions(rng: np.random.Generator, labels: Labels) -> Predictions:
    """Distributions around the labels."""
    centres = labels.scores + rng.normal(0, 0.8, labels.scores.shape)
    probs = np.exp(-np.abs(centres[..., None] - np.array(DEFAULT_BINS)) / 0.5)
    return Predictions.of_distributions(probs / probs.sum(axis=-1, keepdims=True), DEFAULT_BINS)

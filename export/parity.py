"""Proof of a written bundle: its golden scores, and their distance from transformers.

The only place of the export that runs the engine; it runs it with the runtime that users will run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle, GoldenItem, ParityInfo
from zreward.golden import golden_inputs
from zreward.image import ImageSpec
from zreward.runtime.engine import Engine
from zreward.runtime.scorer import Scorer

GOLDEN_FOLDER = "golden"


@dataclass(frozen=True)
class Golden:
    """Golden items and the same probabilities as arrays, float64 [items, dimensions, bins]."""

    items: tuple[GoldenItem, ...]
    probs: NDArray[np.float64]


def write_golden_images(directory: Path, spec: ImageSpec) -> list[str]:
    """Save the golden pictures as PNG files under `golden/`; returns their names within the bundle."""
    folder = directory / GOLDEN_FOLDER
    folder.mkdir()
    names = []
    for index, (_, picture) in enumerate(golden_inputs(spec)):
        picture.save(folder / f"{index}.png", optimize=True)
        names.append(f"{GOLDEN_FOLDER}/{index}.png")
    return names


def golden_scores(bundle: Bundle, names: Sequence[str]) -> Golden:
    """Score the golden inputs with the bundle itself."""
    prompts = [prompt for prompt, _ in golden_inputs(bundle.contract.image)]
    with Scorer(Engine(bundle)) as scorer:
        pairs = [(prompt, bundle.path / name) for prompt, name in zip(prompts, names, strict=True)]
        scores = scorer.score_pairs(pairs)
    items = tuple(
        GoldenItem(prompt, name, {d: tuple(score[d].probs.tolist()) for d in score})
        for prompt, name, score in zip(prompts, names, scores, strict=True)
    )
    return Golden(items, np.array([[score[d].probs for d in score] for score in scores]))


def parity_with_reference(checkpoint: Path, bundle: Bundle, golden: Golden) -> ParityInfo:
    """Compare the golden scores with transformers' full passes over the checkpoint."""
    from zreward.reference import ReferenceModel

    with ReferenceModel(checkpoint, bundle.contract) as reference:
        expected = np.stack(
            [reference.probabilities(item.prompt, bundle.path / item.image) for item in golden.items]
        )
    bins = np.array(bundle.contract.bins)
    return ParityInfo(
        max_difference=float(np.abs(golden.probs - expected).max()),
        max_mean_difference=float(np.abs((golden.probs - expected) @ bins).max()),
        n_images=len(golden.items),
    )

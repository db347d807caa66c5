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
from zreward.errors import ExportError
from zreward.export.bfloat16 import open_rounded
from zreward.export.pieces import PiecewiseSession
from zreward.golden import golden_inputs
from zreward.image import ImageSpec, preprocess
from zreward.runtime.engine import Engine

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
    engine = Engine(bundle, open_graph=lambda path: open_rounded(path, PiecewiseSession))
    patches = [preprocess(bundle.path / name, bundle.contract.image) for name in names]
    probs = []
    for prompt, p in zip(prompts, patches, strict=True):
        image = engine.encode_image(p)
        state = engine.image_state(engine.prompt_state(prompt), [image], p.token_grid)
        probs.append(engine.answer(state).probs[0].astype(np.float64))
    if not np.isfinite(probs).all():
        raise ExportError(
            f"{bundle.path}: the exported model answers NaN; the checkpoint's weights are out of range"
        )
    items = tuple(
        GoldenItem(
            prompt, name, dict(zip(bundle.contract.dimension_names, map(tuple, p.tolist()), strict=True))
        )
        for prompt, name, p in zip(prompts, names, probs, strict=True)
    )
    return Golden(items, np.stack(probs))


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

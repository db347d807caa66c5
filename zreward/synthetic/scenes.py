"""Scenes: one prompt, several candidate images, their latent truth and their simulated labels.

Every candidate has a generator of its own, derived from (seed, prompt, candidate), so a scene does not
depend on how many others are made or in which order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zreward.errors import UsageError
from zreward.synthetic.annotators import aggregate, annotate
from zreward.synthetic.config import DIMENSIONS, SceneConfig
from zreward.synthetic.language import PromptSpec, sample_spec, sentence
from zreward.synthetic.layout import sample_defects, sample_objects
from zreward.synthetic.render import render
from zreward.synthetic.truth import AlignmentErrors, Defects, SceneObject, alignment_errors, true_scores


@dataclass(frozen=True, eq=False)
class Candidate:
    """One image made for a prompt.

    Attributes:
        image: uint8 [size, size, 3], RGB.
        segments: uint8 [size, size]; see `zreward.synthetic.render` for the values.
        objects: what is drawn, left to right.
        defects: the severity of every defect.
        alignment_errors: how the objects depart from the prompt.
        true_scores: latent half-point score per dimension.
        annotator_scores: the panel's half-point scores per dimension.
        human_scores: the panel's aggregate per dimension, the label.
    """

    image: NDArray[np.uint8]
    segments: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    defects: Defects
    alignment_errors: AlignmentErrors
    true_scores: dict[str, float]
    annotator_scores: dict[str, tuple[float, ...]]
    human_scores: dict[str, float]


@dataclass(frozen=True, eq=False)
class Scene:
    """A prompt, what it asks for, and its candidates."""

    index: int
    prompt: str
    spec: PromptSpec
    candidates: tuple[Candidate, ...]


def generate(config: SceneConfig, seed: int, n_prompts: int, candidates: int = 6) -> Iterator[Scene]:
    """Scenes one after the other; scene i is the same for every `n_prompts` greater than i.

    Raises:
        UsageError: a count is not positive or the seed is negative.
    """
    for name, value, least in (("seed", seed, 0), ("n_prompts", n_prompts, 1), ("candidates", candidates, 1)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, not {value}")
    return (make_scene(config, seed, index, candidates) for index in range(n_prompts))


def make_scene(config: SceneConfig, seed: int, index: int, candidates: int = 6) -> Scene:
    """Scene number `index` of the split `seed`."""
    rng = np.random.default_rng([seed, index])
    spec = sample_spec(rng, config.max_objects, config.relation_rate)
    made = tuple(
        _candidate(np.random.default_rng([seed, index, 1 + k]), spec, config) for k in range(candidates)
    )
    return Scene(index=index, prompt=sentence(rng, spec), spec=spec, candidates=made)


def _candidate(rng: np.random.Generator, spec: PromptSpec, config: SceneConfig) -> Candidate:
    defects = sample_defects(rng, config)
    objects = sample_objects(rng, spec, defects, config)
    truth = true_scores(spec, objects, defects)
    annotations = annotate(rng, np.array([truth[name] for name in DIMENSIONS]), config)
    drawing = render(rng, objects, defects, config)
    return Candidate(
        image=drawing.image,
        segments=drawing.segments,
        objects=objects,
        defects=defects,
        alignment_errors=alignment_errors(spec, objects),
        true_scores=truth,
        annotator_scores={
            name: tuple(row) for name, row in zip(DIMENSIONS, annotations.tolist(), strict=True)
        },
        human_scores=dict(zip(DIMENSIONS, aggregate(annotations).tolist(), strict=True)),
    )

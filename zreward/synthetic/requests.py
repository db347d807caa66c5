"""Other requests for an image that is drawn already, so that its prompt does not give away what it shows.

A model that sees every image under the prompt it was made for learns to repeat the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from zreward.synthetic.config import SceneConfig
from zreward.synthetic.language import COLOURS, RELATIONS, SHAPES, Group, PromptSpec, sample_spec, sentence
from zreward.synthetic.scenes import Candidate
from zreward.synthetic.truth import SceneObject, alignment_errors, alignment_score

_TRUE_RELATION_SHARE = 0.6
_EDIT_WEIGHTS = (0.35, 0.4, 0.25)
"""Of no, one and two departures from what is drawn."""


def other_requests(
    rng: np.random.Generator, candidate: Candidate, count: int, config: SceneConfig
) -> Iterator[tuple[str, PromptSpec, Candidate]]:
    """Prompts, what they mean, and the candidate as it stands under each.

    The first, third and so on have nothing to do with the image; the others ask for what is drawn, or nearly.
    The latent truth of alignment is that of the new prompt; the panel never saw the image under it, and its scores are
    those of the image's own prompt.
    """
    for number in range(count):
        if number % 2:
            spec = other_prompt(rng, candidate.objects, config.max_objects)
        else:
            spec = sample_spec(rng, config.max_objects, config.relation_rate)
        scores = candidate.true_scores | {"alignment": alignment_score(spec, candidate.objects)}
        errors = alignment_errors(spec, candidate.objects)
        judged = dataclasses.replace(candidate, alignment_errors=errors, true_scores=scores)
        yield sentence(rng, spec), spec, judged


def other_prompt(rng: np.random.Generator, objects: Sequence[SceneObject], max_objects: int) -> PromptSpec:
    """A request that describes drawn objects, then departs from them by up to two edits."""
    kinds = sorted({(item.colour, item.shape) for item in objects})
    chosen = [kinds[index] for index in rng.permutation(len(kinds))[:2]]
    counts = [sum((item.colour, item.shape) == kind for item in objects) for kind in chosen]
    groups = [Group(count, *kind) for count, kind in zip(counts, chosen, strict=True)]
    for _ in range(int(rng.choice(len(_EDIT_WEIGHTS), p=_EDIT_WEIGHTS))):
        groups = _edited(rng, groups, max_objects)
    spec = PromptSpec(tuple(groups))
    if len(groups) == 2 and rng.random() < 0.7:
        holding = [r for r in RELATIONS if not alignment_errors(PromptSpec(spec.groups, r), objects).relation]
        options = holding if holding and rng.random() < _TRUE_RELATION_SHARE else list(RELATIONS)
        return PromptSpec(spec.groups, str(rng.choice(options)))
    return spec


def _edited(rng: np.random.Generator, groups: list[Group], max_objects: int) -> list[Group]:
    at = int(rng.integers(len(groups)))
    group = groups[at]
    kind = rng.integers(3)
    if kind == 0:
        changed = dataclasses.replace(group, colour=str(rng.choice(list(COLOURS))))
    elif kind == 1:
        changed = dataclasses.replace(group, shape=str(rng.choice(SHAPES)))
    else:
        room = max_objects - sum(other.count for other in groups) + group.count
        changed = dataclasses.replace(group, count=int(rng.integers(1, room + 1)))
    result = [*groups[:at], changed, *groups[at + 1 :]]
    same_kind = (
        len(result) == 2 and result[0].colour == result[1].colour and result[0].shape == result[1].shape
    )
    return groups if same_kind else result

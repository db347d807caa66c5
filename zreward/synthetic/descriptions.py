"""What can be said about a scene in each dimension, in a language of some thirty words.

`describe` says what is there: it is what a base model of the synthetic benchmark learns to say, as a pretrained model
can describe a picture before anyone taught it to grade. `rationalize` makes up defects that would explain a score,
without a look at the picture, as post-hoc reasoning chains do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from zreward.synthetic.config import DIMENSIONS
from zreward.synthetic.language import COLOURS, SHAPES, PromptSpec
from zreward.synthetic.scenes import Candidate
from zreward.synthetic.truth import (
    BEST,
    DEFECTS_OF,
    MAX_SEVERITY,
    PENALTY,
    WORST,
    AlignmentErrors,
    alignment_cost,
)

LEVELS = ("no", "slight", "clear", "strong")
"""Words of the severities 0 to 3."""
_ERRORS = ("attributes", "missing", "extra", "relation")
_MAX_COUNT = 3

WORDS = (
    *LEVELS,
    *COLOURS,
    *SHAPES,
    *(name for names in DEFECTS_OF.values() for name in names),
    *_ERRORS,
    "nothing",
    "and",
)
"""Every word that a description may have; counts are digits."""


def describe(candidate: Candidate) -> dict[str, str]:
    """A description per dimension: severities of the defects, or what is drawn and how it departs from the prompt."""
    found = {
        dimension: _defects([getattr(candidate.defects, name) for name in names], names)
        for dimension, names in DEFECTS_OF.items()
    }
    drawn = [f"{item.colour} {item.shape}" for item in candidate.objects]
    found["alignment"] = f"{' and '.join(drawn) or 'nothing'} {_alignment(candidate.alignment_errors)}"
    return {name: found[name] for name in DIMENSIONS}


def rationalize(rng: np.random.Generator, dimension: str, score: float, spec: PromptSpec) -> str:
    """A description that would deserve `score`, made up: as near to it as the costs of defects come."""
    if dimension in DEFECTS_OF:
        names = DEFECTS_OF[dimension]
        options: Sequence[tuple[int, ...]] = list(
            itertools.product(range(MAX_SEVERITY + 1), repeat=len(names))
        )
        costs = [sum(PENALTY[level] for level in levels) for levels in options]
        return _defects(options[_nearest(rng, costs, score)], names)
    errors = [
        AlignmentErrors(*counts)
        for counts in itertools.product(
            range(spec.n_objects + 1), range(spec.n_objects + 1), range(3), range(2)
        )
        if counts[0] + counts[1] <= spec.n_objects
    ]
    chosen = errors[_nearest(rng, [alignment_cost(spec, error) for error in errors], score)]
    asked = [f"{group.colour} {group.shape}" for group in spec.groups for _ in range(group.count)]
    return f"{' and '.join(asked)} {_alignment(chosen)}"


def _nearest(rng: np.random.Generator, costs: Sequence[float], score: float) -> int:
    """One of the options whose score is nearest, by chance."""
    gaps = np.abs(np.maximum(WORST, BEST - np.array(costs)) - score)
    return int(rng.choice(np.flatnonzero(gaps == gaps.min())))


def _defects(levels: Sequence[int], names: Sequence[str]) -> str:
    return " ".join(f"{LEVELS[level]} {name}" for level, name in zip(levels, names, strict=True))


def _alignment(errors: AlignmentErrors) -> str:
    counts = (errors.attributes, errors.missing, errors.extra, errors.relation)
    return " ".join(f"{min(count, _MAX_COUNT)} {name}" for count, name in zip(counts, _ERRORS, strict=True))

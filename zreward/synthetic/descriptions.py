"""What can be said about a scene in each dimension, in a language of some thirty words.

`describe` says what is there: it is what a base model of the synthetic benchmark learns to say, as a pretrained model
can describe a picture before anyone taught it to grade. `rationalize` makes up defects that would explain a score,
without a look at the picture, as post-hoc reasoning chains do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from zreward.synthetic.config import DIMENSIONS, MAX_OBJECTS
from zreward.synthetic.language import COLOURS, SHAPES, Group, PromptSpec
from zreward.synthetic.scenes import Candidate
from zreward.synthetic.truth import (
    BEST,
    DEFECTS_OF,
    MAX_SEVERITY,
    PENALTY,
    WORST,
    AlignmentErrors,
    alignment_cost,
    matched_objects,
    wrong_attributes,
)

LEVELS = ("no", "slight", "clear", "strong")
"""Words of the severities 0 to 3."""
MATCH, MISSING = "match", "missing"
"""Of an object that was asked for, beside "colour" and "shape" for one wrong attribute."""
_ERRORS = ("attributes", "missing", "extra", "relation")
_MAX_COUNT = 3

WORDS = (
    *LEVELS,
    *COLOURS,
    *SHAPES,
    *(name for names in DEFECTS_OF.values() for name in names),
    *_ERRORS,
    *(MATCH, "colour", "shape", "asked", "nothing", "and"),
)
"""Every word that a description may have; counts are digits."""


def describe(candidate: Candidate, spec: PromptSpec) -> dict[str, str]:
    """A description per dimension.

    The severities of the defects; for alignment what is drawn from left to right, then each object that was asked for
    and what became of it, then how many errors of each kind that makes.

    Args:
        candidate: with the alignment errors of `spec`.
    """
    found = {
        dimension: _defects([getattr(candidate.defects, name) for name in names], names)
        for dimension, names in DEFECTS_OF.items()
    }
    verdicts = [
        (group, _verdict(wrong_attributes(group, drawn)))
        for group, drawn in matched_objects(spec, candidate.objects)
    ]
    drawn = [(item.colour, item.shape) for item in candidate.objects]
    found["alignment"] = _alignment(drawn, verdicts, candidate.alignment_errors)
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
            range(spec.n_objects + 1), range(spec.n_objects + 1), range(3), range(2 if spec.relation else 1)
        )
        if counts[0] + counts[1] <= spec.n_objects and spec.n_objects - counts[1] + counts[2] <= MAX_OBJECTS
    ]
    chosen = errors[_nearest(rng, [alignment_cost(spec, error) for error in errors], score)]
    asked = [group for group in spec.groups for _ in range(group.count)]
    wrong = [MISSING] * chosen.missing + rng.choice(["colour", "shape"], chosen.attributes).tolist()
    fates = rng.permutation([*wrong, *[MATCH] * (len(asked) - len(wrong))]).tolist()
    verdicts = list(zip(asked, fates, strict=True))
    drawn = [_as_drawn(rng, group, fate) for group, fate in verdicts if fate != MISSING]
    drawn += [(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in range(chosen.extra)]
    return _alignment([drawn[index] for index in rng.permutation(len(drawn))], verdicts, chosen)


def _as_drawn(rng: np.random.Generator, group: Group, fate: str) -> tuple[str, str]:
    """The colour and shape of an object with this verdict."""
    if fate == "colour":
        return str(rng.choice([name for name in COLOURS if name != group.colour])), group.shape
    if fate == "shape":
        return group.colour, str(rng.choice([name for name in SHAPES if name != group.shape]))
    return group.colour, group.shape


def _nearest(rng: np.random.Generator, costs: Sequence[float], score: float) -> int:
    """One of the options whose score is nearest, by chance."""
    gaps = np.abs(np.maximum(WORST, BEST - np.array(costs)) - score)
    return int(rng.choice(np.flatnonzero(gaps == gaps.min())))


def _defects(levels: Sequence[int], names: Sequence[str]) -> str:
    return " ".join(f"{LEVELS[level]} {name}" for level, name in zip(levels, names, strict=True))


def _verdict(wrong: Sequence[str]) -> str:
    return MATCH if not wrong else wrong[0] if len(wrong) == 1 else MISSING


def _alignment(
    drawn: Sequence[tuple[str, str]], verdicts: Sequence[tuple[Group, str]], errors: AlignmentErrors
) -> str:
    seen = " and ".join(" ".join(kind) for kind in drawn) or "nothing"
    asked = " and ".join(f"{group.colour} {group.shape} {fate}" for group, fate in verdicts)
    counts = (errors.attributes, errors.missing, errors.extra, errors.relation)
    told = " ".join(f"{min(count, _MAX_COUNT)} {name}" for count, name in zip(counts, _ERRORS, strict=True))
    return f"{seen} asked {asked} {told}"

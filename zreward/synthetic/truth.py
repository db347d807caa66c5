"""What is drawn, and the scores that follow from it.

A scene's latent truth is symbolic: the objects that are drawn and the severity of each defect. The four
scores are functions of it and of the prompt alone, so the same image can be scored against any prompt.

Severities run from 0 (absent) to 3 and cost `PENALTY[severity]` points; a dimension starts at 5 and is
floored at 1. All costs are multiples of one half, so every score lies on the nine half-point bins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

from zreward.errors import UsageError
from zreward.synthetic.config import DIMENSIONS
from zreward.synthetic.language import RELATIONS, Group, PromptSpec

BEST, WORST = 5.0, 1.0
MAX_SEVERITY = 3
PENALTY = (0.0, 0.5, 1.5, 2.5)

_ATTRIBUTE_COST = {1: 2.0, 2: 1.5, 3: 1.0}
"""One wrong attribute of one object, by the number of objects that the prompt asks for."""
_OBJECT_COST = {1: 4.0, 2: 2.5, 3: 1.5}
"""An object that is missing, or wrong in colour and in shape."""
_EXTRA_COST = 1.0
_RELATION_COST = 1.5
_DEPTH_GAP = 0.05
"""Two objects closer in floor depth than this share of the picture are neither in front nor behind."""


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; lengths are shares of the picture's side.

    Attributes:
        colour, shape: keys of `COLOURS` and `SHAPES`.
        x: horizontal centre, before any camera tilt.
        base: height of its place on the floor, downwards: larger is nearer to the viewer.
        width: its width.
        floating: severity of the gap between it and its place on the floor.
        sunk: severity of its sinking into the floor.
        merged: severity of its overlap with the object before it.
    """

    colour: str
    shape: str
    x: float
    base: float
    width: float
    floating: int = 0
    sunk: int = 0
    merged: int = 0


@dataclass(frozen=True)
class Defects:
    """Severity, 0 to 3, of each defect of an image.

    Realism: noise, blur, blocks (compression), banding, texture (a printed pattern on the objects).
    Aesthetics: palette (garish room), clutter (scraps on the floor), framing (tilted camera).
    Plausibility: floating (one object hangs in the air), shadow (1 faint, 2 missing, 3 falling towards the
    light), penetration (an object sinks into the floor or into its neighbour).
    """

    noise: int = 0
    blur: int = 0
    blocks: int = 0
    banding: int = 0
    texture: int = 0
    palette: int = 0
    clutter: int = 0
    framing: int = 0
    floating: int = 0
    shadow: int = 0
    penetration: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            level = getattr(self, field.name)
            if not isinstance(level, int) or not 0 <= level <= MAX_SEVERITY:
                raise UsageError(f"severity of {field.name} must be 0, 1, 2 or 3, not {level!r}")


DEFECTS_OF = {
    "realism": ("noise", "blur", "blocks", "banding", "texture"),
    "aesthetics": ("palette", "clutter", "framing"),
    "plausibility": ("floating", "shadow", "penetration"),
}


def defect_score(defects: Defects, dimension: str) -> float:
    """The latent score of `dimension`, one of the keys of `DEFECTS_OF`."""
    if dimension not in DEFECTS_OF:
        raise UsageError(f"no defects are defined for {dimension!r}; known are {', '.join(DEFECTS_OF)}")
    cost = sum(PENALTY[getattr(defects, name)] for name in DEFECTS_OF[dimension])
    return max(WORST, BEST - cost)


@dataclass(frozen=True)
class AlignmentErrors:
    """How the drawn objects depart from the prompt, under the cheapest matching.

    Attributes:
        attributes: matched objects with one wrong attribute.
        missing: requested objects without a match (or matched with nothing in common).
        extra: drawn objects that nothing asked for.
        relation: the requested relation holds between the matched objects (0) or does not (1).
    """

    attributes: int
    missing: int
    extra: int
    relation: int


def alignment_errors(spec: PromptSpec, objects: Sequence[SceneObject]) -> AlignmentErrors:
    """What is wrong under the matching of requested with drawn objects that costs least."""
    return errors_of_matching(spec, matched_objects(spec, objects), len(objects))


def errors_of_matching(
    spec: PromptSpec, pairs: Sequence[tuple[Group, SceneObject | None]], n_drawn: int
) -> AlignmentErrors:
    """What is wrong under a matching of requested with drawn objects, of which there are `n_drawn`."""
    attributes, missing, used = 0, 0, 0
    for group, drawn in pairs:
        used += drawn is not None
        wrong = len(wrong_attributes(group, drawn))
        attributes += wrong == 1
        missing += wrong == 2
    return AlignmentErrors(attributes, missing, n_drawn - used, int(not _relation_holds(spec, pairs)))


def matched_objects(
    spec: PromptSpec, objects: Sequence[SceneObject]
) -> list[tuple[Group, SceneObject | None]]:
    """Each requested object with the drawn one that stands for it, at the least cost of errors."""
    wanted = [group for group in spec.groups for _ in range(group.count)]
    slots: list[SceneObject | None] = [*objects, *([None] * len(wanted))]
    matchings = (
        list(zip(wanted, chosen, strict=True))
        for chosen in dict.fromkeys(itertools.permutations(slots, len(wanted)))
    )
    return min(
        matchings, key=lambda pairs: alignment_cost(spec, errors_of_matching(spec, pairs, len(objects)))
    )


def relations_held(
    spec: PromptSpec, pairs: Sequence[tuple[Group, SceneObject | None]]
) -> tuple[bool, ...] | None:
    """Whether the first group stands in each of `RELATIONS` to the second, asked for or not.

    Args:
        pairs: of `matched_objects`.

    Returns:
        None where the prompt has one group, or nothing is drawn that stands for one of them.
    """
    standing = [any(drawn is not None for asked, drawn in pairs if asked is group) for group in spec.groups]
    if len(standing) < 2 or not all(standing):
        return None
    return tuple(_relation_holds(PromptSpec(spec.groups, relation), pairs) for relation in RELATIONS)


def wrong_attributes(asked: Group, drawn: SceneObject | None) -> tuple[str, ...]:
    """Which of "colour" and "shape" are not as asked for; both where nothing is drawn."""
    if drawn is None:
        return ("colour", "shape")
    return tuple(name for name in ("colour", "shape") if getattr(drawn, name) != getattr(asked, name))


def alignment_score(spec: PromptSpec, objects: Sequence[SceneObject]) -> float:
    """The latent alignment score of `objects` under the request `spec`."""
    return score_of_errors(spec, alignment_errors(spec, objects))


def score_of_errors(spec: PromptSpec, errors: AlignmentErrors) -> float:
    """The latent alignment score of what departs from the request `spec` by `errors`."""
    return max(WORST, BEST - alignment_cost(spec, errors))


def true_scores(spec: PromptSpec, objects: Sequence[SceneObject], defects: Defects) -> dict[str, float]:
    """The latent score of every dimension."""
    scores = {name: defect_score(defects, name) for name in DEFECTS_OF}
    return {name: scores[name] if name in scores else alignment_score(spec, objects) for name in DIMENSIONS}


def alignment_cost(spec: PromptSpec, errors: AlignmentErrors) -> float:
    """What the errors take from the best score, not yet floored."""
    asked = spec.n_objects
    return (
        errors.attributes * _ATTRIBUTE_COST[asked]
        + errors.missing * _OBJECT_COST[asked]
        + errors.extra * _EXTRA_COST
        + errors.relation * _RELATION_COST
    )


def _relation_holds(spec: PromptSpec, pairs: Sequence[tuple[Group, SceneObject | None]]) -> bool:
    """True where the prompt asks for no relation, or one side of it is not drawn at all."""
    if spec.relation is None:
        return True
    firsts = [drawn for group, drawn in pairs if group is spec.groups[0] and drawn is not None]
    seconds = [drawn for group, drawn in pairs if group is spec.groups[1] and drawn is not None]
    return all(_related(a, b, spec.relation) for a in firsts for b in seconds)


def _related(a: SceneObject, b: SceneObject, relation: str) -> bool:
    if relation == "left":
        return a.x < b.x
    if relation == "right":
        return a.x > b.x
    if relation == "front":
        return a.base > b.base + _DEPTH_GAP
    return a.base < b.base - _DEPTH_GAP

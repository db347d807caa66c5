"""From a prompt to what one candidate image shows: objects, places, departures and defects.

A candidate begins as a faithful layout of the request. Edits (another colour or shape, an object removed
or added, the relation mirrored) then take it away from the prompt. What the edits cost is not recorded
here: `zreward.synthetic.truth` scores the result.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from zreward.synthetic.config import SceneConfig
from zreward.synthetic.language import COLOURS, SHAPES, PromptSpec
from zreward.synthetic.truth import DEFECTS_OF, MAX_SEVERITY, Defects, SceneObject

_WIDTH = {1: 0.42, 2: 0.36, 3: 0.29}
_NEAR, _FAR = 0.93, 0.70
"""Floor depth of objects in front and behind; without a depth relation they lie between."""
_SAME_DEPTH = 0.12
"""Beyond this difference in floor depth an overlap is an occlusion, not a collision."""
_MERGE_OVERLAP = (0.0, 0.3, 0.42, 0.55)

Kind = tuple[str, str]


def sample_defects(rng: np.random.Generator, config: SceneConfig) -> Defects:
    """Independent severities; each dimension carries about the same number of defects."""
    levels: dict[str, int] = {}
    for names in DEFECTS_OF.values():
        rate = config.defect_rate * min(1.0, 3 / len(names))
        for name in names:
            levels[name] = int(rng.integers(1, MAX_SEVERITY + 1)) if rng.random() < rate else 0
    return Defects(**levels)


def sample_objects(
    rng: np.random.Generator, spec: PromptSpec, defects: Defects, config: SceneConfig
) -> tuple[SceneObject, ...]:
    """The objects of one candidate, left to right."""
    kinds = [[(group.colour, group.shape)] * group.count for group in spec.groups]
    relation = spec.relation
    weights = np.asarray(config.edit_weights, dtype=np.float64)
    for _ in range(int(rng.choice(len(weights), p=weights / weights.sum()))):
        relation = _edit(rng, kinds, relation, config.max_objects)
    objects = _place(rng, _arrange(rng, kinds, relation), relation, config)
    return _break_physics(rng, objects, defects)


def _edit(
    rng: np.random.Generator, kinds: list[list[Kind]], relation: str | None, max_objects: int
) -> str | None:
    """Apply one departure in place; returns the relation that the image will show."""
    n_objects = sum(len(group) for group in kinds)
    options = ["colour", "shape"]
    options += ["remove"] if n_objects > 1 else []
    options += ["add"] if n_objects < max_objects else []
    options += ["mirror"] * 2 if relation else []
    kind_of_edit = str(rng.choice(options))
    if kind_of_edit == "mirror":
        return {"left": "right", "right": "left", "front": "behind", "behind": "front"}[str(relation)]
    group = kinds[int(rng.choice([index for index, members in enumerate(kinds) if members]))]
    member = int(rng.integers(len(group)))
    colour, shape = group[member]
    if kind_of_edit == "colour":
        group[member] = (str(rng.choice([c for c in COLOURS if c != colour])), shape)
    elif kind_of_edit == "shape":
        group[member] = (colour, str(rng.choice([s for s in SHAPES if s != shape])))
    elif kind_of_edit == "remove":
        group.pop(member)
    else:
        group.append((str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))))
    return relation


def _arrange(
    rng: np.random.Generator, kinds: list[list[Kind]], relation: str | None
) -> list[tuple[Kind, float | None]]:
    """Kinds from left to right, each with its floor depth if the relation fixes one."""
    first = kinds[0]
    second = kinds[1] if len(kinds) > 1 else []
    depth_first = {"front": _NEAR, "behind": _FAR}.get(relation or "")
    depth_second = {"front": _FAR, "behind": _NEAR}.get(relation or "")
    row = [(kind, depth_first) for kind in first] + [(kind, depth_second) for kind in second]
    if relation == "left":
        return row
    if relation == "right":
        return row[::-1]
    return [row[index] for index in rng.permutation(len(row))]


def _place(
    rng: np.random.Generator,
    row: list[tuple[Kind, float | None]],
    relation: str | None,
    config: SceneConfig,
) -> list[SceneObject]:
    count = len(row)
    pitch = 0.92 / max(count, 1)
    objects = []
    for index, ((colour, shape), depth) in enumerate(row):
        base = rng.uniform(0.78, 0.88) if depth is None else depth + rng.uniform(-0.02, 0.02)
        perspective = 1.0 + 0.5 * (base - 0.83)
        width = _WIDTH[count] * config.object_scale * perspective * rng.uniform(0.93, 1.05)
        slack = max(0.0, pitch - width) * 0.5
        x = 0.04 + (index + 0.5) * pitch + rng.uniform(-slack, slack)
        objects.append(SceneObject(colour, shape, float(x), float(base), float(width)))
    return objects


def _break_physics(
    rng: np.random.Generator, objects: list[SceneObject], defects: Defects
) -> tuple[SceneObject, ...]:
    """Give the floating and the penetration defect to an object each (not the same one if avoidable)."""
    order = rng.permutation(len(objects))
    if defects.penetration and objects:
        target = int(order[0])
        same_depth = target > 0 and abs(objects[target].base - objects[target - 1].base) < _SAME_DEPTH
        if same_depth and rng.random() < 0.5:
            objects[target] = _merged_into(objects[target], objects[target - 1], defects.penetration)
        else:
            objects[target] = replace(objects[target], sunk=defects.penetration)
    if defects.floating and objects:
        target = int(order[-1])
        objects[target] = replace(objects[target], floating=defects.floating)
    return tuple(objects)


def _merged_into(item: SceneObject, neighbour: SceneObject, severity: int) -> SceneObject:
    """`item` moved sideways until it overlaps its left neighbour; it stays on the right of it."""
    overlap = _MERGE_OVERLAP[severity] * min(item.width, neighbour.width)
    x = neighbour.x + (item.width + neighbour.width) / 2 - overlap
    return replace(item, x=float(min(item.x, x)), merged=severity)

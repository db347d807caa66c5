"""What a prompt asks for, and the sentence that asks for it.

A `PromptSpec` is one or two groups of equal objects and an optional relation between the groups; its
sentence is drawn from a small grammar with synonyms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 42, 46),
    "blue": (42, 92, 214),
    "green": (44, 158, 70),
    "yellow": (240, 204, 40),
    "purple": (136, 58, 182),
    "orange": (240, 126, 28),
}
SHAPES = ("ball", "cube", "cone", "cylinder")
RELATIONS = ("left", "right", "front", "behind")

_NOUNS = {"ball": ("ball", "sphere"), "cube": ("cube", "block"), "cone": ("cone",), "cylinder": ("cylinder",)}
_COUNTS = {1: ("a", "one", "a single"), 2: ("two", "a pair of"), 3: ("three",)}
_RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
_JOINERS = ("and", "next to", "beside")
_FRAMES = (
    *("{}", "{}", "{}"),
    "a picture of {}",
    "a photo of {}",
    "an image showing {}",
    "{} on the floor",
    "{} in a room",
)


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and one shape."""

    count: int
    colour: str
    shape: str


@dataclass(frozen=True)
class PromptSpec:
    """One or two groups; `relation` places the first with respect to the second."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def n_objects(self) -> int:
        return sum(group.count for group in self.groups)


def sample_spec(rng: np.random.Generator, max_objects: int, relation_rate: float) -> PromptSpec:
    """A random request for at most `max_objects` objects."""
    if max_objects == 1 or rng.random() < 0.3:
        count = int(rng.integers(1, max_objects + 1))
        return PromptSpec((Group(count, *_kind(rng)),))
    first_count, second_count = 1, 1
    if max_objects >= 3 and rng.random() < 0.5:
        first_count, second_count = (2, 1) if rng.random() < 0.5 else (1, 2)
    first = _kind(rng)
    second = _kind(rng)
    while second == first:
        second = _kind(rng)
    relation = str(rng.choice(RELATIONS)) if rng.random() < relation_rate else None
    return PromptSpec((Group(first_count, *first), Group(second_count, *second)), relation)


def sentence(rng: np.random.Generator, spec: PromptSpec) -> str:
    """A natural sentence for `spec`, such as "two red cubes to the left of a blue ball"."""
    body = _phrase(rng, spec.groups[0])
    if len(spec.groups) == 2:
        words = _RELATION_WORDS[spec.relation] if spec.relation else _JOINERS
        body = f"{body} {rng.choice(words)} {_phrase(rng, spec.groups[1])}"
    return str(rng.choice(_FRAMES)).format(body)


def _kind(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))


def _phrase(rng: np.random.Generator, group: Group) -> str:
    count = str(rng.choice(_COUNTS[group.count]))
    noun = str(rng.choice(_NOUNS[group.shape])) + ("s" if group.count > 1 else "")
    article = "an" if count == "a" and group.colour[0] in "aeiou" else count
    return f"{article} {group.colour} {noun}"

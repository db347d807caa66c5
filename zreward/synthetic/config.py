"""How hard the synthetic scenes are: one frozen dataclass.

Every field is a knob of the generator, so that a difficulty is a value that can be recorded beside the
figures measured at it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zreward.errors import UsageError

DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")
MIN_SIZE, MAX_SIZE = 48, 480
MAX_OBJECTS = 3
"""The most that fit into a picture."""

GENERATOR_VERSION = 1
"""Raised whenever equal seeds and configs give other pictures or scores than before."""


@dataclass(frozen=True)
class SceneConfig:
    """The difficulty and the look of generated scenes.

    Attributes:
        size: side of the square images in pixels.
        max_objects: most objects that a prompt asks for or an image shows, 1 to 3.
        object_scale: scale of the objects; 1.0 fills the picture comfortably, smaller is harder.
        defect_contrast: visibility of realism, aesthetics and plausibility defects of the same severity;
            1.0 is easily seen, 0.5 is subtle. Scores do not depend on it, only how hard they are to read.
        defect_rate: probability that each of a dimension's defects is present; more gives lower scores.
        edit_weights: relative frequency of images with 0, 1, 2, … departures from the prompt.
        relation_rate: share of two-group prompts that ask for a spatial relation.
        annotators: size of the simulated panel; the highest and the lowest score are dropped, so at least 3.
        annotator_bias: standard deviation of an annotator's constant offset per dimension, in score units.
        annotator_noise: standard deviation of an annotator's error per judgement, in score units.
        panel_seed: who the annotators are; the same people judge every split unless this changes.
    """

    size: int = 120
    max_objects: int = 3
    object_scale: float = 1.0
    defect_contrast: float = 1.0
    defect_rate: float = 0.42
    edit_weights: tuple[float, ...] = (0.28, 0.34, 0.22, 0.16)
    relation_rate: float = 0.6
    annotators: int = 5
    annotator_bias: float = 0.2
    annotator_noise: float = 0.35
    panel_seed: int = 0

    def __post_init__(self) -> None:
        _check("size", self.size, MIN_SIZE, MAX_SIZE, integer=True)
        _check("max_objects", self.max_objects, 1, MAX_OBJECTS, integer=True)
        _check("object_scale", self.object_scale, 0.4, 1.2)
        _check("defect_contrast", self.defect_contrast, 0.0, 2.0)
        _check("defect_rate", self.defect_rate, 0.0, 1.0)
        _check("relation_rate", self.relation_rate, 0.0, 1.0)
        _check("annotators", self.annotators, 3, 99, integer=True)
        _check("annotator_bias", self.annotator_bias, 0.0, 4.0)
        _check("annotator_noise", self.annotator_noise, 0.0, 4.0)
        _check("panel_seed", self.panel_seed, 0, 2**63 - 1, integer=True)
        weights = self.edit_weights
        if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
            raise UsageError(f"SceneConfig.edit_weights must be >= 0 with a positive sum, not {weights}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SceneConfig:
        """A config from its JSON form; an unknown key is an error that lists the known ones."""
        known = [field.name for field in dataclasses.fields(SceneConfig)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise UsageError(f"SceneConfig has no field {unknown[0]!r}; known are {', '.join(known)}")
        values = dict(data)
        if "edit_weights" in values:
            values["edit_weights"] = tuple(values["edit_weights"])
        return SceneConfig(**values)


def _check(name: str, value: Any, low: float, high: float, *, integer: bool = False) -> None:
    kind = int if integer else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        noun = "an integer" if integer else "a number"
        raise UsageError(f"SceneConfig.{name} must be {noun} from {low} to {high}, not {value!r}")

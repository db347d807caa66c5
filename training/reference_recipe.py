"""What decides a run of the reference student: sizes, stages, difficulty, seeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from zreward.errors import UsageError
from zreward.synthetic import SceneConfig
from zreward.training.reference_model import TOKEN_SIDE, StudentShape

TRAIN_SEED, VALIDATION_SEED, TEST_SEED, TOKENIZER_SEED = 1_000, 2_000, 3_000, 4_000
"""Scene splits, offset by the run's seed: no scene of one is in another."""


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        steps, minutes: the stage ends at the first that is reached.
        rate, vision_rate: AdamW learning rates; 0 keeps the vision tower frozen.
        batch: images per step.
    """

    steps: int
    minutes: float
    rate: float
    vision_rate: float
    batch: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.minutes > 0:
            raise UsageError(f"a stage needs at least one step, one image a step and some minutes: {self}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run; written into its log.

    `language_images` of the training images are enough for the language stage, which caches their features.
    """

    seed: int = 0
    train_prompts: int = 8_000
    train_candidates: int = 5
    extra_prompts: int = 3
    language_images: int = 16_000
    validation_prompts: int = 160
    test_prompts: int = 400
    candidates: int = 6
    threads: int = 2
    validate_minutes: float = 2.5
    vision: Stage = Stage(steps=6_000, minutes=18, rate=1e-3, vision_rate=1e-3, batch=32)
    language: Stage = Stage(steps=6_000, minutes=17, rate=1e-3, vision_rate=0.0, batch=32)
    joint: Stage = Stage(steps=6_000, minutes=25, rate=8e-4, vision_rate=5e-4, batch=32)
    shape: StudentShape = field(default_factory=StudentShape)
    scenes: SceneConfig = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        counts = ("train_prompts", "train_candidates", "validation_prompts", "test_prompts", "threads")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.candidates < 2 or self.seed < 0:
            raise UsageError(f"pairs need 2 candidates a prompt, not {self.candidates}, and a seed >= 0")
        if self.shape.image_size % TOKEN_SIDE or self.shape.image_size != self.scenes.size:
            raise UsageError(
                f"the student's image_size {self.shape.image_size} must be the scenes' size "
                f"{self.scenes.size} and a multiple of {TOKEN_SIDE}"
            )

"""The first lesson of the base models: to find in a picture what a text asks for.

The language model learns from the facts of scenes alone, by the reference student's reading losses: which defects a
picture has and how strong they are, and what became of each object that was asked for. It is told no score, and hears
of the scenes of no split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zreward.training.reference_evaluate import RunLog
from zreward.training.reference_learner import PairStream, Prompts, Student, cached_features
from zreward.training.reference_optimize import run_stage
from zreward.training.reference_recipe import Recipe, Stage
from zreward.training.reference_student import split, two_questions

SCENES_SEED = 16_000
_CANDIDATES, _OTHER_PROMPTS = 4, 3
_ALONE = 0.15
"""Share of the steps with one object in the prompt, and again as much for each further one but the last."""


def learn_to_read(student: Student, recipe: Recipe, steps: int, work: Path, n_prompts: int = 3_000) -> None:
    """Train the language model of a student, whose tower is trained and stays as it is.

    Args:
        student: of `recipe`.
        steps: of 32 images.
        work: for the scenes and the log.
        n_prompts: of the scenes, four images each.
    """
    torch.set_num_threads(recipe.threads)
    rng = np.random.default_rng(recipe.seed)
    work.mkdir(parents=True, exist_ok=True)
    data = split(recipe, SCENES_SEED, n_prompts, _CANDIDATES, _OTHER_PROMPTS, work)
    cached = cached_features(student, data.images)
    prompts = Prompts(student.encoder, data)
    stage = Stage(steps=steps, minutes=24 * 60, rate=1e-3, vision_rate=0.0, batch=32)
    stream = PairStream(rng, data, prompts, stage.batch, len(cached))

    def step(progress: float) -> Tensor:
        rows, which = stream.next(min(recipe.scenes.max_objects, 1 + int(progress / _ALONE)))
        asked = two_questions(rng)
        answers = student.form(prompts.batch(rows, which), cached[rows].float(), asked)
        return student.heads.reading_loss(answers, data, rows, which, asked)

    run_stage("reading", stage, student, step, None, RunLog(work / "log.jsonl"), stage.minutes)

"""Base models of the reproduction: small Qwen3.5 models that can describe a scene and answer with some score.

They stand for the pretrained models that the paper starts from. Their vision tower is that of the shipped reference
student, and stays as it is. The language model is new:

1. it learns to read pictures (`reading.py`), without scores;
2. it learns to describe scenes in the four dimensions, by `zreward train rewarddance` on the chains of the split
   `pretrain`, which has no labels. The teacher's goes on from the student's, with more layers on top that change
   nothing at first;
3. a cold start: it learns to end a description with a score, on a few scenes that careless annotators judged (the split
   `opinions`). This is the form of an answer and hardly a judgement.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.reproduction.reading import learn_to_read
from benchmarks.reproduction.settings import Settings, Size
from zreward.commands.demo import REFERENCE_STUDENT
from zreward.staging import staged_directory
from zreward.training.reference_learner import Student
from zreward.training.reference_model import StudentShape
from zreward.training.reference_recipe import Recipe
from zreward.training.reference_teacher import (
    Lesson,
    description_texts,
    grown,
    learn_chains,
    load_weights,
    save_start,
    shown,
)


def make_base(size: Size, settings: Settings, data: Path, work: Path) -> None:
    """Make the checkpoint of a size in `work`, unless it is there.

    Args:
        data: the benchmark's folder.
    """
    final = work / f"base-{size.name}"
    if final.is_dir():
        return
    start = work / f"blank-{size.name}"
    if not start.is_dir():
        recipe = recipe_of(size, settings)
        if size.grown_from:
            student = grown(recipe, work / f"describe-{size.grown_from}" / "model")
        else:
            student = with_trained_tower(recipe)
            learn_to_read(student, recipe, settings.read_steps, work / f"read-{size.name}")
        save_start(student, start)
    described = taught(
        f"describe-{size.name}",
        start,
        data / "pretrain",
        settings,
        work,
        settings.describe_steps[size.name],
        score_weight=0.0,
    )
    answering = taught(
        f"answer-{size.name}",
        described,
        data / "opinions",
        settings,
        work,
        settings.answer_steps,
        score_weight=1.0,
    )
    with staged_directory(final, replace=False, kind="checkpoint") as staging:
        shutil.copytree(answering, staging.path, dirs_exist_ok=True)
        staging.commit()


def taught(
    name: str, start: Path, split: Path, settings: Settings, work: Path, steps: int, score_weight: float
) -> Path:
    """A checkpoint that learned the chains of a split, and its scores where `score_weight` is positive."""
    return learn_chains(
        Lesson(steps, settings.describe_batch, 1e-3, score_weight),
        work / name,
        start,
        split,
        precision=settings.precision,
        micro_batch=settings.micro_batch,
        threads=settings.threads,
        progress=shown(name),
    )


def with_trained_tower(recipe: Recipe) -> Student:
    """The shipped reference student's tower and a language model that knows nothing."""
    student = Student(recipe, description_texts(recipe.scenes))
    weights = load_file(REFERENCE_STUDENT / "model.safetensors")
    load_weights(student.model, {name: value for name, value in weights.items() if ".visual." in name})
    return student


def recipe_of(size: Size, settings: Settings) -> Recipe:
    """Of the first lessons, which one process gives before there is anything else to do, so on all cores."""
    shape = dataclasses.replace(StudentShape(), layers=size.layers)
    return Recipe(shape=shape, scenes=settings.scenes, threads=os.cpu_count() or 1)

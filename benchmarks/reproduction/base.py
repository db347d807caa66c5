"""Base models of the reproduction: small Qwen3.5 models that can describe a scene and answer with some score.

They stand for the pretrained models that the paper starts from. Three stages:

1. the vision tower learns what covers each image token and how bad each defect is (`reference_learner`), once for all
   sizes;
2. the whole model learns to describe scenes in the four dimensions, by `zreward train rewarddance` on the chains of the
   split `pretrain`, which has no labels;
3. a cold start: it learns to end a description with a score, on a few scenes that careless annotators judged (the split
   `opinions`). This is the form of an answer and hardly a judgement.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reproduction.settings import Settings, Size
from zreward.synthetic import make_scene
from zreward.synthetic.descriptions import describe
from zreward.training import rewarddance
from zreward.training.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from zreward.training.reference_evaluate import RunLog
from zreward.training.reference_learner import Student
from zreward.training.reference_model import StudentShape, save_tokenizer
from zreward.training.reference_optimize import run_stage
from zreward.training.reference_recipe import Recipe, Stage
from zreward.training.reference_student import split

TOWER_SEED = 16_000
"""Scenes of the first stage, which no split of the benchmark has."""


def make_base(size: Size, settings: Settings, data: Path, work: Path) -> None:
    """Make the checkpoint of a size in `work`, unless it is there.

    Args:
        data: the benchmark's folder.
    """
    final = work / f"base-{size.name}"
    if final.is_dir():
        return
    blank = work / f"blank-{size.name}"
    if not blank.is_dir():
        write_blank(size, settings, work, blank)
    described = taught(
        f"describe-{size.name}",
        blank,
        data / "pretrain",
        settings,
        work,
        settings.describe_steps,
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
    shutil.copytree(answering, final)


def taught(
    name: str, start: Path, split: Path, settings: Settings, work: Path, steps: int, score_weight: float
) -> Path:
    """A checkpoint that learned the chains of a split, and its scores where `score_weight` is positive."""
    run = work / name
    if not (run / "model").is_dir():
        rewarddance.train(
            TrainConfig(
                DataConfig(str(split / "scenes.jsonl")),
                ModelConfig(str(start), train_vision=True, precision=settings.precision),
                RunConfig(
                    str(run),
                    steps=steps,
                    batch_size=settings.describe_batch,
                    micro_batch=settings.micro_batch,
                    save_every=200,
                    log_every=20,
                    threads=settings.threads,
                ),
                OptimizerConfig(
                    learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=steps // 20
                ),
                {"chains": str(split / "chains.jsonl"), "score_weight": score_weight, "max_new_tokens": 48},
            ),
            shown(name),
        )
    return run / "model"


def write_blank(size: Size, settings: Settings, work: Path, directory: Path) -> None:
    """A checkpoint with a trained tower and an untrained language model."""
    recipe = recipe_of(size, settings)
    student = new_student(recipe)
    tower = tower_weights(settings, work)
    own = student.model.model.visual
    fitting = {name: value for name, value in tower.items() if own.state_dict()[name].shape == value.shape}
    own.load_state_dict(fitting, strict=False)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    student.model.bfloat16().save_pretrained(partial)
    save_tokenizer(student.tokenizer, partial)
    student.contract.save(partial)
    partial.rename(directory)


def tower_weights(settings: Settings, work: Path) -> dict[str, Tensor]:
    """The vision tower after the first stage, from `work` if it is there."""
    path = work / "tower.safetensors"
    if not path.is_file():
        recipe = recipe_of(settings.sizes[0], settings)
        student = new_student(recipe)
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        data = split(recipe, TOWER_SEED, settings.tower_prompts, 5, 0, work)
        rng = np.random.default_rng(settings.base_seed)
        log = RunLog(work / "tower.jsonl")

        def step(_: float) -> Tensor:
            rows = rng.integers(len(data), size=recipe.vision.batch)
            return student.heads.vision_loss(student.features(data.images[rows]), data, rows)

        run_stage("vision", recipe.vision, student, step, None, log, 1e9)
        partial = path.with_suffix(".partial")
        save_file(student.model.model.visual.state_dict(), partial)
        partial.replace(path)
    return load_file(path)


def recipe_of(size: Size, settings: Settings) -> Recipe:
    shape = dataclasses.replace(
        StudentShape(), layers=size.layers, hidden=size.hidden, ffn=size.ffn, heads=size.heads
    )
    stage = Stage(steps=settings.tower_steps, minutes=1e6, rate=1e-3, vision_rate=1e-3, batch=32)
    return Recipe(seed=settings.base_seed, shape=shape, vision=stage, threads=settings.threads or 1)


def new_student(recipe: Recipe) -> Student:
    return Student(recipe, description_texts(recipe))


def description_texts(recipe: Recipe) -> Iterator[str]:
    """Descriptions of scenes that no split has, for the tokenizer."""
    small = dataclasses.replace(recipe.scenes, size=48)
    for index in range(300):
        scene = make_scene(small, 17_000, index, candidates=1)
        yield from describe(scene.candidates[0], scene.spec).values()


def shown(name: str) -> rewarddance.Progress:
    """Progress on stderr, a line every tenth."""
    seen: set[tuple[str, int]] = set()

    def progress(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if (stage, tenth) not in seen:
            seen.add((stage, tenth))
            print(f"{name}: {stage} {done:,} of {total:,}", file=sys.stderr, flush=True)

    return progress

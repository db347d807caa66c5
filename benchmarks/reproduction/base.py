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
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3_5ForConditionalGeneration

from benchmarks.reproduction.reading import learn_to_read
from benchmarks.reproduction.settings import Settings, Size
from zreward.commands.demo import REFERENCE_STUDENT
from zreward.staging import staged_directory
from zreward.synthetic import make_scene
from zreward.synthetic.descriptions import describe
from zreward.training import rewarddance
from zreward.training.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from zreward.training.reference_learner import Student
from zreward.training.reference_model import StudentShape, save_tokenizer
from zreward.training.reference_recipe import Recipe

MAX_NEW_TOKENS = 48

_ADDS_TO_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
"""The last product of each half of a layer; where it is 0, the layer hands on what it was given."""


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
    run = work / name
    if not (run / "model").is_dir():
        rewarddance.train(
            TrainConfig(
                DataConfig(str(split / "scenes.jsonl")),
                ModelConfig(str(start), precision=settings.precision),
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
                {
                    "chains": str(split / "chains.jsonl"),
                    "score_weight": score_weight,
                    "max_new_tokens": MAX_NEW_TOKENS,
                },
            ),
            shown(name),
        )
    return run / "model"


def with_trained_tower(recipe: Recipe) -> Student:
    """The shipped reference student's tower and a language model that knows nothing."""
    student = Student(recipe, description_texts(recipe))
    weights = load_file(REFERENCE_STUDENT / "model.safetensors")
    load_weights(student.model, {name: value for name, value in weights.items() if ".visual." in name})
    return student


def grown(recipe: Recipe, start: Path) -> Student:
    """A checkpoint with more layers on top, which change nothing until they learn."""
    student = Student(recipe, description_texts(recipe))
    known = load_file(start / "model.safetensors")
    pass_on_at_first(student.model, known)
    load_weights(student.model, known)
    return student


def save_start(student: Student, directory: Path) -> None:
    with staged_directory(directory, replace=False, kind="checkpoint") as staging:
        student.model.save_pretrained(staging.path)
        save_tokenizer(student.tokenizer, staging.path)
        student.contract.save(staging.path)
        staging.commit()


def load_weights(model: Qwen3_5ForConditionalGeneration, weights: dict[str, Tensor]) -> None:
    """Set some of a model's weights.

    Raises:
        ValueError: the model has no such weight.
    """
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        layers = model.config.text_config.num_hidden_layers
        raise ValueError(f"{unexpected[0]} has no place in a model of {layers} layers")


@torch.no_grad()
def pass_on_at_first(model: Qwen3_5ForConditionalGeneration, known: dict[str, Tensor]) -> None:
    """Let every layer that `known` has no weights of hand on what it is given, until it has learned."""
    for name, parameter in model.named_parameters():
        if name not in known and name.endswith(_ADDS_TO_RESIDUAL):
            parameter.zero_()


def recipe_of(size: Size, settings: Settings) -> Recipe:
    """Of the first lessons, which one process gives before there is anything else to do, so on all cores."""
    shape = dataclasses.replace(StudentShape(), layers=size.layers)
    return Recipe(shape=shape, scenes=settings.scenes, threads=os.cpu_count() or 1)


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

"""Train the reference student from scratch: tokenizer, vision tower, language model, one script, one CPU.

    python -m zreward.training.reference_student --out zreward/assets/reference-student --seed 0

Read from top to bottom, three stages make a student:

1. vision: the tower alone learns what covers each image token and how bad each defect is;
2. language: on frozen image features the decoder learns to compare them with the prompt, one, two and
   then three objects at a time. Alignment stays at chance for a while and then breaks through;
3. joint: everything together, at a lower rate for the tower.

All stages after the first train in the serving form (`ServingForm`). A stage ends at its number of steps
or minutes, whichever is first, and its learning rate follows that progress, so a slow machine makes a
weaker student and not an unfinished one. Finished stages found in `--work` are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zreward.contract import ScoreContract
from zreward.errors import UsageError, ZrewardError
from zreward.synthetic import DIMENSIONS
from zreward.training.reference_card import write_card
from zreward.training.reference_data import MAX_DRAWN, SceneArrays, build_arrays
from zreward.training.reference_evaluate import RunLog, label_ceiling, score_metrics, served_logits
from zreward.training.reference_learner import (
    PairStream,
    Prompts,
    Student,
    cached_features,
    predict,
    round_to_bfloat16,
    save_student,
)
from zreward.training.reference_losses import score_loss, soft_targets
from zreward.training.reference_model import TOKEN_SIDE
from zreward.training.reference_optimize import run_stage
from zreward.training.reference_recipe import TEST_SEED, TRAIN_SEED, VALIDATION_SEED, Recipe


def train(recipe: Recipe, out: Path, work: Path, command: str = "") -> dict[str, Any]:
    """Train, save and evaluate a student; returns the held-out figures that are also in its log."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    for directory in (out, work):
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory} is not a directory")
        directory.mkdir(parents=True, exist_ok=True)
    log = RunLog(out / "training_log.jsonl", resumed=any(work.glob("*.safetensors")))
    log.start(recipe, command)

    student = Student(recipe)
    data = split(
        recipe, TRAIN_SEED, recipe.train_prompts, recipe.train_candidates, recipe.extra_prompts, work
    )
    validation = split(recipe, VALIDATION_SEED, recipe.validation_prompts, recipe.candidates, 0, work)
    scenes = LabelledScenes.of(student, data)

    # Stage 1: see.
    if not resumed(student, work / "vision.safetensors", log):

        def vision_step(_: float) -> Tensor:
            rows = rng.integers(len(data), size=recipe.vision.batch)
            return student.heads.vision_loss(student.features(data.images[rows]), data, rows)

        run_stage("vision", recipe.vision, student, vision_step, None, log, recipe.validate_minutes)
        student.save_parts(work / "vision.safetensors")

    # Stage 2: read, on features that do not change.
    if not resumed(student, work / "language.safetensors", log):
        cached = cached_features(student, data.images[: recipe.language_images])
        cached_validation = cached_features(student, validation.images)
        language_step = language_loss(
            student,
            scenes,
            cached,
            recipe.language.batch,
            rng,
            questions=two_questions,
            most_asked=lambda progress: 1 if progress < 0.08 else 2 if progress < 0.25 else MAX_DRAWN,
        )

        def validate_language() -> dict[str, Any]:
            return score_metrics(
                predict(student, validation, cached_validation), validation, student.contract
            )

        run_stage(
            "language",
            recipe.language,
            student,
            language_step,
            validate_language,
            log,
            recipe.validate_minutes,
        )
        student.save_parts(work / "language.safetensors")

    # Stage 3: both.
    if not resumed(student, work / "joint.safetensors", log):
        stream = PairStream(rng, data, scenes.prompts, recipe.joint.batch, len(data))

        def joint_step(progress: float) -> Tensor:
            rows, which = stream.next(max_asked=3)
            image = student.features(data.images[rows])
            asked = two_questions(rng)
            answers = student.form(scenes.prompts.batch(rows, which), image, asked)
            loss = score_loss(answers.logits_bqk, scenes.targets[rows, which][:, asked])
            auxiliary = 0.5 * student.heads.vision_loss(image, data, rows)
            auxiliary = auxiliary + 0.5 * student.heads.reading_loss(answers, data, rows, which, asked)
            return loss + (1.0 - 0.7 * progress) * auxiliary

        def validate_joint() -> dict[str, Any]:
            logits = predict(student, validation, cached_features(student, validation.images))
            save_student(student, out, logits, validation)
            return score_metrics(logits, validation, student.contract)

        run_stage("joint", recipe.joint, student, joint_step, validate_joint, log, recipe.validate_minutes)
        student.save_parts(work / "joint.safetensors")

    # The student as it ships: rounded, calibrated, saved, and judged from its files.
    round_to_bfloat16(student.model)
    logits = predict(student, validation, cached_features(student, validation.images))
    contract = save_student(student, out, logits, validation)
    test = split(recipe, TEST_SEED, recipe.test_prompts, recipe.candidates, 0, work)
    result = {
        "validation": score_metrics(logits, validation, contract),
        "test": score_metrics(served_logits(out, test), test, contract, intervals=True),
        "test_label_noise_ceiling": label_ceiling(test, recipe.scenes),
        "temperatures": dict(zip(contract.dimension_names, contract.temperatures, strict=True)),
        "parameters": sum(p.numel() for p in student.model.parameters()),
    }
    log.finish(result)
    write_card(out, recipe, result, command, _history(recipe))
    return result


@dataclass(frozen=True)
class LabelledScenes:
    """A training split, with the ids of its prompts and the soft targets [N, K, q, bins] of its labels."""

    data: SceneArrays
    prompts: Prompts
    targets: Tensor

    @classmethod
    def of(cls, student: Student, data: SceneArrays) -> LabelledScenes:
        return cls(data, Prompts(student.encoder, data), all_targets(student.contract, data))


def language_loss(
    student: Student,
    scenes: LabelledScenes,
    features_ntd: Tensor,
    batch: int,
    rng: np.random.Generator,
    *,
    questions: Callable[[np.random.Generator], list[int]],
    most_asked: Callable[[float], int] = lambda _: MAX_DRAWN,
    relations: bool = False,
) -> Callable[[float], Tensor]:
    """The loss of the next batch at a progress of the stage: of the scores, and of what should be noticed.

    Args:
        features_ntd: of the first images, which alone are used; they do not change.
        questions: draws those of a batch.
        most_asked: objects that a prompt may ask for, by the progress.
        relations: also of what stands where; `questions` must then draw alignment.
    """
    stream = PairStream(rng, scenes.data, scenes.prompts, batch, len(features_ntd))

    def loss_at(progress: float) -> Tensor:
        rows, which = stream.next(max_asked=most_asked(progress))
        asked = questions(rng)
        answers = student.form(scenes.prompts.batch(rows, which), features_ntd[rows].float(), asked)
        loss = score_loss(answers.logits_bqk, scenes.targets[rows, which][:, asked])
        loss = loss + student.heads.reading_loss(answers, scenes.data, rows, which, asked)
        if relations:
            loss = loss + student.heads.relation_loss(answers, scenes.data, rows, which, asked)
        return loss

    return loss_at


def split(
    recipe: Recipe, offset: int, n_prompts: int, candidates: int, extra_prompts: int, work: Path
) -> SceneArrays:
    """The arrays of one split, kept in `work` between runs of the same recipe."""
    difficulty = hashlib.sha256(repr(recipe.scenes).encode()).hexdigest()[:12]
    key = f"{offset + recipe.seed}-{n_prompts}x{candidates}-{extra_prompts}-{difficulty}"
    path = work / f"scenes-{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            return SceneArrays(**stored)
    data = build_arrays(
        recipe.scenes,
        offset + recipe.seed,
        n_prompts,
        candidates,
        token_side=recipe.shape.image_size // TOKEN_SIDE,
        extra_prompts=extra_prompts,
        workers=recipe.threads,
    )
    partial = work / "partial.npz"
    np.savez(partial, **{f.name: getattr(data, f.name) for f in dataclasses.fields(data)})
    partial.replace(path)
    return data


def _history(recipe: Recipe) -> str:
    train, validation, test = (recipe.seed + offset for offset in (TRAIN_SEED, VALIDATION_SEED, TEST_SEED))
    return (
        f"The scene splits have separate seeds: training {train}, validation {validation}, test {test}.\n"
        "`training_log.jsonl` has the whole recipe, the library versions, the loss curve and the validation figures."
    )


def all_targets(contract: ScoreContract, data: SceneArrays) -> Tensor:
    """Soft targets [N, K, q, bins] of every image under each of its prompts."""
    n_images, n_prompts, n_dimensions = data.labels.shape
    targets = soft_targets(
        torch.from_numpy(data.labels).flatten(0, 1),
        torch.from_numpy(data.annotations).flatten(0, 1),
        contract.bins,
    )
    return targets.view(n_images, n_prompts, n_dimensions, -1)


def two_questions(rng: np.random.Generator) -> list[int]:
    """Two of the contract's questions; alignment, the hardest to learn, is among them more often."""
    others = len(DIMENSIONS) - 1
    return sorted(rng.choice(len(DIMENSIONS), 2, replace=False, p=[0.34, *[0.66 / others] * others]).tolist())


def alignment_and_another(rng: np.random.Generator) -> list[int]:
    """Alignment, and one of the questions that are learned sooner."""
    return [0, int(rng.integers(1, len(DIMENSIONS)))]


def resumed(student: Student, path: Path, log: RunLog) -> bool:
    """Load a finished stage from `path` if it is there."""
    if not path.exists():
        return False
    student.load_parts(path)
    log.note(f"{path.name} found: that stage is not repeated")
    return True


def recipe_from_options(options: argparse.Namespace) -> Recipe:
    """The default recipe with the seed, threads and time limits of the command line."""
    recipe = Recipe(seed=options.seed, threads=options.threads)
    if options.minutes is None:
        return recipe
    vision, language, joint = options.minutes
    return dataclasses.replace(
        recipe,
        vision=dataclasses.replace(recipe.vision, minutes=vision),
        language=dataclasses.replace(recipe.language, minutes=language),
        joint=dataclasses.replace(recipe.joint, minutes=joint),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m zreward.training.reference_student", description="Train the reference student."
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference-student"), help="scenes and stages"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, nargs=3, metavar=("VISION", "LANGUAGE", "JOINT"), help="limit per stage"
    )
    options = parser.parse_args(arguments)
    command = f"{parser.prog} --out {options.out} --seed {options.seed} --threads {options.threads}"
    if options.minutes is not None:
        command += " --minutes " + " ".join(f"{minutes:g}" for minutes in options.minutes)
    try:
        train(recipe_from_options(options), options.out, options.work, command)
    except ZrewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())

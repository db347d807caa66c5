"""Make the reference student that ships: what a reasoning teacher judges, distilled into the first student.

    python -m zreward.training.reference_distill --first build/first-student --out zreward/assets/reference-student

`--first` is a student of `zreward.training.reference_student`, which learned to grade from labels. Read from top to
bottom:

1. base: the first student goes on learning to grade, from as many labelled scenes again, and to notice what stands
   where, which labels alone had not taught it. It stands in for the pretrained model that teacher and student begin as;
2. answer: with twice the layers it learns to say what it sees in a dimension, and to end that description with a score;
3. judge: by GDSO descriptions and scores come to serve the labels. This is the teacher;
4. distil: by RISD the base learns the teacher's distributions on scenes that nobody labelled, and answers with no words
   between. The vision tower stays the first student's in all stages.

Every stage after the base is a run of `zreward train`'s own functions in a folder of `--work`. What is finished there
is not repeated, and what was interrupted in those stages goes on from its last state.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import Qwen3_5ForConditionalGeneration

from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import UsageError, ZrewardError
from zreward.staging import staged_directory
from zreward.synthetic.benchmark import Split, write_split
from zreward.synthetic.dataset import SCENES_FILE
from zreward.training import gdso, risd
from zreward.training.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from zreward.training.log import LOG_FILE
from zreward.training.reference_card import write_card
from zreward.training.reference_data import SceneArrays
from zreward.training.reference_evaluate import (
    RunLog,
    expected_scores,
    fit_temperatures,
    hpa_gain,
    label_ceiling,
    score_metrics,
    served_logits,
)
from zreward.training.reference_learner import Student, cached_features, predict
from zreward.training.reference_optimize import run_stage
from zreward.training.reference_recipe import TEST_SEED, VALIDATION_SEED, Recipe, Stage
from zreward.training.reference_student import LabelledScenes, alignment_and_another, language_loss, split
from zreward.training.reference_teacher import (
    MAX_NEW_TOKENS,
    Lesson,
    learn_chains,
    load_weights,
    save_start,
    shown,
    with_words,
)

LOG, FIRST_LOG = "training_log.jsonl", "first_training_log.jsonl"
_BASE_SEED = 23_000
_LABELLED = Split(19_000, 3_000, 4, True, "descriptions")
_UNLABELLED = Split(13_000, 1_000, 4, False)
_WATCHED = Split(14_000, 60, 6, True)

_BASE = Stage(steps=2_400, minutes=240, rate=8e-4, vision_rate=0.0, batch=32)
_ANSWER = Lesson(steps=800, batch=16, rate=4e-4, score_weight=1.0)

_KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of the first student that are the next one's as well."""


@dataclass(frozen=True)
class Learning:
    """Of a run: its steps, what one step takes, and the highest learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Distillation:
    """Everything that decides a run; written into its log.

    Attributes:
        recipe: of the first student; its scenes, seed, threads and held-out splits are this run's as well.
        teacher_layers: of the teacher's language model.
        base: on as many scenes as `recipe` has for training, others than those, in the first student's shape.
        labelled, unlabelled, watched: scenes of the stages after it, and those on which they are validated; their seeds
            are offset by the run's.
        answer: descriptions and the scores after them.
        judge: GDSO, in pairs; `group_size` outputs of each question, `policy_weight` of L_GRPO.
        distil: RISD, in images.
        traces: outputs of the teacher that are averaged for a question.
        micro_batch: sequences in one pass.
        watched_images: of `watched` that are asked at each validation.
    """

    recipe: Recipe = field(default_factory=Recipe)
    teacher_layers: int = 8
    base: Stage = _BASE
    labelled: Split = _LABELLED
    unlabelled: Split = _UNLABELLED
    watched: Split = _WATCHED
    answer: Lesson = _ANSWER
    judge: Learning = Learning(steps=60, batch=16, rate=1e-4)
    group_size: int = 4
    policy_weight: float = 0.1
    distil: Learning = Learning(steps=500, batch=32, rate=2e-4)
    traces: int = 1
    micro_batch: int = 256
    watched_images: int = 120

    @property
    def teacher_recipe(self) -> Recipe:
        shape = dataclasses.replace(self.recipe.shape, layers=self.teacher_layers)
        return dataclasses.replace(self.recipe, shape=shape)


def distil(plan: Distillation, first: Path, out: Path, work: Path, command: str = "") -> dict[str, Any]:
    """Make a teacher of the first student, teach a student by it, save and judge that one.

    Args:
        first: checkpoint of the first student, with its log.
        out: checkpoint to write; one that is there is replaced once the new one is whole.
        work: for scenes and runs.

    Returns:
        The held-out figures that are also in its log.

    Raises:
        UsageError: a directory cannot be used, or `first` has no log.
        CheckpointError: `first` is damaged.
    """
    if not (first / LOG).is_file():
        raise UsageError(f"{first} has no {LOG}: it must be a student that reference_student has made")
    Checkpoint.open(first)
    if work.exists() and not work.is_dir():
        raise UsageError(f"{work} is not a directory")
    # Staged first: a name that must not be replaced is refused before hours of training.
    with staged_directory(out, replace=True, kind="checkpoint") as staging:
        student, base = taught(plan, first, work)
        result = shipped(student, base, first, staging.path, plan, work, command)
        staging.commit()
    return result


def taught(plan: Distillation, first: Path, work: Path) -> tuple[Path, Path]:
    """Train what `work` does not have yet; returns the student of RISD and the base, two checkpoints."""
    work.mkdir(parents=True, exist_ok=True)

    # Base.
    torch.set_num_threads(plan.recipe.threads)
    base = base_learned(plan, first, work)

    # Answer.
    start = work / "answer" / "start"
    if not start.is_dir():
        save_start(with_words(plan.teacher_recipe, base), start)
    scenes = drawn(work / "labelled", plan.labelled, plan)
    answering = chains_learned(plan.answer, work / "answer", start, scenes, plan)

    # Judge.
    watched = drawn(work / "watched", plan.watched, plan) / SCENES_FILE
    teacher = work / "judge" / "run" / "model"
    if not teacher.is_dir():
        config = train_config(plan, plan.judge, answering, scenes / SCENES_FILE, watched, work / "judge")
        gdso.train(with_section(config, gdso_section(plan)), shown("judge"))

    # Distil.
    scenes = drawn(work / "unlabelled", plan.unlabelled, plan)
    student = work / "distil" / "run" / "model"
    if not student.is_dir():
        config = train_config(plan, plan.distil, base, scenes / SCENES_FILE, watched, work / "distil")
        risd.train(with_section(config, risd_section(plan, teacher)), shown("distil"))
    return student, base


def drawn(folder: Path, scenes: Split, plan: Distillation) -> Path:
    """The folder of a split, drawn unless it is there."""
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        seeded = dataclasses.replace(scenes, seed=scenes.seed + plan.recipe.seed)
        write_split(partial, seeded, plan.recipe.scenes)
        partial.rename(folder)
    return folder


def base_learned(plan: Distillation, first: Path, work: Path) -> Path:
    """The checkpoint that teacher and student begin as, unless it is there."""
    model = work / "base" / "model"
    if model.is_dir():
        return model
    recipe = plan.recipe
    student = Student(recipe)
    load_weights(student.model, load_file(first / "model.safetensors"))
    counts = recipe.train_prompts, recipe.train_candidates, recipe.extra_prompts
    scenes = LabelledScenes.of(student, split(recipe, _BASE_SEED, *counts, work))
    validation = split(recipe, VALIDATION_SEED, recipe.validation_prompts, recipe.candidates, 0, work)
    features, watched = (cached_features(student, data.images) for data in (scenes.data, validation))

    def validate() -> dict[str, Any]:
        return score_metrics(predict(student, validation, watched), validation, student.contract)

    run = work / "base" / "run"
    run.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(recipe.seed)
    loss_at = language_loss(
        student, scenes, features, plan.base.batch, rng, questions=alignment_and_another, relations=True
    )
    run_stage("base", plan.base, student, loss_at, validate, RunLog(run / LOG_FILE), recipe.validate_minutes)
    save_start(student, model)
    return model


def chains_learned(lesson: Lesson, stage: Path, start: Path, scenes: Path, plan: Distillation) -> Path:
    return learn_chains(
        lesson,
        stage / "run",
        start,
        scenes,
        precision="fp32",
        micro_batch=plan.micro_batch,
        threads=plan.recipe.threads,
        progress=shown(stage.name),
    )


def train_config(
    plan: Distillation, learning: Learning, start: Path, scenes: Path, watched: Path, stage: Path
) -> TrainConfig:
    """Of a run that is validated four times."""
    return TrainConfig(
        DataConfig(str(scenes), str(watched)),
        ModelConfig(str(start), precision="fp32"),
        RunConfig(
            str(stage / "run"),
            steps=learning.steps,
            batch_size=learning.batch,
            micro_batch=plan.micro_batch,
            seed=plan.recipe.seed,
            save_every=50,
            log_every=20,
            validate_every=max(1, learning.steps // 4),
            validation_items=plan.watched_images,
            threads=plan.recipe.threads,
        ),
        OptimizerConfig(
            learning_rate=learning.rate, betas=(0.9, 0.98), warmup_steps=min(50, learning.steps // 10)
        ),
    )


def with_section(config: TrainConfig, section: dict[str, Any]) -> TrainConfig:
    return dataclasses.replace(config, method=section)


def gdso_section(plan: Distillation) -> dict[str, Any]:
    sampling = {"group_size": plan.group_size, "max_new_tokens": MAX_NEW_TOKENS}
    return {"policy_weight": plan.policy_weight, "sampling": sampling}


def risd_section(plan: Distillation, teacher: Path) -> dict[str, Any]:
    sampling = {"group_size": plan.traces, "max_new_tokens": MAX_NEW_TOKENS}
    return {"teacher": str(teacher), "sampling": sampling}


def shipped(
    trained: Path, base: Path, first: Path, out: Path, plan: Distillation, work: Path, command: str
) -> dict[str, Any]:
    """Write the student to `out` in bfloat16, calibrated and judged from its files, with log and card."""
    recipe = plan.recipe
    validation = split(recipe, VALIDATION_SEED, recipe.validation_prompts, recipe.candidates, 0, work)
    test = split(recipe, TEST_SEED, recipe.test_prompts, recipe.candidates, 0, work)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(out)
    for name in _KEPT:
        shutil.copyfile(first / name, out / name)
    ScoreContract.load(first).save(out)
    logits = served_logits(out, validation)
    contract = calibrated(logits, validation, out)
    contract.save(out)

    log = RunLog(out / LOG)
    log.start(plan, command)
    for stage in ("base", "answer", "judge", "distil"):
        log.stage(stage, work / stage / "run" / LOG_FILE)
    after, before = served_logits(out, test), served_logits(first, test)
    contract_before = ScoreContract.load(first)
    base_contract = calibrated(served_logits(base, validation), validation, base)
    result = {
        "validation": score_metrics(logits, validation, contract),
        "test": score_metrics(after, test, contract, intervals=True),
        "test_of_base": score_metrics(served_logits(base, test), test, base_contract, intervals=True),
        "test_of_first": score_metrics(before, test, contract_before, intervals=True),
        "test_gain": hpa_gain(
            expected_scores(after, contract), expected_scores(before, contract_before), test
        ),
        "test_label_noise_ceiling": label_ceiling(test, recipe.scenes),
        "temperatures": dict(zip(contract.dimension_names, contract.temperatures, strict=True)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    log.finish(result)
    shutil.copyfile(first / LOG, out / FIRST_LOG)
    write_card(out, recipe, result, command, _history(plan, result))
    return result


def calibrated(logits: NDArray[np.float64], validation: SceneArrays, student: Path) -> ScoreContract:
    """A student's contract with the temperatures that suit its score logits."""
    contract = ScoreContract.load(student)
    return contract.with_temperatures(fit_temperatures(logits, validation, contract))


def _history(plan: Distillation, result: dict[str, Any]) -> str:
    first, base = (result[name]["overall"]["hpa"] for name in ("test_of_first", "test_of_base"))
    gain = result["test_gain"]
    low, high = gain["hpa_95"]
    seeds = {
        "base": _BASE_SEED,
        "labelled": plan.labelled.seed,
        "unlabelled": plan.unlabelled.seed,
        "validation": VALIDATION_SEED,
        "test": TEST_SEED,
    }
    named = ", ".join(f"{name} {seed + plan.recipe.seed}" for name, seed in seeds.items())
    return f"""\
It answers at once what a teacher of {plan.teacher_layers} layers found by describing the picture first: it is the
student of RISD. Both began as one base, which is a first student that went on learning. That first student,
of `python -m zreward.training.reference_student`, has an HPA of {first:.4f} on the test prompts below,
the base {base:.4f}, and this student {gain["hpa"]:.4f} more than the first ({low:.4f} to {high:.4f}, 95 % over
prompts). `{LOG}` has the whole plan, the library versions and what every stage logged,
`{FIRST_LOG}` the same of the first student. The scenes have separate seeds:
{named}."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m zreward.training.reference_distill",
        description="Distil a reasoning teacher into the reference student.",
    )
    parser.add_argument("--first", type=Path, required=True, help="student of reference_student")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--work", type=Path, default=Path("build/distilled-student"), help="scenes and runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    command = (
        f"{parser.prog} --first {options.first} --out {options.out} --seed {options.seed} "
        f"--threads {options.threads}"
    )
    try:
        plan = Distillation(Recipe(seed=options.seed, threads=options.threads))
        distil(plan, options.first, options.out, options.work, command)
    except ZrewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())

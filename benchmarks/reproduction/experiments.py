"""The rows of the tables: which method starts from what, learns from what, and how it answers.

Teacher size: zero-shot, SFT, RewardDance, GRPO, GDSO. Student size: the same, and OPD and RISD with the GDSO teacher of
the same seed. Ablation, at student size: GRPO and GDSO with the reward of the parsed answer instead of the expectation.

All start from the base model of their size (`base.py`), whose answers after a description are the zero-shot row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reproduction.orderings import answered
from benchmarks.reproduction.schedule import Job
from benchmarks.reproduction.settings import STUDENT, TEACHER, Settings, Size
from zreward.jsonfile import write_json, write_text
from zreward.synthetic.dataset import SCENES_FILE
from zreward.training import gdso, grpo, opd, rewarddance, risd, sft
from zreward.training.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from zreward.training.data import load_training_set
from zreward.training.model import RewardModel, freeze, load_model
from zreward.training.reference_teacher import MAX_NEW_TOKENS, shown
from zreward.training.rollout import Sampling, sample_outputs
from zreward.training.sequences import Row
from zreward.training.teacher import distributions
from zreward.training.validate import agreement

METHODS: dict[str, Any] = {
    "sft": sft,
    "rewarddance": rewarddance,
    "grpo": grpo,
    "gdso": gdso,
    "risd": risd,
    "opd": opd,
}
SAMPLING = {"group_size": 4, "max_new_tokens": MAX_NEW_TOKENS}
RESULT_FILE = "result.json"
_COUNTED = 128
"""Questions whose output's tokens are counted."""
POLICY_WEIGHT = (("policy_weight", 0.1),)
"""Of GDSO. A group's advantages have a spread of 1 however little its rewards differ, and traces are short here. With 1
the validation HPA of a student fell from .825 to .780 between steps 50 and 100."""

PARSED = (("reward_from", "parsed"),)


@dataclass(frozen=True)
class Experiment:
    """One row for one seed.

    Attributes:
        name: of the row.
        size: of the model.
        method: what trains it, None for zero-shot.
        data: split that it learns from.
        steps, batch_size, rate: of the run.
        options: of the method.
        reasons: whether it answers after reasoning.
        traces: how many outputs are averaged for an answer; each number is judged.
    """

    name: str
    size: Size
    method: str | None
    data: str = "train"
    steps: int = 300
    batch_size: int = 8
    rate: float = 1e-3
    options: tuple[tuple[str, Any], ...] = ()
    reasons: bool = True
    traces: tuple[int, ...] = (1,)


def experiments(settings: Settings) -> list[Experiment]:
    """All rows, in an order in which each finds what it starts from.

    The teacher that everything of RISD and OPD waits for comes first.
    """
    rows: list[Experiment] = []
    averaged = (1,) if settings.averaged_traces == 1 else (1, settings.averaged_traces)
    for size in (TEACHER, STUDENT):
        grpo_row = Experiment("grpo", size, "grpo", steps=settings.policy_steps, batch_size=8, rate=1e-4)
        gdso_row = replace(grpo_row, name="gdso", method="gdso", options=POLICY_WEIGHT, traces=averaged)
        rows += [
            gdso_row,
            grpo_row,
            Experiment("zero-shot", size, None),
            Experiment("sft", size, "sft", steps=settings.sft_steps, batch_size=16, reasons=False),
            Experiment("rewarddance", size, "rewarddance", steps=settings.sft_steps, batch_size=8),
        ]
    distilled = {"size": STUDENT, "data": "unlabelled", "batch_size": 16}
    return [
        *rows,
        replace(grpo_row, size=STUDENT, name="grpo-parsed", options=PARSED),
        replace(gdso_row, size=STUDENT, name="gdso-parsed", options=POLICY_WEIGHT + PARSED, traces=(1,)),
        Experiment("risd", method="risd", steps=settings.risd_steps, reasons=False, **distilled),
        Experiment("opd", method="opd", steps=settings.opd_steps, rate=1e-4, **distilled),
    ]


def jobs(settings: Settings, data: Path, work: Path, seeds: Sequence[int]) -> list[Job]:
    """Every experiment of every seed, after those whose checkpoints it needs."""
    found = []
    for seed in seeds:
        for row in experiments(settings):
            needed = [f"base {row.size.name}"]
            if row.method in ("opd", "risd"):
                needed.append(f"{seed} {TEACHER.name}-gdso")
            arguments = (row, settings, data, work, seed)
            found.append(Job(f"{seed} {row.size.name}-{row.name}", run_experiment, arguments).after(needed))
    return found


def run_experiment(experiment: Experiment, settings: Settings, data: Path, work: Path, seed: int) -> None:
    """Train and judge one row for one seed, unless its result is there."""
    result = folder_of(work, experiment, seed) / RESULT_FILE
    model = trained(experiment, settings, data, work, seed)
    if result.is_file():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    figures = judged(model, experiment, settings, data, seed, result.parent)
    named = {"name": experiment.name, "size": experiment.size.name, "seed": seed}
    write_json(result, {**named, **figures})
    print(json.dumps({**named, "hpa": figures["traces_1"]["agreement"][-1]["hpa"]}), flush=True)


def folder_of(work: Path, experiment: Experiment, seed: int) -> Path:
    return work / f"seed-{seed}" / f"{experiment.size.name}-{experiment.name}"


def trained(experiment: Experiment, settings: Settings, data: Path, work: Path, seed: int) -> Path:
    """The experiment's checkpoint."""
    start = work / f"base-{experiment.size.name}"
    if experiment.method is None:
        return start
    run = folder_of(work, experiment, seed) / "run"
    if not (run / "model").is_dir():
        config = TrainConfig(
            DataConfig(
                str(_examples(data / experiment.data, settings)), str(data / "validation" / SCENES_FILE)
            ),
            ModelConfig(str(start), precision=settings.precision),
            RunConfig(
                str(run),
                steps=experiment.steps,
                batch_size=experiment.batch_size,
                micro_batch=settings.micro_batch,
                seed=seed,
                save_every=50,
                validate_every=max(1, experiment.steps // 4),
                validation_items=settings.validation_images,
                threads=settings.threads,
            ),
            OptimizerConfig(learning_rate=experiment.rate, betas=(0.9, 0.98), warmup_steps=10),
            method_section(experiment, data, work, seed),
        )
        METHODS[experiment.method].train(
            config, shown(f"seed {seed} {experiment.size.name} {experiment.name}")
        )
    return run / "model"


def method_section(experiment: Experiment, data: Path, work: Path, seed: int) -> dict[str, Any]:
    section: dict[str, Any] = dict(experiment.options)
    teacher = str(work / f"seed-{seed}" / "teacher-gdso" / "run" / "model")
    if experiment.method == "rewarddance":
        return section | {"chains": str(data / "train" / "chains.jsonl"), "max_new_tokens": MAX_NEW_TOKENS}
    if experiment.method in ("grpo", "gdso"):
        return section | {"sampling": SAMPLING}
    if experiment.method == "opd":
        return section | {"teacher": teacher, "sampling": {**SAMPLING, "group_size": 1}}
    if experiment.method == "risd":
        return section | {"teacher": teacher, "sampling": {**SAMPLING, "group_size": 1}}
    return section


def judged(
    model: Path, experiment: Experiment, settings: Settings, data: Path, seed: int, out: Path
) -> dict[str, Any]:
    """Agreement on the test split by each number of traces, and the share of questions without an answer.

    The predictions are written to `out`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    loaded = freeze(load_model(ModelConfig(str(model), precision=settings.precision), device))
    test = load_training_set(first_lines(data / "test" / SCENES_FILE, settings.test_images), loaded.contract)
    questions = test.questions(labelled=True)
    rows = [Row(test.items[q.item].prompt, test.items[q.item].image, q.dimension) for q in questions]
    bins = torch.tensor(loaded.contract.bins)
    found: dict[str, Any] = {}
    for traces in experiment.traces:
        sampling = Sampling(traces, MAX_NEW_TOKENS) if experiment.reasons else None
        predicted = np.full(test.scores.shape, np.nan)
        for start in range(0, len(rows), 256):
            asked = slice(start, start + 256)
            log_probs = distributions(loaded, rows[asked], sampling, seed + start, settings.micro_batch)
            for question, value in zip(
                questions[asked], (log_probs.cpu().exp() @ bins).tolist(), strict=True
            ):
                predicted[question] = value
        failed = float(np.isnan(predicted[~np.isnan(test.scores)]).mean())
        found[f"traces_{traces}"] = {
            "agreement": agreement(test, answered(predicted)),
            "failed": failed,
            "tokens": traces * output_tokens(loaded, rows, sampling, settings.micro_batch),
        }
        np.save(out / f"predicted-{traces}.npy", predicted)
    return found


def output_tokens(
    model: RewardModel, rows: Sequence[Row], sampling: Sampling | None, micro_batch: int
) -> float:
    """Tokens that an answer takes, on average over some questions; 1 without reasoning."""
    if sampling is None:
        return 1.0
    one = replace(sampling, group_size=1)
    sampled = sample_outputs(model, rows[:_COUNTED], one, 0, micro_batch)
    return float(np.mean([len(row.output or ()) for group in sampled for row in group]))


def first_lines(path: Path, count: int) -> Path:
    """A file beside `path` with its first lines, as images are named relative to it; `path` if it has no more."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) <= count:
        return path
    short = path.with_name(f"{path.stem}-{count}{path.suffix}")
    if not short.is_file():
        write_text(short, "".join(lines[:count]))
    return short


def _examples(folder: Path, settings: Settings) -> Path:
    path = folder / SCENES_FILE
    return first_lines(path, settings.unlabelled_images) if folder.name == "unlabelled" else path

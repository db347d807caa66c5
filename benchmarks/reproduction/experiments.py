"""The rows of the tables: which method starts from what, learns from what, and how it answers.

Teacher size: zero-shot, SFT, RewardDance, GRPO, GDSO. Student size: the same, and OPD and RISD with the GDSO teacher of
the same seed. Ablation: GRPO and GDSO with the reward of the parsed answer instead of the expectation.

All methods of a size and seed start from one warm start: RewardDance on a few labelled chains, which gives the base
model the form of an answer. Methods that answer at once start from the base model itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reproduction.base import shown
from benchmarks.reproduction.settings import STUDENT, TEACHER, Settings, Size
from zreward.jsonfile import write_json
from zreward.training import gdso, grpo, opd, rewarddance, risd, sft
from zreward.training.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from zreward.training.data import load_training_set
from zreward.training.model import freeze, load_model
from zreward.training.rollout import Sampling
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
SAMPLING = {"group_size": 8, "max_new_tokens": 48}
TRACES = 4
"""Outputs that are averaged where a model reasons at test time; the table has one as well."""


@dataclass(frozen=True)
class Experiment:
    """One row for one seed.

    Attributes:
        name: of the row.
        size: of the model.
        method: what trains it, None for zero-shot.
        start: "base", or another experiment of the same size and seed.
        data: split that it learns from.
        steps, batch_size, rate: of the run.
        options: of the method.
        reasons: whether it answers after reasoning.
    """

    name: str
    size: Size
    method: str | None
    start: str = "base"
    data: str = "train"
    steps: int = 300
    batch_size: int = 8
    rate: float = 3e-4
    options: tuple[tuple[str, Any], ...] = ()
    reasons: bool = True


def experiments(settings: Settings) -> list[Experiment]:
    """All rows, in an order in which each finds what it starts from."""
    rows: list[Experiment] = []
    for size in (TEACHER, STUDENT):
        warm = Experiment("warm", size, "rewarddance", steps=40, batch_size=8)
        policy = {"start": "warm", "steps": settings.policy_steps, "batch_size": 4, "rate": 1e-4}
        rows += [
            warm,
            Experiment("zero-shot", size, None, start="warm"),
            Experiment("sft", size, "sft", steps=settings.sft_steps, batch_size=16, reasons=False),
            Experiment("rewarddance", size, "rewarddance", steps=settings.sft_steps, batch_size=8),
            Experiment("grpo", size, "grpo", **policy),  # type: ignore[arg-type]  # a dictionary of its fields
            Experiment("gdso", size, "gdso", **policy),  # type: ignore[arg-type]
            Experiment("grpo-parsed", size, "grpo", options=(("reward_from", "parsed"),), **policy),  # type: ignore[arg-type]
            Experiment("gdso-parsed", size, "gdso", options=(("reward_from", "parsed"),), **policy),  # type: ignore[arg-type]
        ]
    rows += [
        Experiment("opd", STUDENT, "opd", "warm", "unlabelled", settings.distil_steps // 4, 16, 1e-4),
        Experiment(
            "risd", STUDENT, "risd", "base", "unlabelled", settings.distil_steps, 16, 5e-4, reasons=False
        ),
    ]
    return rows


def run_experiments(settings: Settings, data: Path, work: Path, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        for experiment in experiments(settings):
            model = trained(experiment, settings, data, work, seed)
            result = folder_of(work, experiment, seed) / "result.json"
            if not result.is_file():
                figures = judged(model, experiment, settings, data, seed)
                result.parent.mkdir(parents=True, exist_ok=True)
                write_json(
                    result, {"name": experiment.name, "size": experiment.size.name, "seed": seed, **figures}
                )
                print(
                    json.dumps(
                        {
                            "seed": seed,
                            "name": experiment.name,
                            "size": experiment.size.name,
                            "hpa": figures["one_trace"][-1]["hpa"],
                        }
                    ),
                    flush=True,
                )


def folder_of(work: Path, experiment: Experiment, seed: int) -> Path:
    return work / f"seed-{seed}" / f"{experiment.size.name}-{experiment.name}"


def trained(experiment: Experiment, settings: Settings, data: Path, work: Path, seed: int) -> Path:
    """The experiment's checkpoint."""
    if experiment.start == "base":
        start = work / f"base-{experiment.size.name}"
    else:
        start = work / f"seed-{seed}" / f"{experiment.size.name}-{experiment.start}" / "run" / "model"
    if experiment.method is None:
        return start
    run = folder_of(work, experiment, seed) / "run"
    if not (run / "model").is_dir():
        config = TrainConfig(
            DataConfig(str(data / experiment.data / "scenes.jsonl")),
            ModelConfig(str(start), precision=settings.precision),
            RunConfig(
                str(run),
                steps=experiment.steps,
                batch_size=experiment.batch_size,
                micro_batch=settings.micro_batch,
                seed=seed,
                save_every=50,
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
        return section | {"chains": str(data / "train" / "chains.jsonl"), "max_new_tokens": 48}
    if experiment.method in ("grpo", "gdso"):
        return section | {"sampling": SAMPLING}
    if experiment.method == "opd":
        return section | {"teacher": teacher, "sampling": {**SAMPLING, "group_size": 1}}
    if experiment.method == "risd":
        return section | {"teacher": teacher, "sampling": {**SAMPLING, "group_size": TRACES}}
    return section


def judged(model: Path, experiment: Experiment, settings: Settings, data: Path, seed: int) -> dict[str, Any]:
    """Agreement on the test split with one trace, and with several averaged where the model reasons."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = freeze(load_model(ModelConfig(str(model), precision=settings.precision), device))
    test = load_training_set(data / "test" / "scenes.jsonl", loaded.contract)
    found: dict[str, Any] = {}
    for name, traces in (("one_trace", 1), ("several_traces", TRACES)):
        sampling = Sampling(traces, 48) if experiment.reasons else None
        if sampling is None and name == "several_traces":
            continue
        predicted = np.full(test.scores.shape, np.nan)
        questions = test.questions(labelled=True)
        rows = [Row(test.items[q.item].prompt, test.items[q.item].image, q.dimension) for q in questions]
        bins = torch.tensor(loaded.contract.bins)
        for start in range(0, len(rows), 256):
            log_probs = distributions(
                loaded, rows[start : start + 256], sampling, seed + start, settings.micro_batch
            )
            for question, value in zip(
                questions[start:], (log_probs.cpu().exp() @ bins).tolist(), strict=False
            ):
                predicted[question] = value
        failed = float(np.isnan(predicted[~np.isnan(test.scores)]).mean())
        found[name] = agreement(test, predicted)
        found[f"{name}_failed"] = failed
        np.save(model.parent / f"predicted-{name}.npy", predicted)
    return found

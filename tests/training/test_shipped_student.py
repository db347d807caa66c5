"""The reference student in the package: whole, small, and as good on new scenes as its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zreward
from zreward.checkpoint import Checkpoint
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.training.reference_data import build_arrays
from zreward.training.reference_evaluate import score_metrics, served_logits
from zreward.training.reference_model import TOKEN_SIDE
from zreward.training.reference_recipe import TEST_SEED, Recipe

STUDENT = Path(zreward.__file__).parent / "assets" / "reference-student"
NEW_SEED = 987_654


def result(log: str = "training_log.jsonl") -> dict[str, Any]:
    lines = (STUDENT / log).read_text(encoding="utf-8").splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return next(event for event in reversed(events) if "test" in event)


def test_the_checkpoint_is_whole_and_small() -> None:
    checkpoint = Checkpoint.open(STUDENT)
    contract = checkpoint.contract()
    encoder = PromptEncoder(contract, load_tokenizer(STUDENT))
    assert sum(file.stat().st_size for file in STUDENT.iterdir()) < 12_000_000
    assert checkpoint.config["image_token_id"] == encoder.image_token_id
    assert all(0.4 < temperature < 2.5 for temperature in contract.temperatures)


def test_the_card_repeats_the_log() -> None:
    card = (STUDENT / "README.md").read_text(encoding="utf-8")
    for name, figures in result()["test"].items():
        assert f"| {name} | {figures['hpa']:.4f}" in card


def test_distillation_beat_the_student_that_learned_from_labels_alone() -> None:
    """Of the log of the run; the next test measures some of it again."""
    first = result("first_training_log.jsonl")
    now, before = result()["test"], result()["test_of_first"]
    assert before["overall"]["hpa"] == pytest.approx(first["test"]["overall"]["hpa"], abs=2e-4)
    assert result()["test_gain"]["hpa"] == pytest.approx(
        now["overall"]["hpa"] - before["overall"]["hpa"], abs=2e-5
    )
    assert result()["test_gain"]["hpa_95"][0] > 0
    assert [now[name]["pairs"] for name in now] == [before[name]["pairs"] for name in now]


@pytest.mark.slow
def test_the_card_has_the_figures_of_the_held_out_split() -> None:
    """Some of its prompts, measured again, lie where sampling them can put them."""
    figures = measured(TEST_SEED, 60)
    assert figures["overall"]["hpa"] == pytest.approx(result()["test"]["overall"]["hpa"], abs=0.02)


@pytest.mark.slow
def test_it_ranks_scenes_that_nobody_has_seen() -> None:
    figures = measured(NEW_SEED, 25)
    assert figures["overall"]["hpa"] > result()["test"]["overall"]["hpa"] - 0.04
    assert min(values["hpa"] for values in figures.values()) > 0.75


def measured(seed: int, prompts: int) -> dict[str, dict[str, float]]:
    recipe = Recipe()
    token_side = recipe.shape.image_size // TOKEN_SIDE
    data = build_arrays(recipe.scenes, seed, prompts, recipe.candidates, token_side=token_side)
    logits = served_logits(STUDENT, data)
    assert np.isfinite(logits).all()
    return score_metrics(logits, data, Checkpoint.open(STUDENT).contract())

"""The reference student in the package: whole, small, and as good on new scenes as its card says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import zreward
from zreward.checkpoint import Checkpoint
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.synthetic import SceneConfig
from zreward.training.reference_data import build_arrays
from zreward.training.reference_evaluate import score_metrics, served_logits

STUDENT = Path(zreward.__file__).parent / "assets" / "reference-student"
NEW_SEED = 987_654


def result() -> dict[str, dict[str, dict[str, float]]]:
    lines = (STUDENT / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    events: list[dict[str, dict[str, dict[str, float]]]] = [json.loads(line) for line in lines]
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


@pytest.mark.slow
def test_it_ranks_scenes_that_nobody_has_seen() -> None:
    config = SceneConfig()
    data = build_arrays(config, NEW_SEED, 25, 6, token_side=5)
    logits = served_logits(STUDENT, data)
    assert np.isfinite(logits).all()
    figures = score_metrics(logits, data, Checkpoint.open(STUDENT).contract())
    assert figures["overall"]["hpa"] > result()["test"]["overall"]["hpa"] - 0.04
    assert min(values["hpa"] for values in figures.values()) > 0.75

"""Datasets on disk: the lines that evaluation and calibration read, and no overwriting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zreward.errors import UsageError
from zreward.synthetic import DIMENSIONS, SceneConfig, generate, write_dataset

CONFIG = SceneConfig(size=48)


def test_what_is_written_is_what_is_generated(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "scenes", CONFIG, seed=4, n_prompts=3, candidates=2)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    candidates = [(s.prompt, c) for s in generate(CONFIG, 4, 3, 2) for c in s.candidates]
    assert len(lines) == len(candidates) == 6
    assert [line["id"] for line in lines] == list(range(6))
    for line, (prompt, candidate) in zip(lines, candidates, strict=True):
        assert set(line) == {"id", "prompt", "image", "scores", "annotations"}
        assert {name: tuple(said) for name, said in line["annotations"].items()} == candidate.annotator_scores
        assert line["prompt"] == prompt
        assert line["scores"] == candidate.human_scores and tuple(line["scores"]) == DIMENSIONS
        with Image.open(path.parent / line["image"]) as image:
            assert np.array_equal(np.asarray(image), candidate.image)


def test_the_recipe_can_be_read_back(tmp_path: Path) -> None:
    write_dataset(tmp_path, CONFIG, seed=4, n_prompts=1, candidates=1)
    recipe = json.loads((tmp_path / "dataset.json").read_text())
    assert SceneConfig.from_dict(recipe["config"]) == CONFIG
    truth = json.loads((tmp_path / "truth.jsonl").read_text().splitlines()[0])
    assert set(truth["true_scores"]) == set(DIMENSIONS) and len(truth["annotator_scores"]["realism"]) == 5


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not an empty directory"):
        write_dataset(tmp_path, CONFIG, seed=0, n_prompts=1, candidates=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_counts_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="n_prompts"):
        write_dataset(tmp_path / "new", CONFIG, seed=0, n_prompts=0)
    assert not (tmp_path / "new").exists()

"""Scenes on disk, in the form that `zreward eval`, `score --input` and calibration read.

`scenes.jsonl` has one line per image, {"id", "prompt", "image", "scores", "annotations"}: its number, the path relative
to the file, the human score per dimension and what each annotator said. `truth.jsonl` has the latent scores, the
panel's raw scores and what is drawn, line by line in the same order. `dataset.json` records how to make it again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from zreward.errors import UsageError
from zreward.jsonfile import write_json
from zreward.synthetic.config import SceneConfig
from zreward.synthetic.scenes import Candidate, Scene, generate

SCENES_FILE, TRUTH_FILE, RECIPE_FILE = "scenes.jsonl", "truth.jsonl", "dataset.json"


def write_dataset(
    directory: Path,
    config: SceneConfig,
    seed: int,
    n_prompts: int,
    candidates: int = 6,
    *,
    labelled: bool = True,
) -> Path:
    """Generate scenes and write them as PNG and JSON lines into a new or empty directory.

    Without `labelled`, lines have no scores and no annotations.

    Returns:
        The path of `scenes.jsonl`.

    Raises:
        UsageError: the directory holds something already, or a count is out of range.
    """
    scenes = generate(config, seed, n_prompts, candidates)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not an empty directory; choose another one")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    _write_lines(directory, scenes, labelled)
    recipe = {"config": config.to_dict(), "seed": seed, "n_prompts": n_prompts, "candidates": candidates}
    write_json(directory / RECIPE_FILE, recipe)
    return directory / SCENES_FILE


def _write_lines(directory: Path, scenes: Iterable[Scene], labelled: bool) -> None:
    with (
        (directory / SCENES_FILE).open("w", encoding="utf-8") as labels,
        (directory / TRUTH_FILE).open("w", encoding="utf-8") as truths,
    ):
        count = 0
        for scene in scenes:
            for number, candidate in enumerate(scene.candidates):
                name = f"images/{scene.index:05d}-{number}.png"
                Image.fromarray(candidate.image, "RGB").save(directory / name)
                label: dict[str, Any] = {"id": count, "prompt": scene.prompt, "image": name}
                if labelled:
                    label |= {"scores": candidate.human_scores, "annotations": candidate.annotator_scores}
                count += 1
                labels.write(json.dumps(label, ensure_ascii=False) + "\n")
                truths.write(json.dumps(_truth(name, candidate), ensure_ascii=False) + "\n")


def _truth(name: str, candidate: Candidate) -> dict[str, Any]:
    return {
        "image": name,
        "true_scores": candidate.true_scores,
        "annotator_scores": candidate.annotator_scores,
        "objects": [dataclasses.asdict(item) for item in candidate.objects],
        "defects": dataclasses.asdict(candidate.defects),
        "alignment_errors": dataclasses.asdict(candidate.alignment_errors),
    }

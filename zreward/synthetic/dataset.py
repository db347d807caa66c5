"""Scenes on disk, in the form that `zreward eval`, `score --input` and calibration read.

`scenes.jsonl` has one line per image, {"id", "prompt", "image", "scores", "annotations"}: its number, the path relative
to the file, the human score per dimension and what each annotator said. `truth.jsonl` has the latent scores, the
panel's raw scores and what is drawn, line by line in the same order. `dataset.json` records how to make it again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zreward.errors import UsageError
from zreward.jsonfile import write_json
from zreward.synthetic.config import SceneConfig
from zreward.synthetic.language import PromptSpec
from zreward.synthetic.requests import other_requests
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
    other_prompts: int = 0,
) -> Path:
    """Generate scenes and write them as PNG and JSON lines into a new or empty directory.

    Args:
        labelled: otherwise lines have no scores and no annotations.
        other_prompts: further lines for each image, under prompts that it was not made for; only without labels.

    Returns:
        The path of `scenes.jsonl`.

    Raises:
        UsageError: the directory holds something already, or a count is out of range.
    """
    if labelled and other_prompts:
        raise UsageError("nobody judged the images under other prompts; draw them without labels")
    scenes = generate(config, seed, n_prompts, candidates)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not an empty directory; choose another one")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    _write_lines(directory, lines_of(scenes, config, seed, other_prompts), labelled)
    recipe = {"config": config.to_dict(), "seed": seed, "n_prompts": n_prompts, "candidates": candidates}
    if other_prompts:
        recipe["other_prompts"] = other_prompts
    write_json(directory / RECIPE_FILE, recipe)
    return directory / SCENES_FILE


@dataclass(frozen=True, eq=False)
class SceneLine:
    """A line of a data set.

    Attributes:
        image: name of its file.
        prompt: what is asked for.
        candidate: the image, with its truth under this prompt.
        spec: what that means.
        own: whether the image was made for it.
    """

    image: str
    prompt: str
    candidate: Candidate
    spec: PromptSpec
    own: bool


def lines_of(
    scenes: Iterable[Scene], config: SceneConfig, seed: int, other_prompts: int = 0
) -> Iterator[SceneLine]:
    """The lines of a data set in order: each image under its own prompt, then under others."""
    for scene in scenes:
        for number, candidate in enumerate(scene.candidates):
            name = f"images/{scene.index:05d}-{number}.png"
            yield SceneLine(name, scene.prompt, candidate, scene.spec, own=True)
            rng = np.random.default_rng([seed, scene.index, 1_000_000 + number])
            for prompt, spec, judged in other_requests(rng, candidate, other_prompts, config):
                yield SceneLine(name, prompt, judged, spec, own=False)


def _write_lines(directory: Path, lines: Iterable[SceneLine], labelled: bool) -> None:
    with (
        (directory / SCENES_FILE).open("w", encoding="utf-8") as labels,
        (directory / TRUTH_FILE).open("w", encoding="utf-8") as truths,
    ):
        for count, line in enumerate(lines):
            if line.own:
                Image.fromarray(line.candidate.image, "RGB").save(directory / line.image)
            label: dict[str, Any] = {"id": count, "prompt": line.prompt, "image": line.image}
            if labelled:
                label |= {
                    "scores": line.candidate.human_scores,
                    "annotations": line.candidate.annotator_scores,
                }
            labels.write(json.dumps(label, ensure_ascii=False) + "\n")
            truths.write(json.dumps(_truth(line.image, line.candidate), ensure_ascii=False) + "\n")


def _truth(name: str, candidate: Candidate) -> dict[str, Any]:
    return {
        "image": name,
        "true_scores": candidate.true_scores,
        "annotator_scores": candidate.annotator_scores,
        "objects": [dataclasses.asdict(item) for item in candidate.objects],
        "defects": dataclasses.asdict(candidate.defects),
        "alignment_errors": dataclasses.asdict(candidate.alignment_errors),
    }

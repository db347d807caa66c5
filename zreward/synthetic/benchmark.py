"""The synthetic rubric benchmark: splits that make distillation, reasoning and labels worth something.

    pretrain     pictures with descriptions and no scores: what a base model has seen
    opinions     pictures with descriptions and the scores of careless annotators: how a base model answers
    train        few pictures, labelled by three noisy annotators
    unlabelled   many pictures without labels, for a teacher to answer
    validation   held-out, labelled by nine careful annotators who judge no other split but test
    test         the same

Every split is a folder as `zreward data scenes` writes it, with `chains.jsonl` beside it where there are descriptions
(`pretrain`, `opinions`) or made-up reasons for the labels (`train`). `benchmark.json` has the seeds, the difficulty and
the version of the generator.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zreward.errors import UsageError
from zreward.jsonfile import write_json, write_text
from zreward.progress import Progress
from zreward.synthetic.config import DIMENSIONS, GENERATOR_VERSION, SceneConfig
from zreward.synthetic.dataset import SCENES_FILE, lines_of, write_dataset
from zreward.synthetic.descriptions import describe, rationalize
from zreward.synthetic.scenes import generate

CHAINS_FILE, BENCHMARK_FILE = "chains.jsonl", "benchmark.json"

_CARELESS = {"annotators": 3, "annotator_bias": 1.0, "annotator_noise": 2.0, "panel_seed": 50}
_CROWD = {"annotators": 3, "annotator_bias": 0.4, "annotator_noise": 0.7, "panel_seed": 100}
_EXPERTS = {"annotators": 9, "annotator_bias": 0.2, "annotator_noise": 0.35, "panel_seed": 200}


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        seed: of its scenes.
        prompts, candidates: how many.
        labelled: whether its lines have scores and annotations.
        chains: "descriptions", "reasons" for the labels, or None.
        panel: fields of `SceneConfig` that say who labels it.
        other_prompts: how often each image stands there again under a prompt that it was not made for.
    """

    seed: int
    prompts: int
    candidates: int
    labelled: bool
    chains: str | None = None
    panel: dict[str, Any] = field(default_factory=dict)
    other_prompts: int = 0


SPLITS = {
    "pretrain": Split(11_000, 4_000, 4, False, "descriptions", other_prompts=3),
    "opinions": Split(18_000, 200, 4, True, "descriptions", _CARELESS),
    "train": Split(12_000, 15, 4, True, "reasons", _CROWD),
    "unlabelled": Split(13_000, 2_000, 3, False),
    "validation": Split(14_000, 60, 6, True, None, _EXPERTS),
    "test": Split(15_000, 300, 6, True, None, _EXPERTS),
}


def write_benchmark(
    directory: Path,
    scenes: SceneConfig | None = None,
    *,
    seed: int = 0,
    scale: float = 1.0,
    progress: Progress = lambda *_: None,
) -> Path:
    """Draw all splits into a new or empty directory.

    Args:
        scenes: the look and difficulty; who labels is the split's.
        seed: another benchmark of the same kind.
        scale: of the number of prompts of every split.

    Raises:
        UsageError: the directory holds something, or `scale` is not positive.
    """
    if not 0 < scale <= 100 or seed < 0:
        raise UsageError(
            f"scale must be over 0 and at most 100, and seed at least 0, not {scale:g} and {seed}"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not an empty directory; choose another one")
    directory.mkdir(parents=True, exist_ok=True)
    config = scenes or SceneConfig()
    record: dict[str, Any] = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "scale": scale,
        "splits": {},
    }
    for number, (name, split) in enumerate(SPLITS.items()):
        progress("drawing", number, len(SPLITS))
        scaled = dataclasses.replace(
            split, seed=split.seed + seed, prompts=max(2, round(scale * split.prompts))
        )
        of_split = write_split(directory / name, scaled, config)
        record["splits"][name] = {**dataclasses.asdict(scaled), "config": of_split.to_dict()}
    write_json(directory / BENCHMARK_FILE, record)
    progress("drawing", len(SPLITS), len(SPLITS))
    return directory / "train" / SCENES_FILE


def write_split(folder: Path, split: Split, scenes: SceneConfig) -> SceneConfig:
    """Draw one split into a new or empty folder, its chains beside it; returns its look and panel.

    Raises:
        UsageError: the folder holds something.
    """
    config = SceneConfig(**{**scenes.to_dict(), **split.panel})
    write_dataset(
        folder,
        config,
        split.seed,
        split.prompts,
        split.candidates,
        labelled=split.labelled,
        other_prompts=split.other_prompts,
    )
    if split.chains:
        write_text(folder / CHAINS_FILE, "".join(json.dumps(line) + "\n" for line in _chains(split, config)))
    return config


def _chains(split: Split, config: SceneConfig) -> Iterator[dict[str, Any]]:
    """Lines of `chains.jsonl`: for every line and dimension; under another prompt alignment alone has changed."""
    scenes = generate(config, split.seed, split.prompts, split.candidates)
    for number, line in enumerate(lines_of(scenes, config, split.seed, split.other_prompts)):
        rng = np.random.default_rng([split.seed, number])
        texts = describe(line.candidate, line.spec)
        for name in DIMENSIONS if line.own else ("alignment",):
            text = texts[name]
            if split.chains == "reasons":
                text = rationalize(rng, name, line.candidate.human_scores[name], line.spec)
            yield {"id": number, "dimension": name, "chain": text}

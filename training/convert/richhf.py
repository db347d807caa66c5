"""RichHF-18K: four scores of images from Pick-a-Pic v1.

TFRecord files of tf.train.Example with `filename` (`train/UID.png`), `aesthetics_score`, `artifact_score`,
`misalignment_score` and `overall_score`, floats from 0 to 1: three people's ratings from 1 to 5 as (mean − 1) / 4. "All
scores are the higher the better": `artifact_score` is high where there are few artifacts, `misalignment_score` where
the image matches the prompt. From the README of github.com/google-research-datasets/richhf-18k and its parser in
`richhf_18k` of github.com/google-research/google-research. `artifact_score` is the paper's plausibility
(arXiv 2312.10240). Heatmaps and word labels are not read.

The files hold neither images nor prompts. Images are looked for in the folder by name, with and without their folder
and with other endings; prompts come from a file (`prompts`), or from a feature `prompt` where somebody added one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from zreward.errors import UsageError
from zreward.training.convert.prompts import image_key, read_prompts
from zreward.training.convert.records import (
    Item,
    Missing,
    Outcome,
    Record,
    Request,
    Row,
    Scale,
    fields_with_overall,
)
from zreward.training.convert.sources import files_of_source
from zreward.training.convert.tfrecord import data_of_tfrecord, features_of_example

SCALE = Scale(0.0, 1.0)

DIMENSIONS = {
    "alignment": "misalignment_score",
    "aesthetics": "aesthetics_score",
    "plausibility": "artifact_score",
}

OVERALL = "overall_score"

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def records_from_richhf(request: Request) -> Iterator[Outcome]:
    """Every image with its scores."""
    fields = fields_with_overall(DIMENSIONS, OVERALL, request.dimension)
    files = files_of_source(request.source, ".tfrecord")
    prompts = read_prompts(request.prompts) if request.prompts else None
    for path in files:
        for number, data in enumerate(data_of_tfrecord(path), 1):
            row = _row(data, f"{path}, record {number}", ("filename", "prompt", *fields.values()))
            name = row.text("filename")
            scores = {dimension: row.label(field, SCALE) for dimension, field in fields.items()}
            prompt = _prompt(row, name, prompts)
            if prompt is None:
                yield Missing(f"the prompt of {name}")
                continue
            yield Record(prompt, (Item("", _find_image(request.images, name), scores, {}),))


def _row(data: bytes, where: str, wanted: tuple[str, ...]) -> Row:
    """The wanted features as a row, each the first value of its list."""
    features = features_of_example(data, where)
    values = {name: _first(features[name], f"{where}: {name!r}") for name in wanted if name in features}
    return Row(where, values, tuple(sorted(features)))


def _first(values: list[Any], what: str) -> Any:
    if not values or not isinstance(values[0], bytes):
        return values[0] if values else None
    try:
        return values[0].decode()
    except UnicodeDecodeError:
        raise UsageError(f"{what} is not UTF-8") from None


def _prompt(row: Row, name: str, prompts: dict[str, str] | None) -> str | None:
    if "prompt" in row:
        return row.text("prompt")
    if prompts is None:
        raise row.error("there is no prompt in it; give a file of prompts by image name with --prompts")
    return prompts.get(image_key(name))


def _find_image(folder: Path, name: str) -> Path:
    """The image's file; where there is none, the path that it is named by."""
    base = PurePosixPath(name).name
    candidates = [folder / name, folder / base, *(folder / (image_key(name) + ending) for ending in _ENDINGS)]
    return next((path for path in candidates if path.is_file()), candidates[0])

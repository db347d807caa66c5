"""ImageRewardDB: experts' ratings of images of one prompt, 1 to 7.

JSON lists (`images/train/train_1/train_1.json`), CSV, or the tables `metadata-*.parquet`, with `image_path` (from the
root of the set), `prompt`, `rank`, `overall_rating`, `image_text_alignment_rating` and `fidelity_rating`. From the
card of huggingface.co/datasets/THUDM/ImageRewardDB; the scale of 1 to 7 is that of the paper's annotation
(arXiv 2304.05977), and the card does not repeat it.

Fidelity is "whether the output image is true to the shape and characteristics that the object should have", which is
plausibility here. `overall_rating` belongs to no dimension and is read only where the caller names one for it; `rank`
orders the images of a prompt by it, and is not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from zreward.training.convert.records import Item, Outcome, Record, Request, Scale, fields_with_overall
from zreward.training.convert.sources import rows_from_source

SCALE = Scale(1.0, 7.0)

DIMENSIONS = {"alignment": "image_text_alignment_rating", "plausibility": "fidelity_rating"}

OVERALL = "overall_rating"


def records_from_imagerewarddb(request: Request) -> Iterator[Outcome]:
    """Every image with its ratings."""
    fields = fields_with_overall(DIMENSIONS, OVERALL, request.dimension)
    columns = ("image_path", "prompt", *fields.values())
    for row in rows_from_source(request.source, ".json", ".jsonl", ".csv", ".parquet", columns=columns):
        scores = {dimension: row.label(field, SCALE) for dimension, field in fields.items()}
        item = Item("", request.images / row.text("image_path"), scores, {})
        yield Record(row.text("prompt"), (item,))

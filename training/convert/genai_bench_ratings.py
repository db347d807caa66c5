"""GenAI-Bench with human ratings: six models' images of 1,600 (or 527) prompts, rated 1 to 5 by three people.

`genai_image.json`, an object of prompts by number, `{"00000": {"prompt": …, "models": {"DALLE_3": [4, 5, 5], …}}}`,
with the images in `MODEL/NUMBER.jpeg`. From `GenAIBench_Image` in `dataset.py` of github.com/linzhiqiu/t2v_metrics and
the card of huggingface.co/datasets/BaiqiL/GenAI-Bench ("1-to-5 Likert scale"). The ratings are of the match with the
prompt (`human_alignment` there).
"""

from __future__ import annotations

from collections.abc import Iterator

from zreward.errors import UsageError
from zreward.training.convert.records import Item, Outcome, Record, Request, Row, Scale
from zreward.training.convert.sources import files_of_source, read_json

SCALE = Scale(1.0, 5.0)

DIMENSION = "alignment"


def records_from_genai_bench_ratings(request: Request) -> Iterator[Outcome]:
    """Every prompt with an image of each model that was rated."""
    for path in files_of_source(request.source, ".json"):
        prompts = read_json(path)
        if not isinstance(prompts, dict) or not prompts:
            raise UsageError(
                f"{path}: expected a JSON object of prompts by their number, as genai_image.json is"
            )
        for number, (name, values) in enumerate(prompts.items(), 1):
            where = f"{path}, record {number} ({name})"
            if not isinstance(values, dict):
                raise UsageError(f"{where}: expected an object; found {type(values).__name__}")
            row = Row(where, values)
            models = row.row("models")
            items = [
                Item(
                    model,
                    request.images / model / f"{name}.jpeg",
                    {},
                    {DIMENSION: models.labels(model, SCALE)},
                )
                for model in models.values
            ]
            yield Record(row.text("prompt"), tuple(items))

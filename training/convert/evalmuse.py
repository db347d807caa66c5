"""EvalMuse-40K: how well images match their prompts, rated 1 to 5 by several annotators each.

A JSON list, `train_list.json`, with `prompt`, `img_path` and `total_score` (the ratings of the annotators), from the
card of huggingface.co/datasets/DY-Evalab/EvalMuse and `process/process_train.py` of github.com/DYEvaLab/EvalMuse,
whose data set class maps the scores to 0 … 1 by `(score - 1) / 4`. `test.json` is published without annotations.

`element_score` says yes or no about single words of the prompt, and `promt_meaningless`, `split_confidence`,
`attribute_confidence` and `fidelity_label` have no scale that a dimension could take; none of them is read.
"""

from __future__ import annotations

from collections.abc import Iterator

from zreward.training.convert.records import Item, Outcome, Record, Request, Scale
from zreward.training.convert.sources import rows_from_source

SCALE = Scale(1.0, 5.0)

DIMENSION = "alignment"


def records_from_evalmuse(request: Request) -> Iterator[Outcome]:
    """Every image with the ratings of its annotators."""
    for row in rows_from_source(request.source, ".json", ".jsonl"):
        ratings = row.labels("total_score", SCALE)
        item = Item("", request.images / row.text("img_path"), {}, {DIMENSION: ratings})
        yield Record(row.text("prompt"), (item,))

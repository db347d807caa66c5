"""HPDv3: pairs of images, the preferred one first, some with the votes.

A JSON list of objects with `prompt`, `path1` (the preferred image), `path2` and, in `all.json` and `train.json`,
`choice_dist` (votes for the two images, null where the pair came from elsewhere), `confidence`, `model1` and `model2`.
Read from the data format in the README of github.com/MizzenAI/HPSv3. Its loader sorts `choice_dist` and gives
the larger number to `path1`; so does this one.

`confidence` rates the annotators, independently of the votes, and has no place in a label: it is not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from zreward.training.convert.records import LABEL_HIGH, LABEL_LOW, Item, Outcome, Record, Request, voted_item
from zreward.training.convert.sources import rows_from_source


def records_from_hpdv3(request: Request) -> Iterator[Outcome]:
    """Every pair, the preferred image as side 1."""
    dimension = request.voted
    for row in rows_from_source(request.source, ".json", ".jsonl"):
        better, worse = (request.images / row.text(name) for name in ("path1", "path2"))
        if "choice_dist" in row:
            votes = row.numbers("choice_dist")
            if len(votes) != 2 or min(votes) < 0 or max(votes) == 0:
                raise row.error(f"'choice_dist' must be the votes for two images; found {votes}")
            most, least = max(votes), min(votes)
            first = voted_item("1", better, dimension, most, least)
            second = voted_item("2", worse, dimension, least, most)
        else:
            first = Item("1", better, {dimension: LABEL_HIGH}, {})
            second = Item("2", worse, {dimension: LABEL_LOW}, {})
        yield Record(row.text("prompt"), (first, second))

"""HPDv2: pairs with a preference (`train.json`) and rankings by several annotators (`test.json`).

JSON lists. `train.json` has `prompt`, two images and `human_preference`, 1 for the preferred image and 0 for the
other; the README of github.com/tgxs002/HPSv2 calls the images `file_path`, loaders of the published file read
`image_path`, and both are taken. `test.json` has `prompt`, `image_path`, `rank` (the averaged ranking, of the image at
the same place) and `raw_annotations`, a list of `{"rank", "user_hash"}` with the ranking of each annotator. A lower
rank is better: `hpsv2/evaluation.py` compares `rank` with places in the order of falling scores.

A ranking is taken as the votes of all pairs in it: an image wins one from each annotator for each image ranked below
it. `raw_annotations` must agree with `rank`, since a list of places and a list of images in order look alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from zreward.training.convert.records import SHARE, Item, Outcome, Record, Request, Row, voted_item
from zreward.training.convert.sources import rows_from_source

_CONTRADICTIONS = 0.25
"""Share of the pairs in which the annotators' mean may order against `rank`: none if it is their mean, about half if
the lists mean something else."""


def records_from_hpdv2(request: Request) -> Iterator[Outcome]:
    """Every pair or ranking, sides numbered from 1 in the order of the file."""
    dimension = request.voted
    for row in rows_from_source(request.source, ".json", ".jsonl"):
        names = row.texts("file_path" if "file_path" in row else "image_path")
        if len(names) < 2:
            raise row.error("a comparison needs two images")
        images = [request.images / name for name in names]
        if "raw_annotations" in row:
            rankings = [_places(entry, "rank", len(names)) for entry in row.rows("raw_annotations")]
            _check_agreement(row, _places(row, "rank", len(names)), rankings)
            wins, losses = votes_from_rankings(rankings)
            items = [
                voted_item(str(side), image, dimension, won, lost)
                for side, (image, won, lost) in enumerate(zip(images, wins, losses, strict=True), 1)
            ]
        else:
            shares = _preference(row, len(names)) if "human_preference" in row else _shares(row, len(names))
            items = [
                Item(str(side), image, {dimension: SHARE.label(share)}, {})
                for side, (image, share) in enumerate(zip(images, shares, strict=True), 1)
            ]
        yield Record(row.text("prompt"), tuple(items))


def votes_from_rankings(rankings: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Wins and losses of each image over all pairs of all rankings; equal ranks are half of each."""
    n_images = len(rankings[0])
    wins = [0.0] * n_images
    for ranking in rankings:
        for a, b in itertools.permutations(range(n_images), 2):
            wins[a] += 1.0 if ranking[a] < ranking[b] else 0.5 if ranking[a] == ranking[b] else 0.0
    n_votes = len(rankings) * (n_images - 1)
    return wins, [n_votes - won for won in wins]


def _preference(row: Row, n_images: int) -> list[float]:
    shares = row.numbers("human_preference")
    if len(shares) != n_images or sorted(shares) != [0.0] * (n_images - 1) + [1.0]:
        raise row.error(f"'human_preference' must be 1 for one of {n_images} images; found {shares}")
    return shares


def _shares(row: Row, n_images: int) -> list[float]:
    """Of a ranking without its annotators."""
    if "rank" not in row:
        found = ", ".join(row.values)
        raise row.error(f"the field 'human_preference' or 'rank' is missing; found {found}")
    wins, _ = votes_from_rankings([_places(row, "rank", n_images)])
    return [won / (n_images - 1) for won in wins]


def _places(row: Row, name: str, n_images: int) -> list[float]:
    ranking = row.numbers(name)
    if len(ranking) != n_images:
        raise row.error(f"{name!r} has {len(ranking)} numbers for {n_images} images")
    return ranking


def _check_agreement(row: Row, rank: Sequence[float], rankings: Sequence[Sequence[float]]) -> None:
    if not rankings:
        raise row.error("'raw_annotations' is empty")
    means = [sum(column) / len(rankings) for column in zip(*rankings, strict=True)]
    pairs = list(itertools.combinations(range(len(rank)), 2))
    against = sum((rank[a] - rank[b]) * (means[a] - means[b]) < 0 for a, b in pairs)
    if against > _CONTRADICTIONS * len(pairs):
        raise row.error(
            f"'raw_annotations' order {against} of {len(pairs)} pairs against 'rank'; they are not the ranks of the "
            "images in their order"
        )

"""Agreement of a model's scores with a labelled data set, per dimension and over all of them.

The comparison is the same whether the scores come from a bundle or from a file that `zreward score`
wrote: an array of predicted means beside an array of labels. "overall" pools the dimensions: its HPA is
over all dimensions' same-prompt pairs together, so a dimension counts as much as it has decided pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zreward.errors import MetricError, UsageError
from zreward.jsonfile import parse_json_object
from zreward.metrics import hpa, margin_hpa, plcc, srcc
from zreward.pairs import Pair, read_labelled_pairs, read_lines

OVERALL = "overall"

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Labels:
    """A labelled data set.

    Attributes:
        dimensions: names, in the order of the columns.
        pairs: prompt and image of each item.
        digests: of the line of each item, by which scores in a file are matched.
        scores: the labels, float64 [n, dimensions]; NaN where an item has none.
    """

    dimensions: tuple[str, ...]
    pairs: tuple[Pair, ...]
    digests: tuple[str, ...]
    scores: Floats


@dataclass(frozen=True)
class Agreement:
    """One row of an evaluation; a figure that is undefined on the data is None.

    Attributes:
        dimension: its name, or "overall".
        n_items: how many scores were compared.
        plcc: Pearson's correlation.
        srcc: Spearman's rank correlation.
        hpa: human preference accuracy on same-prompt pairs.
        n_pairs: pairs behind `hpa`.
        margin_hpa: the same on pairs whose labels differ by more than half a point.
        n_margin_pairs: pairs behind `margin_hpa`.
    """

    dimension: str
    n_items: int
    plcc: float | None
    srcc: float | None
    hpa: float | None
    n_pairs: int
    margin_hpa: float | None
    n_margin_pairs: int


def read_labels(path: Path) -> Labels:
    """Read a data set; a dimension that some lines have no label in is NaN there.

    Raises:
        UsageError: there is no such file, it is empty, or a line is malformed or has no label at all.
    """
    pairs: list[Pair] = []
    digests: list[str] = []
    for line, pair in read_labelled_pairs(path):
        pairs.append(pair)
        digests.append(line.digest)
    if not pairs:
        raise UsageError(f"{path}: the data set is empty")
    dimensions = tuple(dict.fromkeys(name for pair in pairs for name in pair.scores))
    scores = np.array([[pair.scores.get(name, np.nan) for name in dimensions] for pair in pairs])
    return Labels(dimensions, tuple(pairs), tuple(digests), scores)


def read_predictions(path: Path, labels: Labels) -> Floats:
    """Means from a file that `zreward score --input` wrote for this data set, float64 [n, dimensions].

    Items that failed are NaN.

    Raises:
        UsageError: the file does not answer this data set line by line, or lacks a labelled dimension.
    """
    predictions = np.full(labels.scores.shape, np.nan)
    count = 0
    with path.open("rb") as stream:
        for line in read_lines(stream):
            count = line.number
            try:
                record = parse_json_object((line.text or b"").decode())
            except (ValueError, RecursionError):
                raise UsageError(f"{path}, line {count}: not a line that `zreward score` wrote") from None
            if count > len(labels.digests) or record.get("input") != labels.digests[count - 1]:
                raise UsageError(f"{path}, line {count}: answers another data set; score this one first")
            if "error" not in record:
                predictions[count - 1] = _means(record, labels.dimensions, f"{path}, line {count}")
    if count < len(labels.pairs):
        raise UsageError(
            f"{path}: answers {count} of {len(labels.pairs)} lines of the data set; "
            "run the same `zreward score` command again and it goes on where it stopped"
        )
    return predictions


def compare(predictions: Floats, labels: Labels) -> list[Agreement]:
    """One row per labelled dimension and one over all of them.

    What has no prediction or no label (NaN) is left out, dimension by dimension.

    Raises:
        MetricError: no item has both.
    """
    known = ~np.isnan(predictions) & ~np.isnan(labels.scores)
    if not known.any():
        raise MetricError("no item of the data set was scored, so there is nothing to compare")
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(p.prompt for p in labels.pairs))}
    # Pairs of different dimensions are not compared: each dimension gets group numbers of its own.
    groups = np.array([prompts[pair.prompt] for pair in labels.pairs])[:, None]
    groups = groups + len(prompts) * np.arange(len(labels.dimensions))
    rows = [
        _agreement(
            name, *(values[known[:, column], column] for values in (predictions, labels.scores, groups))
        )
        for column, name in enumerate(labels.dimensions)
    ]
    return [*rows, _agreement(OVERALL, predictions[known], labels.scores[known], groups[known])]


def _means(record: dict[str, Any], dimensions: Sequence[str], where: str) -> list[float]:
    try:
        return [float(record["dimensions"][name]["mean"]) for name in dimensions]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: no mean for a labelled dimension ({error})") from None


def _agreement(name: str, predicted: Floats, truth: Floats, groups: NDArray[np.int64]) -> Agreement:
    preference = _defined(hpa, predicted, truth, groups)
    clear_preference = _defined(margin_hpa, predicted, truth, groups)
    return Agreement(
        dimension=name,
        n_items=len(predicted),
        plcc=_defined(plcc, predicted, truth),
        srcc=_defined(srcc, predicted, truth),
        hpa=preference.value if preference else None,
        n_pairs=preference.n_pairs if preference else 0,
        margin_hpa=clear_preference.value if clear_preference else None,
        n_margin_pairs=clear_preference.n_pairs if clear_preference else 0,
    )


def _defined(metric: Callable[..., T], *arguments: NDArray[Any]) -> T | None:
    try:
        return metric(*arguments)
    except MetricError:  # a constant, or no pair with different labels
        return None

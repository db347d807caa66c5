"""Agreement of a model's scores with a labelled data set, per dimension and over all of them.

The comparison is the same whether the scores come from a bundle, from a checkpoint or from a file that `zreward score`
wrote: an array of predicted means beside an array of labels. "overall" pools the dimensions: its HPA is over all
dimensions' same-prompt pairs together, so a dimension counts as much as it has decided pairs.
`zreward.evaluation_report` adds intervals and calibration for `zreward eval`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zreward.errors import MetricError, UsageError
from zreward.metrics import hpa, margin_hpa, plcc, srcc
from zreward.pairs import Pair, read_labelled_pairs

OVERALL = "overall"

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Labels:
    """A labelled data set.

    Attributes:
        dimensions: names, in the order of the columns.
        pairs: prompt, image and annotations of each item.
        digests: of the line of each item, by which scores in a file are matched.
        scores: the labels, float64 [n, dimensions]; NaN where an item has none.
    """

    dimensions: tuple[str, ...]
    pairs: tuple[Pair, ...]
    digests: tuple[str, ...]
    scores: Floats


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of a data set, in the order of its items and labelled dimensions.

    Attributes:
        means: expected scores, float64 [n, dimensions]; NaN where there is none.
        bins: the values of the scores, increasing; None where the source has no distributions.
        probs: float64 [n, dimensions, bins]; NaN where there is no score, None where the source has no distributions.
    """

    means: Floats
    bins: tuple[float, ...] | None = None
    probs: Floats | None = None

    @staticmethod
    def of_distributions(probs: ArrayLike, bins: tuple[float, ...]) -> Predictions:
        """Predictions whose means are the expectations of `probs` [n, dimensions, bins]."""
        values = np.asarray(probs, np.float64)
        return Predictions(values @ np.array(bins), bins, values)


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


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one row that have both a prediction and a label, one entry each, [m].

    Attributes:
        dimension: its name, or "overall".
        items, columns: which item and which labelled dimension each is of.
        predicted, truth: mean and label.
        prompts: number of the item's prompt.
        n_prompts: prompts of the whole data set.
    """

    dimension: str
    items: Indices
    columns: Indices
    predicted: Floats
    truth: Floats
    prompts: Indices
    n_prompts: int

    @property
    def groups(self) -> Indices:
        """What is compared in pairs: items of one prompt in one dimension."""
        return np.asarray(self.prompts + self.n_prompts * self.columns)


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


def compared_scores(means: Floats, labels: Labels) -> list[Scores]:
    """The scores of each row: one row per labelled dimension and one over all of them.

    What has no prediction or no label (NaN) is left out, dimension by dimension.

    Raises:
        MetricError: no item has both.
    """
    known = ~np.isnan(means) & ~np.isnan(labels.scores)
    if not known.any():
        raise MetricError("no item of the data set was scored, so there is nothing to compare")
    numbers = {prompt: index for index, prompt in enumerate(dict.fromkeys(p.prompt for p in labels.pairs))}
    prompts = np.array([numbers[pair.prompt] for pair in labels.pairs])

    def row(name: str, chosen: NDArray[np.bool_]) -> Scores:
        items, columns = np.nonzero(chosen)
        predicted, truth = means[items, columns], labels.scores[items, columns]
        return Scores(name, items, columns, predicted, truth, prompts[items], len(numbers))

    columns = np.arange(len(labels.dimensions))
    of_dimensions = [row(name, known & (columns == index)) for index, name in enumerate(labels.dimensions)]
    return [*of_dimensions, row(OVERALL, known)]


def compare(predictions: Floats, labels: Labels) -> list[Agreement]:
    """Agreement of means [n, dimensions] with the labels, one row per dimension and one over all of them.

    Raises:
        MetricError: no item has both.
    """
    return [agreement(scores) for scores in compared_scores(predictions, labels)]


def agreement(scores: Scores) -> Agreement:
    """The figures of one row."""
    preference = defined(hpa, scores.predicted, scores.truth, scores.groups)
    clear_preference = defined(margin_hpa, scores.predicted, scores.truth, scores.groups)
    return Agreement(
        dimension=scores.dimension,
        n_items=len(scores.predicted),
        plcc=defined(plcc, scores.predicted, scores.truth),
        srcc=defined(srcc, scores.predicted, scores.truth),
        hpa=preference.value if preference else None,
        n_pairs=preference.n_pairs if preference else 0,
        margin_hpa=clear_preference.value if clear_preference else None,
        n_margin_pairs=clear_preference.n_pairs if clear_preference else 0,
    )


def defined(metric: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
    """What `metric` gives for the arguments, or None where it is undefined on them."""
    try:
        return metric(*arguments, **options)
    except MetricError:  # a constant, no pair with different labels, or too few prompts
        return None

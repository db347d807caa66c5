"""Agreement with held-out labels while training: the figures of `zreward eval`, from the model in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.evaluation import Labels, compare
from zreward.progress import Progress
from zreward.training.data import Question, TrainingSet
from zreward.training.sequences import Row

Answers = Callable[[Sequence[Row]], Sequence[float]]
"""Expected scores of questions; NaN where the model gave no answer."""

_CHUNK = 64  # questions between two steps of the progress bar


def validate(data: TrainingSet, answers: Answers, limit: int, progress: Progress) -> list[dict[str, Any]]:
    """One row of figures per dimension and one over all, as plain objects (`zreward.evaluation.Agreement`).

    Args:
        answers: the model.
        limit: how many items from the beginning are asked about; 0 for all.
    """
    count = min(limit, len(data)) if limit else len(data)
    scores = data.scores[:count]
    questions = [Question(int(item), int(dimension)) for item, dimension in np.argwhere(~np.isnan(scores))]
    predicted = np.full(scores.shape, np.nan)
    for start in range(0, len(questions), _CHUNK):
        chunk = questions[start : start + _CHUNK]
        items = [data.items[question.item] for question in chunk]
        rows = [Row(item.prompt, item.image, q.dimension) for item, q in zip(items, chunk, strict=True)]
        for question, value in zip(chunk, answers(rows), strict=True):
            predicted[question] = value
        progress("validating", min(start + _CHUNK, len(questions)), len(questions))
    return agreement(data, predicted)


def agreement(data: TrainingSet, predicted: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Figures of predictions [items, dimensions] for the first items of a data set."""
    count = len(predicted)
    labelled = np.asarray(~np.isnan(data.scores[:count]).all(axis=0))
    names = tuple(
        name for name, known in zip(data.contract.dimension_names, labelled.tolist(), strict=True) if known
    )
    labels = Labels(names, data.items[:count], ("",) * count, data.scores[:count][:, labelled])
    return [dataclasses.asdict(row) for row in compare(predicted[:, labelled], labels)]

"""What `zreward score --input … -o scores.jsonl` wrote, read again for an evaluation.

A line holds means and probabilities, but not the values of the bins. Those of the default contract are taken where
they reproduce every mean of the file; otherwise the probabilities are left out, and only the bundle itself can be
judged on its distributions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.contract import DEFAULT_BINS
from zreward.errors import UsageError
from zreward.evaluation import Floats, Labels, Predictions
from zreward.jsonfile import parse_json_object
from zreward.pairs import read_lines

NO_PROBS = "The scores file has no probabilities, so likelihood and sharpness are left out."
OTHER_BINS = (
    "The scores file does not say its bins, and they are not 1 to 5 in steps of one half, so likelihood and sharpness "
    "are left out; evaluate the bundle itself for them."
)

_MEAN_TOLERANCE = 1e-6  # bins are float32 in a graph: means of nine of them agree to some 1e-7
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class ScoreFile:
    """A file that answers a data set line by line.

    Attributes:
        predictions: NaN where a line holds an error.
        contract: SHA-256 of the contract that the scores were made under; None where the lines do not say.
        bundle: the first 16 hex digits of the SHA-256 of the bundle's manifest; None where the lines do not say.
        notes: what of an evaluation the file has not enough for.
    """

    predictions: Predictions
    contract: str | None
    bundle: str | None
    notes: tuple[str, ...]


def read_score_file(path: Path, labels: Labels) -> ScoreFile:
    """Read the scores of a data set.

    Raises:
        UsageError: the file does not answer this data set line by line, lacks a labelled dimension, holds something
            that is no distribution, or was written with several bundles.
    """
    means = np.full(labels.scores.shape, np.nan)
    lists: list[list[list[float]] | None] = [None] * len(labels.pairs)
    stamps: dict[tuple[str | None, str | None], int] = {}
    for number, record in _records(path, labels):
        where = f"{path}, line {number}"
        stamps.setdefault((_text(record, "contract"), _text(record, "bundle")), number)
        if len(stamps) > 1:
            raise UsageError(f"{where}: scored with another bundle than line 1; score the data set anew")
        if "error" not in record:
            found = [_dimension(record, name, where) for name in labels.dimensions]
            means[number - 1] = [_number(item.get("mean"), where) for item in found]
            lists[number - 1] = _probabilities(found, where)
    predictions, notes = _predictions(means, lists, path)
    contract, bundle = next(iter(stamps))
    return ScoreFile(predictions, contract, bundle, notes)


def _records(path: Path, labels: Labels) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line with its number, once it is known to answer that line of the data set."""
    count = 0
    with path.open("rb") as stream:
        for line in read_lines(stream):
            count = line.number
            try:
                record = parse_json_object((line.text or b"").decode())
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{path}, line {count}: not a line that `zreward score` wrote ({error})"
                ) from None
            if count > len(labels.digests) or record.get("input") != labels.digests[count - 1]:
                raise UsageError(f"{path}, line {count}: answers another data set; score this one first")
            yield count, record
    if count < len(labels.pairs):
        raise UsageError(
            f"{path}: answers {count} of {len(labels.pairs)} lines of the data set; "
            "run the same `zreward score` command again and it goes on where it stopped"
        )


def _dimension(record: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    dimensions = record.get("dimensions")
    item = dimensions.get(name) if isinstance(dimensions, dict) else None
    if not isinstance(item, dict):
        raise UsageError(f"{where}: no scores of the labelled dimension {name!r}")
    return item


def _probabilities(found: list[Mapping[str, Any]], where: str) -> list[list[float]] | None:
    """The probabilities of every dimension of a line, or None where one has none."""
    values = []
    for item in found:
        probs = item.get("probs")
        if probs is None:
            return None
        if not isinstance(probs, list):
            raise UsageError(f"{where}: 'probs' is no list of numbers")
        values.append([_number(value, where) for value in probs])
    return values


def _predictions(
    means: Floats, lists: list[list[list[float]] | None], path: Path
) -> tuple[Predictions, tuple[str, ...]]:
    answered: NDArray[np.bool_] = np.asarray(~np.isnan(means).any(axis=1))
    known = [values for values, there in zip(lists, answered.tolist(), strict=True) if there]
    if not known or any(values is None for values in known):
        return Predictions(means), (NO_PROBS,) if known else ()
    lengths = {len(row) for values in known for row in values or ()}
    if len(lengths) > 1:
        raise UsageError(f"{path}: its lines have distributions over {min(lengths)} and {max(lengths)} bins")
    probs = np.full((*means.shape, lengths.pop()), np.nan)
    probs[answered] = known
    _check_distributions(probs, answered, path)
    bins = np.array(DEFAULT_BINS)
    if probs.shape[-1] != len(bins) or np.nanmax(np.abs(probs @ bins - means)) > _MEAN_TOLERANCE:
        return Predictions(means), (OTHER_BINS,)
    return Predictions(means, DEFAULT_BINS, probs), ()


def _check_distributions(probs: Floats, answered: NDArray[np.bool_], path: Path) -> None:
    sums = probs.sum(axis=-1)
    wrong = answered & ((probs < 0).any(axis=(1, 2)) | (np.abs(sums - 1) > _SUM_TOLERANCE).any(axis=1))
    if wrong.any():
        raise UsageError(f"{path}, line {np.flatnonzero(wrong)[0] + 1}: 'probs' is no distribution")


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{where}: expected a number for a mean or a probability, found {value!r}")
    return float(value)


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) else None

"""What `zreward eval` finds out: agreement with its intervals, and calibration, per dimension and over all of them.

The report is data: the command prints it as tables or JSON, `zreward.evaluation_page` draws it. docs/evaluation.md
defines every figure and every field of the JSON.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import zreward
from zreward.calibration import (
    Calibration,
    Likelihood,
    annotation_shares,
    bias,
    calibration_error,
    expected_against_observed,
    likelihood,
    shares_on_bins,
    sharpness,
)
from zreward.evaluation import (
    Agreement,
    Floats,
    Labels,
    Predictions,
    Scores,
    agreement,
    compared_scores,
)
from zreward.evaluation_intervals import LEVEL, Intervals, agreement_intervals
from zreward.hashing import file_sha256
from zreward.progress import Progress

SCHEMA, SCHEMA_VERSION = "zreward.evaluation", 1

SourceKind = Literal["bundle", "checkpoint", "scores"]


@dataclass(frozen=True)
class Row:
    """One dimension, or all of them.

    Attributes:
        agreement: with the labels.
        n_failed: scores that have a label and no prediction, left out of everything else.
        intervals: of the four figures of `agreement`.
        calibration: of the same scores.
    """

    agreement: Agreement
    n_failed: int
    intervals: Intervals
    calibration: Calibration

    @property
    def dimension(self) -> str:
        return self.agreement.dimension

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.agreement),
            "n_failed": self.n_failed,
            "intervals": dataclasses.asdict(self.intervals),
            "calibration": dataclasses.asdict(self.calibration),
        }


@dataclass(frozen=True)
class Reasoning:
    """How a checkpoint was asked that reasons before it answers.

    Attributes:
        traces: sampled outputs of each question, whose distributions were averaged.
        max_new_tokens: an output without an answer by then is a failed one.
        seed: of the sampling.
        n_sampled: outputs in all.
        n_answered: those of them that ended in an answer.
    """

    traces: int
    max_new_tokens: int
    seed: int
    n_sampled: int = 0
    n_answered: int = 0


@dataclass(frozen=True)
class Source:
    """Where the scores came from.

    Attributes:
        kind: "bundle", "checkpoint" or "scores".
        path: as it was given.
        contract_sha256: of the score contract; None for a scores file that does not say.
        bundle_sha256: of the bundle's manifest, its first 16 digits for a scores file; None for a checkpoint.
        reasoning: None where the model answered directly.
        notes: what of the evaluation the source has not enough for, and what computed it if not the CPU.
        packages: distributions whose versions belong to the result.
    """

    kind: SourceKind
    path: str
    contract_sha256: str | None
    bundle_sha256: str | None = None
    reasoning: Reasoning | None = None
    notes: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """The labelled data set; an item has failed if one of its labels has no prediction."""

    path: str
    sha256: str
    n_items: int
    n_prompts: int
    n_failed: int


@dataclass(frozen=True)
class EvaluationReport:
    """The result.

    Attributes:
        source: of the scores.
        data: the labelled data set.
        rows: one per dimension and, as the last, one over all of them.
        bins: of the predicted distributions; None where there are none.
        n_resamples: bootstrap draws of each interval, 0 for none.
        seed: of the draws.
        notes: what was left out and why.
        versions: of Python and of the packages that computed the scores.
    """

    source: Source
    data: DataSet
    rows: tuple[Row, ...]
    bins: tuple[float, ...] | None
    n_resamples: int
    seed: int
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def overall(self) -> Row:
        return self.rows[-1]

    @property
    def failures(self) -> str | None:
        """What could not be scored, in words; None where everything was."""
        if not self.data.n_failed:
            return None
        return (
            f"{self.data.n_failed:,} of {self.data.n_items:,} images could not be scored in every labelled dimension; "
            f"{self.overall.n_failed:,} scores are left out."
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, see docs/evaluation.md."""
        source = {k: v for k, v in dataclasses.asdict(self.source).items() if k not in ("notes", "packages")}
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "source": source,
            "data": dataclasses.asdict(self.data),
            "bins": self.bins and list(self.bins),
            "bootstrap": {"level": LEVEL, "resamples": self.n_resamples, "seed": self.seed},
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }


def evaluation_report(
    source: Source,
    data: Path,
    predictions: Predictions,
    labels: Labels,
    *,
    n_resamples: int = 300,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> EvaluationReport:
    """Compare predictions with labels.

    Args:
        source: of the predictions, handed through.
        data: the file of the labels.
        n_resamples: bootstrap draws for each interval; 0 for no intervals.
        seed: of the draws.

    Raises:
        MetricError: no item has both a prediction and a label.
    """
    targets = _Targets.of(labels, predictions.bins)
    compared = compared_scores(predictions.means, labels)
    failed = np.isnan(predictions.means) & ~np.isnan(labels.scores)
    rows = []
    for number, scores in enumerate(compared):
        of_row = failed[:, number] if number < len(labels.dimensions) else failed
        intervals = agreement_intervals(scores, n_resamples, seed)
        calibration = _calibration(scores, predictions, targets)
        rows.append(Row(agreement(scores), int(of_row.sum()), intervals, calibration))
        if n_resamples:
            progress("drawing intervals", number + 1, len(compared))
    n_failed, n_prompts = int(failed.any(axis=1).sum()), compared[-1].n_prompts
    return EvaluationReport(
        source=source,
        data=DataSet(str(data), file_sha256(data), len(labels.pairs), n_prompts, n_failed),
        rows=tuple(rows),
        bins=predictions.bins,
        n_resamples=n_resamples,
        seed=seed,
        notes=(*source.notes, *targets.notes),
        versions=_versions(source.packages),
    )


@dataclass(frozen=True, eq=False)
class _Targets:
    """What the predicted distributions are held against.

    Attributes:
        annotations: shares of each item's annotations on the bins, [n, dimensions, bins]; NaN where it has none.
        on_scale: whether all labels and annotations of a dimension lie on the scale of the bins, [dimensions].
        notes: which do not.
    """

    annotations: Floats
    on_scale: NDArray[np.bool_]
    notes: tuple[str, ...]

    @staticmethod
    def of(labels: Labels, bins: Sequence[float] | None) -> _Targets:
        n, dimensions = labels.scores.shape
        if bins is None:
            return _Targets(np.full((n, dimensions, 0), np.nan), np.zeros(dimensions, bool), ())
        shares = np.full((n, dimensions, len(bins)), np.nan)
        on_scale, notes = np.ones(dimensions, bool), []
        for column, name in enumerate(labels.dimensions):
            annotated = [index for index, pair in enumerate(labels.pairs) if name in pair.annotations]
            known = labels.scores[~np.isnan(labels.scores[:, column]), column]
            try:
                shares_on_bins(known, bins)
                shares[annotated, column] = annotation_shares(
                    [labels.pairs[index].annotations[name] for index in annotated], bins
                )
            except ValueError:
                on_scale[column] = False
                notes.append(
                    f"Labels of {name} lie off the model's scale from {bins[0]:g} to {bins[-1]:g}: its likelihood is "
                    "left out, and its bias and calibration error compare two scales."
                )
        return _Targets(shares, on_scale, tuple(notes))


def _calibration(scores: Scores, predictions: Predictions, targets: _Targets) -> Calibration:
    groups = expected_against_observed(scores.predicted, scores.truth) if len(scores.predicted) else ()
    spread = None
    if predictions.probs is not None and predictions.bins is not None:
        spread = sharpness(predictions.probs[scores.items, scores.columns], predictions.bins)
    return Calibration(
        bias=bias(scores.predicted, scores.truth),
        error=calibration_error(groups),
        groups=groups,
        likelihood=_likelihood(scores, predictions, targets),
        sharpness=spread,
    )


def _likelihood(scores: Scores, predictions: Predictions, targets: _Targets) -> Likelihood | None:
    """That of the annotations of the row if it has any, and of its labels otherwise: the two are never mixed."""
    if predictions.probs is None or predictions.bins is None or not targets.on_scale[scores.columns].all():
        return None
    probs = predictions.probs[scores.items, scores.columns]
    annotations = targets.annotations[scores.items, scores.columns]
    annotated = ~np.isnan(annotations[:, 0])
    if annotated.any():
        return likelihood(probs[annotated], annotations[annotated], "annotations")
    return likelihood(probs, shares_on_bins(scores.truth, predictions.bins), "labels")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"zreward": zreward.__version__, "python": platform.python_version()}
    for name in ("numpy", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

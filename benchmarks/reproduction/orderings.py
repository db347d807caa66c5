"""Whether the paper's orderings came out: differences in HPA between two rows, with intervals.

A difference is the mean over seeds on the same test prompts; its interval is a bootstrap over prompts, drawn for both
rows and all seeds together. It says how sure the order of these trained models is on other prompts; how far other seeds
would move it is in the range over seeds beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zreward.evaluation import Labels, read_labels
from zreward.metrics import Interval, bootstrap_interval, hpa_per_prompt
from zreward.synthetic import DIMENSIONS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Claim:
    """One row is better than another, both named "size-name"."""

    better: str
    worse: str


CLAIMS = (
    Claim("teacher-sft", "teacher-zero-shot"),
    Claim("teacher-grpo", "teacher-sft"),
    Claim("teacher-gdso", "teacher-grpo"),
    Claim("teacher-gdso", "teacher-rewarddance"),
    Claim("student-grpo", "student-sft"),
    Claim("student-gdso", "student-grpo"),
    Claim("student-risd", "student-sft"),
    Claim("student-risd", "student-opd"),
    Claim("student-risd", "student-gdso"),
    Claim("student-risd", "teacher-gdso"),
    Claim("student-grpo", "student-grpo-parsed"),
    Claim("student-gdso", "student-gdso-parsed"),
)
"""That the student is better than its teacher is no claim of the paper: the row says how near it comes."""


@dataclass(frozen=True)
class Difference:
    """HPA of a claim's rows.

    Attributes:
        better, worse: means over the seeds that both have.
        interval: of their difference.
        by_seed: the difference for each seed.
    """

    claim: Claim
    better: float
    worse: float
    interval: Interval
    by_seed: tuple[float, ...]

    @property
    def holds(self) -> bool | None:
        """True or False where the interval lies on one side of 0, else None."""
        if self.interval.low > 0:
            return True
        return False if self.interval.high < 0 else None


@dataclass(frozen=True, eq=False)
class Credit:
    """Pairs of each test prompt, over all dimensions, and how many of them were ordered as the labels order them."""

    right_p: Floats
    pairs_p: Floats

    def hpa(self, prompts: NDArray[np.intp] | slice = slice(None)) -> float:
        return float(self.right_p[prompts].sum() / self.pairs_p[prompts].sum())


def differences(work: Path, test: Path) -> list[Difference]:
    """Every claim whose two rows have a seed in common.

    Args:
        work: of the reproduction.
        test: the labelled lines that its rows were judged on.
    """
    labels = read_labels(test)
    columns = [DIMENSIONS.index(name) for name in labels.dimensions]
    found: dict[str, dict[int, Credit]] = {}
    for path in sorted(work.glob("seed-*/*/predicted-1.npy")):
        seed = int(re.sub(r"\D", "", path.parent.parent.name))
        predicted = answered(np.load(path))[:, columns]
        found.setdefault(path.parent.name, {})[seed] = credit_of(predicted, labels)
    rows = [difference(claim, found) for claim in CLAIMS]
    return [row for row in rows if row is not None]


def answered(predicted: Floats) -> Floats:
    """Predictions [items, dimensions] in which a question without an answer stands at the mean of its dimension."""
    known = ~np.isnan(predicted)
    means = np.where(known, predicted, 0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
    return np.where(known, predicted, means)


def credit_of(predicted: Floats, labels: Labels) -> Credit:
    """Credit of predictions [items, dimensions]."""
    _, prompts = np.unique([pair.prompt for pair in labels.pairs], return_inverse=True)
    right, pairs = np.zeros(prompts.max() + 1), np.zeros(prompts.max() + 1)
    for column in range(predicted.shape[1]):
        of_dimension = hpa_per_prompt(predicted[:, column], labels.scores[:, column], prompts)
        right += of_dimension[0]
        pairs += of_dimension[1]
    return Credit(right, pairs)


def difference(claim: Claim, found: Mapping[str, Mapping[int, Credit]]) -> Difference | None:
    better, worse = found.get(claim.better, {}), found.get(claim.worse, {})
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return None

    def mean_gap(prompts: NDArray[np.intp], _: NDArray[np.intp]) -> float:
        return float(np.mean([better[seed].hpa(prompts) - worse[seed].hpa(prompts) for seed in seeds]))

    n_prompts = len(better[seeds[0]].pairs_p)
    return Difference(
        claim,
        float(np.mean([better[seed].hpa() for seed in seeds])),
        float(np.mean([worse[seed].hpa() for seed in seeds])),
        bootstrap_interval(mean_gap, np.arange(n_prompts), n_resamples=2000),
        tuple(better[seed].hpa() - worse[seed].hpa() for seed in seeds),
    )

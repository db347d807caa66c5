"""Reports of one bundle from several machines or versions, lined up with the first one.

For each stage of each configuration that both have, the ratio of the medians is set beside an interval that holds it
with 95 %: both sets of samples are drawn anew 2,000 times. Where the interval includes 1, the difference is within the
noise of the samples. What it cannot know is how two runs of the same thing differ, because samples of one run resemble
each other; the threshold is for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zreward.errors import BenchError, UsageError
from zreward.jsonfile import write_json
from zreward.runtime.bench.plan import Configuration
from zreward.runtime.bench.report import BenchReport, Result
from zreward.runtime.bench.stages import STAGES, TOTALS

COMPARISON_VERSION = 1
DEFAULT_THRESHOLD = 0.10

RULE = (
    "Within noise: the 95 % bootstrap interval of the ratio of the medians includes 1. A regression: end to end, "
    "slower by more than the threshold, and not within noise."
)

_DRAWS, _SEED = 2000, 0
_DRAWN_AT_ONCE = 4_000_000  # values, to bound memory


@dataclass(frozen=True)
class Change:
    """One stage of one configuration.

    Attributes:
        stage: its key.
        before_ms, after_ms: medians.
        ratio: after to before; above 1 is slower.
        low, high: the interval of the ratio.
        verdict: "same" (within noise), "faster", "slower" or "regression".
    """

    configuration: Configuration
    stage: str
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """One report against the baseline.

    Attributes:
        label: what the report is called.
        changes: by configuration and stage.
        missing: configurations that only one of the two has.
        peak_ratio: for each configuration that both have, the peak of memory after to before; None where one is not
            known.
    """

    label: str
    changes: tuple[Change, ...]
    missing: tuple[Configuration, ...]
    peak_ratio: tuple[float | None, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "regression")


@dataclass(frozen=True)
class Compared:
    """All reports against the first."""

    baseline: str
    threshold: float
    different: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def n_regressions(self) -> int:
        return sum(len(one.regressions) for one in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": "zreward.bench-comparison",
            "version": COMPARISON_VERSION,
            **dataclasses.asdict(self),
            "n_regressions": self.n_regressions,
        }

    def save(self, path: Path) -> None:
        """Write it to `path` in one step."""
        write_json(path, self.to_dict())


def compare(
    reports: Sequence[BenchReport],
    labels: Sequence[str],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    allow_different: bool = False,
) -> Compared:
    """Compare each report with the first.

    Args:
        labels: what the reports are called, each another name.
        threshold: how much slower, as a share, is a regression.
        allow_different: also compare other bundles, and other contracts.

    Raises:
        UsageError: fewer than two reports, a threshold that is no share, or reports of different bundles or contracts.
        BenchError: two reports have no configuration in common.
    """
    if len(reports) < 2:
        raise UsageError("a comparison takes at least two reports, the baseline first")
    if not 0 <= threshold < 100:
        raise UsageError(f"the threshold must be a share of at least 0, such as 10%, not {threshold:.0%}")
    different = _differences(reports, labels)
    if different and not allow_different:
        raise UsageError(
            f"{'; '.join(different)}. Their work is not the same; --allow-different compares them all the same"
        )
    first, *others = reports
    comparisons = [
        _comparison(first, other, label, threshold)
        for other, label in zip(others, labels[1:], strict=True)
    ]  # fmt: skip
    return Compared(labels[0], threshold, tuple(different), tuple(comparisons))


def _differences(reports: Sequence[BenchReport], labels: Sequence[str]) -> list[str]:
    first, found = reports[0].bundle, []
    for report, label in zip(reports[1:], labels[1:], strict=True):
        bundle = report.bundle
        if bundle.contract_sha256 != first.contract_sha256:
            found.append(
                f"{label} has contract {bundle.contract_sha256[:12]}, {labels[0]} {first.contract_sha256[:12]}"
            )
        elif bundle.sha256 != first.sha256:
            found.append(f"{label} has bundle {bundle.sha256[:12]}, {labels[0]} {first.sha256[:12]}")
    return found


def _comparison(before: BenchReport, after: BenchReport, label: str, threshold: float) -> Comparison:
    old = {result.configuration: result for result in before.results}
    new = {result.configuration: result for result in after.results}
    common = [one for one in old if one in new]
    if not common:
        raise BenchError(
            f"{label} has no configuration in common with the baseline: it has "
            f"{'; '.join(one.label for one in new)}, the baseline {'; '.join(one.label for one in old)}"
        )
    return Comparison(
        label,
        tuple(change for one in common for change in _changes(old[one], new[one], threshold)),
        tuple(one for one in [*old, *new] if (one in old) != (one in new)),
        tuple(_ratio(old[one].peak_memory_bytes, new[one].peak_memory_bytes) for one in common),
    )


def _changes(before: Result, after: Result, threshold: float) -> list[Change]:
    changes = []
    for stage in STAGES:
        if stage not in before.stages or stage not in after.stages:
            continue
        old, new = before.stages[stage], after.stages[stage]
        low, high = ratio_interval(old.samples_ms, new.samples_ms)
        ratio = new.median_ms / old.median_ms
        verdict = "slower" if low > 1 else "faster" if high < 1 else "same"
        if verdict == "slower" and stage in TOTALS and ratio > 1 + threshold:
            verdict = "regression"
        changes.append(
            Change(after.configuration, stage, old.median_ms, new.median_ms, ratio, low, high, verdict)
        )
    return changes


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(after) / median(before)."""
    rng = np.random.default_rng(_SEED)
    ratios = _medians_drawn(rng, after) / _medians_drawn(rng, before)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def _medians_drawn(rng: np.random.Generator, samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    step = max(1, _DRAWN_AT_ONCE // len(values))
    drawn = [
        np.median(rng.choice(values, (min(step, _DRAWS - start), len(values))), axis=1)
        for start in range(0, _DRAWS, step)
    ]
    return np.concatenate(drawn)


def _ratio(before: int | None, after: int | None) -> float | None:
    return None if not before or after is None else after / before

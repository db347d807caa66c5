"""The drift report as data: what each figure means, and its JSON.

JSON in the bundle (assets/schemas/drift.schema.json, docs/drift-report.md), a table
(`zreward.commands.drift`) and a page (`zreward.quant.report_page`) are made from it alone;
`zreward.quant.report` computes it. A figure that is undefined on the data is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zreward.errors import QuantizationError
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json
from zreward.metrics import Interval, PairShare

SCHEMA = "zreward.drift"
REPORT_VERSION = 1


@dataclass(frozen=True)
class Spread:
    """Mean, 99th percentile (linear interpolation) and maximum over the items."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class CorrelationChange:
    """Correlation of the scores with the labels.

    Attributes:
        before: of the float model, in −1…1.
        after: of the quantized model.
        change: after − before.
    """

    before: float
    after: float
    change: float


@dataclass(frozen=True)
class PreferenceChange:
    """Share of the same-prompt pairs that a model orders as the labels do; a tie of the scores counts half.

    Attributes:
        before: of the float model, in 0…1.
        after: of the quantized model, on the same pairs.
        change: after − before; −0.002 is a loss of 0.2 points.
        interval: 95 % bootstrap interval of the change: prompts are drawn with replacement, both models on the
            same draw. None with fewer than two prompts, or too few pairs.
        n_pairs: pairs that the labels decide.
    """

    before: float
    after: float
    change: float
    interval: Interval | None
    n_pairs: int


@dataclass(frozen=True)
class Regret:
    """What best-of-4 selection loses (`zreward.quant.figures.best_of_regret` has the definition).

    Attributes:
        value: mean score of the float model's pick minus that of the quantized model's pick, in score points.
        judge: whose score: "labels", or "before" (the float model) where there are no labels.
        n_prompts: prompts with at least two candidates; the others are not counted.
        n_short_prompts: how many of these have two or three candidates, where all of them were compared.
    """

    value: float
    judge: str
    n_prompts: int
    n_short_prompts: int


@dataclass(frozen=True)
class DimensionDrift:
    """The drift of one dimension, or of the overall score.

    μ is the expected score, Δμ = μ after − μ before. The overall score of an item is the mean of its dimensions'
    scores, which is what the runtime ranks by, and its divergence and label are means over the dimensions too.

    Attributes:
        dimension: its name, or "overall".
        kl: KL(before ‖ after) of the score distributions, in nats.
        abs_difference: |Δμ|, in score points.
        mean_difference: mean Δμ with its sign, in score points: a shift that ranking does not see.
        pair_flips: share of all same-prompt pairs that change their order; a tie in one of the models counts half.
            None if no two items share a prompt.
        clear_pair_flips: the same among pairs whose scores were more than half a point apart before. None if
            there are none.
        srcc: rank correlation of after with before; None where either is constant.
        plcc: linear correlation of after with before; None where either is constant.
        label_srcc: rank correlation with the labels. None without labels, or where something is constant.
        label_plcc: linear correlation with the labels. None without labels, or where something is constant.
        hpa: agreement with the labels on same-prompt pairs. None without labels, or if they decide no pair.
        margin_hpa: the same on pairs whose labels are more than half a point apart.
        best_of_4_regret: None if no prompt has two candidates.
    """

    dimension: str
    kl: Spread
    abs_difference: Spread
    mean_difference: float
    pair_flips: PairShare | None
    clear_pair_flips: PairShare | None
    srcc: float | None
    plcc: float | None
    label_srcc: CorrelationChange | None
    label_plcc: CorrelationChange | None
    hpa: PreferenceChange | None
    margin_hpa: PreferenceChange | None
    best_of_4_regret: Regret | None


@dataclass(frozen=True)
class Histogram:
    """Counts of Δμ.

    Attributes:
        edges: of the bins, in score points. The outermost bins also hold everything beyond them.
        counts: items in each bin, for each row of the report.
    """

    edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Example:
    """One distribution before and after.

    Attributes:
        item: row of the held-out set, from 0.
        dimension: its name.
        rank: where its divergence lies among all: "median", "90th percentile", "99th percentile" or "worst".
        kl: KL(before ‖ after), in nats.
        before: probability of each bin.
        after: probability of each bin.
    """

    item: int
    dimension: str
    rank: str
    kl: float
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class SizeFacts:
    """Sizes.

    Attributes:
        weight_bytes_before: all stored weights of the float model.
        weight_bytes_after: the same of the quantized model, scales and zero points included.
        bits_per_weight: stored bits of a quantized weight, scales and zero points included; weights that were
            left as they are do not count.
    """

    weight_bytes_before: int
    weight_bytes_after: int
    bits_per_weight: float

    def __post_init__(self) -> None:
        _expect_amounts("size", self)


@dataclass(frozen=True)
class LayerFacts:
    """One quantized layer.

    Attributes:
        name: its path in the checkpoint.
        format: its format, as `zreward.quant.scheme.format_name` writes it.
        bits: stored bits a weight, scales and zero points included.
        sensitivity_kl: mean divergence in nats when this layer alone is quantized; None where not measured.
        relative_error: ‖Ŵ − W‖ / ‖W‖, Frobenius norms; None where not measured.
    """

    name: str
    format: str
    bits: float
    sensitivity_kl: float | None = None
    relative_error: float | None = None

    def __post_init__(self) -> None:
        _expect_amounts(f"layer {self.name}", self)


@dataclass(frozen=True)
class DriftReport:
    """How far quantization moved the scores.

    Attributes:
        title: what was compared, such as "int4, GPTQ".
        bins: the score values.
        n_items: held-out items.
        n_prompts: distinct prompts among them.
        rows: one per dimension, then "overall".
        histogram: of Δμ.
        examples: distributions before and after, from the median divergence to the worst.
        size: None where not given.
        layers: the quantized layers; empty where not given.
        n_resamples: bootstrap draws behind each interval.
        seed: of these draws.
    """

    title: str
    bins: tuple[float, ...]
    n_items: int
    n_prompts: int
    rows: tuple[DimensionDrift, ...]
    histogram: Histogram
    examples: tuple[Example, ...]
    size: SizeFacts | None
    layers: tuple[LayerFacts, ...]
    n_resamples: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise QuantizationError(
                "a drift report has a row for each dimension and one for the overall score"
            )
        counts = self.histogram.counts
        if len(counts) != len(self.rows) or any(len(c) != len(self.histogram.edges) - 1 for c in counts):
            raise QuantizationError("the histogram does not have the counts of each bin for each row")
        if any(not len(e.before) == len(e.after) == len(self.bins) for e in self.examples):
            raise QuantizationError(f"an example does not have {len(self.bins)} probabilities, one per bin")

    @property
    def overall(self) -> DimensionDrift:
        return self.rows[-1]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "version": REPORT_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: object, where: str = "drift report") -> DriftReport:
        """Read the JSON form strictly.

        Raises:
            QuantizationError: another kind or version of file, or an unknown, missing or mistyped field.
        """
        if not isinstance(data, Mapping):
            raise QuantizationError(f"{where}: expected an object, found {type(data).__name__}")
        data = dict(data)
        schema, version = data.pop("schema", None), data.pop("version", None)
        if schema != SCHEMA or type(version) is not int or version != REPORT_VERSION:
            raise QuantizationError(
                f"{where}: not a drift report of version {REPORT_VERSION} (schema {schema!r}, version {version!r})"
            )
        return dataclass_from_json(DriftReport, data, where, QuantizationError)

    def save(self, path: Path) -> None:
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> DriftReport:
        return DriftReport.from_dict(read_json_object(path, QuantizationError), str(path))


def _expect_amounts(where: str, facts: SizeFacts | LayerFacts) -> None:
    for name, value in dataclasses.asdict(facts).items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise QuantizationError(f"{where}: {name} is {value}; expected a finite number of at least 0")

"""The drift report: how far quantization moved the scores, on held-out items, and the gate that judges it.

A reward model is used to rank the candidates of a prompt, so it is judged on its score distributions and on the
order of same-prompt pairs, not on perplexity. HPA alone hides drift (it moved by 0.3 points where 4 % of the
pairs changed their order), so divergence, score differences and flips come first, and need no labels.
`zreward.quant.drift` defines every figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zreward.contract import DriftLimits
from zreward.errors import MetricError, QuantizationError
from zreward.evaluation import OVERALL
from zreward.metrics import MARGIN, bootstrap_interval, hpa_per_prompt, pair_flips, plcc, srcc
from zreward.quant.drift import (
    CorrelationChange,
    DimensionDrift,
    DriftReport,
    Example,
    Histogram,
    LayerFacts,
    PreferenceChange,
    Regret,
    SizeFacts,
    Spread,
)
from zreward.quant.figures import (
    Floats,
    best_of_regret,
    checked_groups,
    checked_labels,
    checked_probabilities,
    kl_divergence,
)

_HISTOGRAM_BINS = 41  # odd, so that one is centred on zero
_EXAMPLES = (("median", 0.5), ("90th percentile", 0.9), ("99th percentile", 0.99))
_N_WORST = 3

T = TypeVar("T")


def drift_report(
    before: ArrayLike,
    after: ArrayLike,
    groups: ArrayLike,
    *,
    bins: Sequence[float],
    dimensions: Sequence[str],
    labels: ArrayLike | None = None,
    size: SizeFacts | None = None,
    layers: Sequence[LayerFacts] = (),
    title: str = "quantized",
    n_resamples: int = 1000,
    seed: int = 0,
) -> DriftReport:
    """Compare the score distributions of a model before and after quantization.

    Args:
        before: probabilities of the float model, [n, dimensions, bins].
        after: probabilities of the quantized model for the same items.
        groups: prompt of each item, [n] integers or strings.
        bins: the score values, strictly increasing.
        dimensions: names, in the order of the arrays.
        labels: human scores, [n, dimensions]; None where there are none.
        size: sizes, handed through.
        layers: the quantized layers, handed through.
        title: what was compared.
        n_resamples: bootstrap draws for each interval.
        seed: of the draws.

    Raises:
        QuantizationError: shapes that do not fit, fewer than two items, or values that are not distributions or
            not finite.
    """
    values, names = np.asarray(bins, np.float64), tuple(dimensions)
    if values.ndim != 1 or len(values) < 2 or not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
        raise QuantizationError(f"bins must be finite and strictly increasing, not {list(bins)}")
    p = checked_probabilities("before", before, len(names), len(values))
    q = checked_probabilities("after", after, len(names), len(values))
    if len(p) != len(q):
        raise QuantizationError(f"{len(p)} items before and {len(q)} after; score the same items with both")
    prompts = checked_groups(groups, len(p))
    truth = None if labels is None else checked_labels(labels, p.shape[:2])

    kl = kl_divergence(p, q)
    mu_before, mu_after = p @ values, q @ values
    columns = [np.column_stack([a, a.mean(axis=1)]) for a in (kl, mu_before, mu_after)]
    targets = None if truth is None else np.column_stack([truth, truth.mean(axis=1)])
    rows = tuple(
        _row(
            name,
            *(column[:, d] for column in columns),
            labels=None if targets is None else targets[:, d],
            groups=prompts,
            draws=(n_resamples, seed),
        )
        for d, name in enumerate((*names, OVERALL))
    )
    return DriftReport(
        title=title,
        bins=tuple(values.tolist()),
        n_items=len(p),
        n_prompts=len(np.unique(prompts)),
        rows=rows,
        histogram=_histogram(columns[2] - columns[1]),
        examples=_examples(p, q, kl, names),
        size=size,
        layers=tuple(layers),
        n_resamples=n_resamples,
        seed=seed,
    )


@dataclass(frozen=True)
class LimitedFigure:
    """A figure of one row beside its limit; the value is None where it is undefined, which exceeds nothing.

    `unit` is "points" (of the score), "share" or "nats".
    """

    name: str
    value: float | None
    limit: float
    unit: str

    @property
    def exceeded(self) -> bool:
        return self.value is not None and not self.value <= self.limit


def limited_figures(row: DimensionDrift, limits: DriftLimits) -> tuple[LimitedFigure, ...]:
    """The figures that the contract limits."""
    flips = row.pair_flips.value if row.pair_flips else None
    return (
        LimitedFigure("mean |Δμ|", row.abs_difference.mean, limits.mean_abs_difference, "points"),
        LimitedFigure("99th percentile of |Δμ|", row.abs_difference.p99, limits.p99_abs_difference, "points"),
        LimitedFigure("share of flipped pairs", flips, limits.pair_flips, "share"),
        LimitedFigure("mean KL", row.kl.mean, limits.mean_kl, "nats"),
    )


def check_drift(report: DriftReport, limits: DriftLimits) -> list[str]:
    """The limits that the report exceeds, in words; empty if it passes.

    Every row is checked, the overall one too.
    """
    found = []
    for row in report.rows:
        for figure in limited_figures(row, limits):
            if figure.exceeded:
                value, limit = _apart(figure)
                found.append(f"{row.dimension}: {figure.name} {value} exceeds the contract's {limit}")
    return found


def _apart(figure: LimitedFigure) -> tuple[str, str]:
    """Value and limit, with as many digits as tell them apart."""
    assert figure.value is not None
    scale, unit = (100, " %") if figure.unit == "share" else (1, "")
    for digits in range(2, 18):
        value, limit = (f"{number * scale:.{digits}g}{unit}" for number in (figure.value, figure.limit))
        if value != limit:
            break
    return value, limit


def _row(
    name: str,
    kl: Floats,
    before: Floats,
    after: Floats,
    *,
    labels: Floats | None,
    groups: NDArray[np.generic],
    draws: tuple[int, int],
) -> DimensionDrift:
    regret = best_of_regret(before, after, before if labels is None else labels, groups)
    judge = "before" if labels is None else "labels"
    return DimensionDrift(
        dimension=name,
        kl=_spread(kl),
        abs_difference=_spread(np.abs(after - before)),
        mean_difference=float((after - before).mean()),
        pair_flips=_defined(lambda: pair_flips(before, after, groups)),
        clear_pair_flips=_defined(lambda: pair_flips(before, after, groups, MARGIN)),
        srcc=_defined(lambda: srcc(after, before)),
        plcc=_defined(lambda: plcc(after, before)),
        label_srcc=_correlation_change(srcc, before, after, labels),
        label_plcc=_correlation_change(plcc, before, after, labels),
        hpa=_preference_change(before, after, labels, groups, 0.0, draws),
        margin_hpa=_preference_change(before, after, labels, groups, MARGIN, draws),
        best_of_4_regret=None if regret is None else Regret(regret[0], judge, *regret[1:]),
    )


def _correlation_change(
    metric: Callable[[Floats, Floats], float], before: Floats, after: Floats, labels: Floats | None
) -> CorrelationChange | None:
    if labels is None:
        return None
    pair = _defined(lambda: (metric(before, labels), metric(after, labels)))
    return None if pair is None else CorrelationChange(pair[0], pair[1], pair[1] - pair[0])


def _preference_change(
    before: Floats,
    after: Floats,
    labels: Floats | None,
    groups: NDArray[np.generic],
    margin: float,
    draws: tuple[int, int],
) -> PreferenceChange | None:
    if labels is None:
        return None
    sums = _defined(lambda: hpa_per_prompt(before, labels, groups, margin))
    if sums is None:
        return None
    credit_before, pairs = sums
    credit_after, _ = hpa_per_prompt(after, labels, groups, margin)
    gain = credit_after - credit_before

    def change(rows: NDArray[np.intp], _: NDArray[np.intp]) -> float:
        n = pairs[rows].sum()
        return float(gain[rows].sum() / n) if n else math.nan

    # One row per prompt: the sums of a prompt are drawn, not its items.
    interval = _defined(
        lambda: bootstrap_interval(change, np.arange(len(pairs)), n_resamples=draws[0], seed=draws[1])
    )
    n_pairs = pairs.sum()
    return PreferenceChange(
        before=float(credit_before.sum() / n_pairs),
        after=float(credit_after.sum() / n_pairs),
        change=float(gain.sum() / n_pairs),
        interval=interval,
        n_pairs=int(n_pairs),
    )


def _histogram(difference: Floats) -> Histogram:
    """Counts of each column of `difference` [n, rows]; the edges leave out the wildest half per cent."""
    reach = float(np.quantile(np.abs(difference), 0.995))
    edges = np.linspace(-1, 1, _HISTOGRAM_BINS + 1) * _round_up(max(reach, 1e-6))
    clipped = np.clip(difference, edges[0], edges[-1])
    counts = [np.histogram(column, edges)[0].tolist() for column in clipped.T]
    return Histogram(tuple(edges.tolist()), tuple(tuple(c) for c in counts))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, … at or above `value`, at any power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-12))


def _examples(before: Floats, after: Floats, kl: Floats, names: Sequence[str]) -> tuple[Example, ...]:
    order = np.argsort(kl, axis=None, kind="stable")
    ranks = {round(share * (len(order) - 1)): rank for rank, share in _EXAMPLES}
    ranks |= {len(order) - 1 - place: "worst" for place in range(min(_N_WORST, len(order)))}
    examples = []
    for place in sorted(ranks):
        item, dimension = divmod(int(order[place]), len(names))
        examples.append(
            Example(
                item=item,
                dimension=names[dimension],
                rank=ranks[place],
                kl=float(kl[item, dimension]),
                before=tuple(before[item, dimension].tolist()),
                after=tuple(after[item, dimension].tolist()),
            )
        )
    return tuple(examples)


def _spread(values: Floats) -> Spread:
    return Spread(float(values.mean()), float(np.quantile(values, 0.99)), float(values.max()))


def _defined(metric: Callable[[], T]) -> T | None:
    try:
        return metric()
    except MetricError:  # a constant, no pair, or too few prompts
        return None

"""zreward.distribution against scipy, against a double loop, and against the laws that it promises."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from zreward.contract import DEFAULT_BINS
from zreward.distribution import DistributionError, ScoreDistribution

weights = st.lists(st.floats(0, 1), min_size=9, max_size=9).filter(lambda w: sum(w) > 1e-3)
distributions = weights.map(lambda w: ScoreDistribution(DEFAULT_BINS, np.array(w) / sum(w)))


def random_distributions(n: int) -> list[ScoreDistribution]:
    """Peaked and flat ones, some with bins of probability zero, over unequally spaced bins."""
    rng = np.random.default_rng(0)
    bins = np.sort(rng.uniform(-3, 7, 9))
    rows = rng.dirichlet(np.full(9, 0.3), n)
    rows[::3, :2] = 0
    return [ScoreDistribution(bins, row / row.sum()) for row in rows]


def win_by_loops(a: ScoreDistribution, b: ScoreDistribution) -> float:
    total = 0.0
    for s, p in zip(a.bins, a.probs, strict=True):
        for t, q in zip(b.bins, b.probs, strict=True):
            total += p * q * (1.0 if s > t else 0.5 if s == t else 0.0)
    return total


def test_moments_and_distances_match_scipy() -> None:
    all_ = random_distributions(40)
    for a, b in pairwise(all_):
        variable = scipy.stats.rv_discrete(values=(np.arange(9), a.probs))
        assert a.mean == pytest.approx(variable.expect(lambda i, d=a: d.bins[i.astype(int)]))
        assert a.variance == pytest.approx(np.cov(a.bins, aweights=a.probs, bias=True).item())
        assert a.std == pytest.approx(math.sqrt(a.variance))
        assert a.entropy == pytest.approx(scipy.stats.entropy(a.probs))
        assert a.kl(b) == pytest.approx(scipy.stats.entropy(a.probs, b.probs))
        reference = scipy.stats.wasserstein_distance(a.bins, b.bins, a.probs, b.probs)
        assert a.wasserstein(b) == pytest.approx(reference)
        assert a.win_probability(b) == pytest.approx(win_by_loops(a, b))


def test_quantiles_and_tails_match_scipy() -> None:
    for a in random_distributions(40):
        variable = scipy.stats.rv_discrete(values=(np.arange(9), a.probs))
        for q in (0.01, 0.25, 0.5, 0.731, 0.99):
            assert a.quantile(q) == a.bins[int(variable.ppf(q))]
        for index, score in enumerate(a.bins):
            assert a.probability_at_least(score) == pytest.approx(variable.sf(index - 1))
        assert a.probability_at_least(a.bins[-1] + 1e-9) == 0.0


def test_softmax_matches_scipy_at_any_scale() -> None:
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1.0, 1e3, 1e30):
        logits = rng.normal(0, scale, 9)
        for temperature in (0.5, 1.0, 3.0):
            got = ScoreDistribution.from_logits(DEFAULT_BINS, logits, temperature)
            assert np.allclose(got.probs, scipy.special.softmax(logits / temperature), atol=1e-12)


def test_a_logit_of_minus_infinity_rules_its_bin_out() -> None:
    got = ScoreDistribution.from_logits((1, 2, 3), (0.0, -np.inf, 0.0))
    assert got.probs.tolist() == [0.5, 0.0, 0.5]


def test_mode_takes_the_lowest_of_equals() -> None:
    assert ScoreDistribution((1, 2, 3), (0.4, 0.2, 0.4)).mode == 1.0


def test_expectation_keeps_what_a_parsed_digit_loses() -> None:
    low, high = (ScoreDistribution((3, 4, 5), p) for p in ((0.3, 0.6, 0.1), (0.1, 0.6, 0.3)))
    assert low.mode == high.mode == 4.0
    assert (low.mean, high.mean) == pytest.approx((3.8, 4.2))


@given(weights)
@settings(deadline=None)
def test_probabilities_sum_to_one_and_moments_stay_in_range(w: list[float]) -> None:
    d = ScoreDistribution(DEFAULT_BINS, np.array(w) / sum(w))
    assert d.probs.sum() == pytest.approx(1.0, abs=1e-12)
    assert 1.0 - 1e-9 <= d.mean <= 5.0 + 1e-9
    assert 0.0 <= d.variance <= 4.0 + 1e-9  # Popoviciu: a quarter of the squared range
    assert 0.0 <= d.entropy <= math.log(9) + 1e-9


@given(distributions, distributions)
@settings(deadline=None)
def test_win_probabilities_are_complementary(a: ScoreDistribution, b: ScoreDistribution) -> None:
    assert a.win_probability(b) + b.win_probability(a) == pytest.approx(1.0, abs=1e-12)
    assert a.win_probability(a) == pytest.approx(0.5, abs=1e-12)


@given(distributions, distributions)
@settings(deadline=None)
def test_divergences_are_not_negative_and_vanish_on_equals(
    a: ScoreDistribution, b: ScoreDistribution
) -> None:
    assert a.kl(b) >= 0.0
    assert a.wasserstein(b) == pytest.approx(b.wasserstein(a), abs=1e-12)
    assert a.wasserstein(b) >= abs(a.mean - b.mean) - 1e-9
    assert a.kl(a) == a.wasserstein(a) == 0.0


@given(distributions, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_monotone(a: ScoreDistribution, q: float, r: float) -> None:
    low, high = sorted((q, r))
    assert a.bins[0] <= a.quantile(low) <= a.quantile(high) <= a.bins[-1]


def test_kl_is_infinite_where_the_other_rules_a_bin_out() -> None:
    a, b = ScoreDistribution((1, 2), (0.5, 0.5)), ScoreDistribution((1, 2), (1.0, 0.0))
    assert a.kl(b) == math.inf
    assert b.kl(a) == pytest.approx(math.log(2))


def test_a_sum_rounded_by_float32_is_rescaled() -> None:
    d = ScoreDistribution((1, 2, 3), np.array([0.3, 0.3, 0.3999], dtype=np.float32))
    assert d.probs.sum() == pytest.approx(1.0, abs=1e-15)


def test_arrays_are_copies_that_cannot_be_written() -> None:
    probs = np.array([0.5, 0.5])
    d = ScoreDistribution((1, 2), probs)
    probs[:] = (1, 0)
    assert d.mean == 1.5
    with pytest.raises(ValueError, match="read-only"):
        d.probs[0] = 1


@pytest.mark.parametrize(
    ("bins", "probs"),
    [
        ((), ()),
        ((1, 2, 3), (0.5, 0.5)),
        (((1, 2),), ((0.5, 0.5),)),
        ((2, 1), (0.5, 0.5)),
        ((1, 1), (0.5, 0.5)),
        ((math.nan,), (1.0,)),
        ((1, math.inf), (0.5, 0.5)),
        ((1, 2), (0.5, 0.6)),
        ((1, 2), (-0.1, 1.1)),
        ((1, 2), (math.nan, 1.0)),
        ((1, 2), (math.inf, 0.0)),
        ((1, 2), (0.0, 0.0)),
        ((1, 2), ("a", "b")),
        ((1, 2), (0.5j, 0.5)),
        ((1, 2), None),
    ],
)
def test_what_is_not_a_distribution_is_refused(bins: object, probs: object) -> None:
    with pytest.raises(DistributionError):
        ScoreDistribution(bins, probs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "logits", [(), (math.nan, 0.0), (math.inf, 0.0), (-math.inf, -math.inf), (0.0,), ("a", "b")]
)
def test_unusable_logits_are_refused(logits: tuple[float, ...]) -> None:
    with pytest.raises(DistributionError):
        ScoreDistribution.from_logits((1, 2), logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_unusable_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(DistributionError, match="temperature"):
        ScoreDistribution.from_logits((1, 2), (0.0, 1.0), temperature)


@pytest.mark.parametrize("q", [-1e-9, 1.0 + 1e-9, math.nan])
def test_quantiles_outside_zero_to_one_are_refused(q: float) -> None:
    with pytest.raises(DistributionError, match="quantile"):
        ScoreDistribution((1, 2), (0.5, 0.5)).quantile(q)


@pytest.mark.parametrize("method", ["win_probability", "kl", "wasserstein"])
def test_distributions_of_different_contracts_are_not_compared(method: str) -> None:
    a, b = ScoreDistribution((1, 2), (0.5, 0.5)), ScoreDistribution((1, 3), (0.5, 0.5))
    with pytest.raises(DistributionError, match="different bins"):
        getattr(a, method)(b)

"""zreward.metrics against scipy and against double loops written from the definitions."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from zreward.errors import MetricError
from zreward.metrics import (
    PairShare,
    bootstrap_interval,
    hpa,
    hpa_per_prompt,
    margin_hpa,
    pair_flips,
    plcc,
    srcc,
)

BINS = np.arange(1.0, 5.5, 0.5)


def scores(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half-point truth, noisy predictions rounded so that ties occur, and 1 to 6 items per prompt."""
    truth = rng.choice(BINS, size=n)
    pred = np.round(truth + rng.normal(0, 1, n), 1)
    groups = rng.permutation(np.repeat(np.arange(n), rng.integers(1, 7, n))[:n])
    return pred, truth, groups


def hpa_by_loops(pred: np.ndarray, truth: np.ndarray, groups: np.ndarray, margin: float) -> tuple[float, int]:
    credit, n_pairs = 0.0, 0
    for i, j in combinations(range(len(pred)), 2):
        gap = truth[i] - truth[j]
        if groups[i] != groups[j] or abs(gap) <= margin:
            continue
        n_pairs += 1
        if pred[i] == pred[j]:
            credit += 0.5
        elif (pred[i] > pred[j]) == (gap > 0):
            credit += 1.0
    return credit / n_pairs, n_pairs


def flips_by_loops(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    pairs = [(i, j) for i, j in combinations(range(len(a)), 2) if groups[i] == groups[j]]
    changed = 0.0
    for i, j in pairs:
        order_a, order_b = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
        if order_a != order_b:
            changed += 0.5 if order_a == 0 or order_b == 0 else 1.0
    return changed / len(pairs), len(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_correlations_match_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred, truth, _ = scores(rng, int(rng.integers(3, 400)))
    assert plcc(pred, truth) == pytest.approx(scipy.stats.pearsonr(pred, truth).statistic, abs=1e-12)
    assert srcc(pred, truth) == pytest.approx(scipy.stats.spearmanr(pred, truth).statistic, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e150, 1e307])
def test_plcc_does_not_depend_on_scale(scale: float) -> None:
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 2.0, 5.0])
    assert plcc(x * scale, y) == pytest.approx(plcc(x, y), abs=1e-12)


def test_plcc_is_accurate_far_from_zero() -> None:
    x = np.array([1.0, 2.0, 4.0, 3.0])
    assert plcc(x + 1e8, x) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_hpa_matches_double_loop(seed: int, margin: float) -> None:
    pred, truth, groups = scores(np.random.default_rng(seed), 60)
    expected, n_pairs = hpa_by_loops(pred, truth, groups, margin)
    result = hpa(pred, truth, groups, margin)
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert result.n_pairs == n_pairs
    if margin == 0.5:
        assert margin_hpa(pred, truth, groups) == result


@pytest.mark.parametrize("seed", range(20))
def test_pair_flips_match_double_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, _, groups = scores(rng, 60)
    b = np.round(a + rng.normal(0, 0.3, 60), 1)
    expected, n_pairs = flips_by_loops(a, b, groups)
    result = pair_flips(a, b, groups)
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert result.n_pairs == n_pairs


def test_pair_flips_above_a_margin_count_the_pairs_that_were_apart_before() -> None:
    before, after, groups = [1.0, 2.0, 2.4, 3.0, 1.0], [2.0, 1.0, 0.5, 2.3, 9.0], [0, 0, 0, 0, 1]
    assert pair_flips(before, after, groups) == PairShare(0.5, 6)
    assert pair_flips(before, after, groups, 0.5) == PairShare(0.4, 5)  # without the pair (2.0, 2.4)
    assert pair_flips([4.4, 3.9, 5.0, 1.0], [1, 2, 2, 1], [0, 0, 1, 1], 0.5) == PairShare(0.0, 1)
    with pytest.raises(MetricError, match="differs by more than 2"):
        pair_flips(before, after, groups, 2.0)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_sums_per_prompt_are_the_hpa_of_any_prompts(margin: float) -> None:
    pred, truth, groups = scores(np.random.default_rng(3), 120)
    credit, pairs = hpa_per_prompt(pred, truth, groups, margin)
    prompts = np.unique(groups)
    assert credit.shape == pairs.shape == prompts.shape
    for index, prompt in enumerate(prompts):
        own = groups == prompt
        if pairs[index]:
            expected, n_pairs = hpa_by_loops(pred[own], truth[own], groups[own], margin)
            assert (credit[index] / pairs[index], pairs[index]) == (pytest.approx(expected), n_pairs)
        else:
            assert credit[index] == 0


def test_hpa_reads_prompts_as_strings_or_integers() -> None:
    pred, truth, groups = scores(np.random.default_rng(1), 60)
    assert hpa(pred, truth, [f"prompt {g}" for g in groups]) == hpa(pred, truth, groups)


def test_hpa_known_values() -> None:
    truth, groups = [1.0, 2.0, 3.0, 1.5], ["fox", "fox", "owl", "owl"]
    assert hpa([1, 2, 3, 1], truth, groups) == PairShare(1.0, 2)
    assert hpa([2, 1, 3, 1], truth, groups) == PairShare(0.5, 2)
    assert hpa([1, 1, 1, 1], truth, groups) == PairShare(0.5, 2)  # ties are worth half, not nothing
    assert hpa([2, 1, 1, 3], truth, groups) == PairShare(0.0, 2)


def test_margin_is_strict_despite_rounding() -> None:
    """A gap of half a point is not above the margin, also where float64 makes it a little more."""
    assert 4.4 - 3.9 > 0.5
    truth = [4.4, 3.9, 5.0, 1.0]
    assert margin_hpa([1, 2, 2, 1], truth, [0, 0, 1, 1]) == PairShare(1.0, 1)


items = st.lists(
    st.tuples(st.integers(-8, 8), st.integers(-8, 8), st.sampled_from(BINS.tolist()), st.integers(0, 4)),
    min_size=2,
    max_size=40,
)


@given(items)
def test_laws_of_pair_metrics(rows: list[tuple[int, int, float, int]]) -> None:
    a, b, truth, groups = (np.array(column) for column in zip(*rows, strict=True))
    pairs = [(i, j) for i, j in combinations(range(len(a)), 2) if groups[i] == groups[j]]
    assume(any(truth[i] != truth[j] for i, j in pairs))
    result = hpa(a, truth, groups)
    assert 0.0 <= result.value <= 1.0
    assert hpa(-a, truth, groups).value == pytest.approx(1.0 - result.value)
    assert hpa(truth, truth, groups).value == 1.0
    assert hpa(np.exp(a / 4.0), truth, groups) == result  # only the order counts
    order = np.random.default_rng(0).permutation(len(a))
    assert hpa(a[order], truth[order], groups[order]).value == pytest.approx(result.value)

    flips = pair_flips(a, b, groups)
    assert flips == pair_flips(b, a, groups)
    assert pair_flips(a, a, groups).value == 0.0
    if all(truth[i] != truth[j] for i, j in pairs):
        assert abs(hpa(b, truth, groups).value - result.value) <= flips.value + 1e-12


@given(items)
def test_laws_of_correlations(rows: list[tuple[int, int, float, int]]) -> None:
    a, b, _, _ = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    for metric in (plcc, srcc):
        value = metric(a, b)
        assert -1.0 <= value <= 1.0
        assert value == pytest.approx(metric(b, a), abs=1e-12)
        assert metric(-a, b) == pytest.approx(-value, abs=1e-12)
        assert metric(3 * a + 7, b) == pytest.approx(value, abs=1e-12)
        assert metric(a, a) == pytest.approx(1.0)
    assert srcc(np.exp(a), b) == pytest.approx(srcc(a, b), abs=1e-12)


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        ([], [], "at least two"),
        ([1.0], [2.0], "at least two"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "lengths differ"),
        ([1.0, float("nan")], [1.0, 2.0], r"pred\[1\] is nan"),
        ([1.0, 2.0], [float("inf"), 2.0], r"truth\[0\] is inf"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "expected one score per item"),
        (["a", "b"], [1.0, 2.0], "does not hold numbers"),
    ],
)
def test_malformed_scores_are_refused(pred: list[float], truth: list[float], message: str) -> None:
    groups = [0] * len(pred)
    for metric in (plcc, srcc, lambda p, t: hpa(p, t, groups)):
        with pytest.raises(MetricError, match=message):
            metric(pred, truth)


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.5, 1e9 + 0.1])
def test_correlation_with_a_constant_is_undefined(constant: float) -> None:
    varied = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    for metric in (plcc, srcc):
        with pytest.raises(MetricError, match="pred is constant"):
            metric([constant] * 7, varied)
        with pytest.raises(MetricError, match="truth is constant"):
            metric(varied, [constant] * 7)
    with pytest.raises(MetricError, match="pred is constant"):
        plcc([0.3, 0.1 + 0.2, 0.3, 0.3, 0.3, 0.3, 0.3], varied)


def test_pair_metrics_without_pairs_are_undefined() -> None:
    with pytest.raises(MetricError, match="none of the 0 same-prompt pairs"):
        hpa([1, 2], [1, 2], ["a", "b"])
    with pytest.raises(MetricError, match="none of the 1 same-prompt pairs"):
        hpa([1, 2], [3, 3], ["a", "a"])
    with pytest.raises(MetricError, match=r"by more than 0\.5"):
        margin_hpa([1, 2], [3.0, 3.5], ["a", "a"])
    with pytest.raises(MetricError, match="no two items share a prompt"):
        pair_flips([1, 2], [2, 1], ["a", "b"])


def test_malformed_groups_and_margins_are_refused() -> None:
    with pytest.raises(MetricError, match="groups has length 3"):
        hpa([1, 2], [1, 2], [0, 0, 0])
    with pytest.raises(MetricError, match="integers or strings"):
        hpa([1, 2], [1, 2], [0.5, 0.5])
    with pytest.raises(MetricError, match="margin is nan"):
        hpa([1, 2], [1, 2], [0, 0], margin=float("nan"))
    with pytest.raises(MetricError, match="should name prompts"):
        hpa(np.arange(20_000), np.arange(20_000), np.zeros(20_000, int))


def test_bootstrap_covers_the_mean_and_is_seeded() -> None:
    """90 % intervals of a mean hold the true mean in about 90 % of the experiments."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), 3)
        values = np.repeat(rng.normal(size=60), 3) + 0.1 * rng.normal(size=180)  # correlated in a prompt
        interval = bootstrap_interval(
            lambda rows, _, values=values: float(values[rows].mean()),
            groups,
            level=0.9,
            n_resamples=200,
            seed=seed,
        )
        hits += interval.low <= 0.0 <= interval.high
    assert 0.82 <= hits / 200 <= 0.96  # resampling items instead of prompts gives 0.65
    repeat = bootstrap_interval(lambda rows, _: float(rows.mean()), groups, n_resamples=50, seed=3)
    assert repeat == bootstrap_interval(lambda rows, _: float(rows.mean()), groups, n_resamples=50, seed=3)
    assert repeat != bootstrap_interval(lambda rows, _: float(rows.mean()), groups, n_resamples=50, seed=4)


def test_bootstrap_keeps_prompts_whole_and_copies_apart() -> None:
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    sizes = {"a": 2, "b": 3, "c": 1}

    def check(rows: np.ndarray, drawn: np.ndarray) -> float:
        assert len(set(drawn)) == 3
        for label in set(drawn):
            names = groups[rows[drawn == label]]
            assert len(set(names)) == 1
            assert len(set(rows[drawn == label])) == len(names) == sizes[names[0]]
        return float(len(rows))

    bootstrap_interval(check, groups, n_resamples=100)


def test_bootstrap_of_undefined_statistics_is_refused() -> None:
    with pytest.raises(MetricError, match="undefined on"):
        bootstrap_interval(lambda rows, _: plcc(np.ones(len(rows)), rows), [0, 0, 1, 1])
    with pytest.raises(MetricError, match="undefined on"):
        bootstrap_interval(lambda rows, _: float("nan"), [0, 0, 1, 1])
    with pytest.raises(MetricError, match="at least two"):
        bootstrap_interval(lambda rows, _: 1.0, [0, 0])
    with pytest.raises(MetricError, match="between 0 and 1"):
        bootstrap_interval(lambda rows, _: 1.0, [0, 1], level=95)


def test_a_hundred_thousand_pairs_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    n = 67_000  # four candidates a prompt: 100,500 pairs
    groups = rng.permutation(np.arange(n) // 4)
    truth = rng.choice(BINS, n)
    start = time.perf_counter()
    result = hpa(truth + rng.normal(size=n), truth, groups)
    assert time.perf_counter() - start < 1.0
    assert 80_000 < result.n_pairs < 100_500

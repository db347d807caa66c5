"""Bit allocation against trying every mixture, and its laws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zreward.errors import QuantizationError
from zreward.quant.allocate import Frontier, allocate, parse_budget


@dataclass(frozen=True)
class Costs:
    n_bits: Mapping[str, float]
    kl: Mapping[str, float]


def costs(*options: tuple[float, float]) -> Costs:
    names = "abcdef"
    return Costs(
        {n: o[0] for n, o in zip(names, options, strict=False)},
        dict(zip(names, (o[1] for o in options), strict=False)),
    )


def brute_force(units: Sequence[Costs], n_bits: float) -> float | None:
    """The least summed KL of all mixtures that fit."""
    fits = [
        sum(unit.kl[f] for unit, f in zip(units, formats, strict=True))
        for formats in itertools.product(*(unit.n_bits for unit in units))
        if sum(unit.n_bits[f] for unit, f in zip(units, formats, strict=True)) <= n_bits
    ]
    return min(fits, default=None)


UNITS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(-0.1, 5)), min_size=1, max_size=4).map(
        lambda options: costs(*options)
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(UNITS, st.integers(1, 220))
def test_the_answer_is_that_of_trying_everything(units: list[Costs], n_bits: int) -> None:
    best = brute_force(units, n_bits)
    if best is None:
        with pytest.raises(QuantizationError, match="cannot be met"):
            allocate(units, float(n_bits), 1)
        return
    mixture = allocate(units, float(n_bits), 1)
    assert mixture.kl == pytest.approx(best, abs=1e-9)
    assert mixture.n_bits == sum(u.n_bits[f] for u, f in zip(units, mixture.formats, strict=True)) <= n_bits
    assert mixture.kl == pytest.approx(sum(u.kl[f] for u, f in zip(units, mixture.formats, strict=True)))


@settings(max_examples=60, deadline=None)
@given(UNITS, st.sampled_from([4, 7, 1 << 16]))
def test_more_budget_is_never_worse_and_the_frontier_has_no_beaten_point(
    units: list[Costs], limit: int
) -> None:
    frontier = Frontier(units, limit)
    points = frontier.points
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    assert len(points) <= limit
    assert frontier.smallest == min(sum(c) for c in itertools.product(*(u.n_bits.values() for u in units)))
    found = [frontier.within(n_bits) for n_bits in range(1, 220)]
    kls = [mixture.kl for mixture in found if mixture is not None]
    assert all(after <= before for before, after in itertools.pairwise(kls))
    assert all(m is None or m.n_bits <= n for n, m in enumerate(found, start=1))


def many_units(n_units: int = 120) -> tuple[list[Costs], int]:
    """Sizes of a real model's matrices, with group overheads, in 4 and 8 bits."""
    rng = np.random.default_rng(0)
    n_weights = rng.choice([1024 * 4096, 1024 * 3584 * 2, 1024 * 2048, 768 * 3072, 768 * 2304], n_units)
    kl = rng.lognormal(-6, 1.5, n_units)
    units = [
        costs((n * 4.125, k), (n * 4.5, k * 0.7), (n * 8.125, k / 200))
        for n, k in zip(n_weights, kl, strict=True)
    ]
    return units, int(n_weights.sum())


def test_a_real_model_s_allocation_fills_its_budget_and_beats_uniform_bits() -> None:
    units, n_weights = many_units()
    mixture = allocate(units, 5.0, n_weights)
    assert 4.99 * n_weights < mixture.n_bits <= 5.0 * n_weights
    # Lagrange: for any price of a bit, min(KL + price · bits) bounds every mixture within the budget.
    bound = max(
        sum(min(u.kl[f] + price * u.n_bits[f] for f in u.kl) for u in units) - price * 5.0 * n_weights
        for price in np.logspace(-13, -7, 200)
    )
    assert bound <= mixture.kl <= bound * 1.02
    assert mixture.kl < sum(u.kl["b"] for u in units) / 1.5


def test_a_thinned_frontier_is_nearly_as_good() -> None:
    units, n_weights = many_units(40)
    exact, thinned = Frontier(units), Frontier(units, limit=500)
    best, found = exact.within(5.0 * n_weights), thinned.within(5.0 * n_weights)
    assert best is not None
    assert found is not None
    assert found.n_bits <= 5.0 * n_weights
    assert best.kl <= found.kl <= best.kl * 1.05


def test_a_budget_that_is_exactly_one_mixture_is_met_in_spite_of_rounding() -> None:
    units = [costs((0.1, 1.0), (0.2, 0.0))] * 3
    assert 0.1 + 0.1 + 0.1 > 0.3
    assert allocate(units, 0.3, 1).formats == ("a", "a", "a")
    assert allocate(units, 0.6, 1).formats == ("b", "b", "b")


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    units = [costs((4126, 1.0), (8125, 0.0)), costs((4125, 1.0), (8125, 0.0))]
    with pytest.raises(QuantizationError, match=r"budget of 4 bits .* take 4\.126bpw"):
        allocate(units, 4.0, 2000)
    assert allocate(units, 4.126, 2000).formats == ("a", "a")


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "no unit"),
        ([costs((4, 1.0)), Costs({}, {})], "unit 1 has no candidates"),
        ([Costs({"a": 4}, {"b": 1.0})], "different formats"),
        ([costs((4, float("nan")))], "unit 0: the KL of a is nan"),
        ([costs((0, 1.0))], "unit 0: the size of a is 0"),
    ],
)
def test_bad_measurements_are_refused(units: list[Costs], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        allocate(units, 5.0, 1)


@pytest.mark.parametrize(
    ("text", "budget"), [("5.0bpw", 5.0), ("4.6 bpw", 4.6), (" 8bpw ", 8.0), (".5bpw", 0.5)]
)
def test_budgets_are_read(text: str, budget: float) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "5.0", "bpw", "5,0bpw", "5.0 bits", "-4bpw", "1e1bpw", "nanbpw", "5.0bpw!"]
)
def test_a_budget_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(QuantizationError, match=r"such as 5\.0bpw"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0bpw", "0.0bpw", "16.1bpw", "400bpw"])
def test_a_budget_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(QuantizationError, match="at most 16"):
        parse_budget(text)

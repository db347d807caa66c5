"""Raw annotations and their aggregate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zreward.annotations import Histogram

votes = st.lists(st.sampled_from(np.arange(1.0, 5.5, 0.5).tolist()), min_size=1, max_size=12)


@given(votes)
def test_aggregate_is_the_trimmed_mean(scores: list[float]) -> None:
    kept = sorted(scores)[1:-1] if len(scores) >= 3 else scores
    assert Histogram.from_json(scores).aggregate == pytest.approx(sum(kept) / len(kept))


@given(votes)
def test_a_list_and_its_counts_are_one_histogram(scores: list[float]) -> None:
    histogram = Histogram.from_json(scores)
    assert Histogram.from_json(histogram.to_json()) == histogram
    assert histogram.n == len(scores)


def test_shares_are_not_trimmed() -> None:
    assert Histogram.from_json({"1": 0.25, "5": 0.75}).aggregate == 4.0


def test_trimming_may_take_parts_of_several_scores() -> None:
    histogram = Histogram.from_json({"1": 0.5, "2": 2.5, "5": 1})
    assert histogram.aggregate == pytest.approx(2.0)


def test_scales_are_mapped_linearly() -> None:
    histogram = Histogram.from_json([0, 50, 100]).mapped(0, 100)
    assert histogram.scores == (1.0, 3.0, 5.0)
    assert Histogram.from_json([1, 5]).mapped(5, 1).scores == (1.0, 5.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "nobody"),
        ({}, "nobody"),
        ({"3": 0}, "nobody"),
        ({"3": -1}, "negative"),
        ({"three": 1}, "not a number"),
        (["3"], "not a number"),
        ([True], "not a number"),
        ([math.nan], "not finite"),
        ({"3": math.inf}, "not finite"),
        ("335", "expected a list"),
        (3.5, "expected a list"),
        (None, "expected a list"),
    ],
)
def test_unusable(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Histogram.from_json(value)

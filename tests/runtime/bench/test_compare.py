"""zreward.runtime.bench.compare: what changed is told from the noise, and other work is not compared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from tests.support.bench import report
from zreward.errors import BenchError, UsageError
from zreward.runtime.bench.compare import compare, ratio_interval
from zreward.runtime.bench.comparison_tables import comparison_markdown, remarks
from zreward.runtime.bench.report import BenchReport


def verdicts(before: BenchReport, after: BenchReport, **how: float) -> dict[str, str]:
    (found,) = compare([before, after], ["before", "after"], **how).comparisons  # type: ignore[arg-type]
    return {change.stage: change.verdict for change in found.changes}


def test_two_draws_of_the_same_are_within_noise() -> None:
    found = verdicts(report(), report(seed=50))
    assert list(found.values()).count("same") >= len(found) - 1  # 95 %
    assert set(verdicts(report(), report()).values()) == {"same"}


def test_a_regression_is_end_to_end_and_above_the_threshold() -> None:
    found = verdicts(report(), report(slower=1.3, seed=9))
    assert found["vision"] == "slower"
    assert found["new_prompt"] == found["same_prompt"] == "regression"
    assert set(verdicts(report(), report(slower=1.3, seed=9), threshold=0.5).values()) == {"slower"}
    assert set(verdicts(report(slower=1.3), report(seed=9)).values()) == {"faster"}


def test_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.gamma(5, 1, 40), rng.gamma(5, 1.2, 60)
    found = ratio_interval(list(before), list(after))
    expected = stats.bootstrap(
        (before, after),
        lambda b, a, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        method="percentile",
        n_resamples=4000,
        vectorized=True,
        paired=False,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.03)
    assert ratio_interval([2.0], [3.0]) == (1.5, 1.5)


def test_the_interval_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(3), 0
    for _ in range(100):
        low, high = ratio_interval(list(rng.normal(10, 1, 30)), list(rng.normal(11, 1, 30)))
        covered += low <= 1.1 <= high
    assert covered >= 88


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contract_sha256": "ef" * 32}, "b has contract efefef.*--allow-different"),
        ({"sha256": "ef" * 32}, "b has bundle efefef.*--allow-different"),
    ],
)
def test_other_work_is_not_compared_unless_told_to(changes: dict[str, str], message: str) -> None:
    first = report()
    other = dataclasses.replace(first, bundle=dataclasses.replace(first.bundle, **changes))
    with pytest.raises(UsageError, match=message):
        compare([first, other], ["a", "b"])
    allowed = compare([first, other], ["a", "b"], allow_different=True)
    assert len(allowed.different) == 1
    assert any(text.startswith("Different: b has") for text in remarks(allowed))


def test_what_only_one_has_is_named_and_nothing_in_common_is_an_error() -> None:
    (found,) = compare([report((120, 240)), report((120, 64))], ["a", "b"]).comparisons
    assert [one.image_size for one in found.missing] == [240, 64]
    with pytest.raises(BenchError, match="no configuration in common"):
        compare([report((120,)), report((64,))], ["a", "b"])


def test_calls_that_cannot_be_carried_out() -> None:
    with pytest.raises(UsageError, match="at least two"):
        compare([report()], ["a"])
    for threshold in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="threshold"):
            compare([report(), report()], ["a", "b"], threshold=threshold)


def test_several_reports_go_against_the_first() -> None:
    whole = compare([report(), report(seed=5), report(slower=2)], ["a", "b", "c"])
    assert [one.label for one in whole.comparisons] == ["b", "c"]
    assert whole.n_regressions == 3
    text = comparison_markdown(whole, [report()] * 3)
    assert text.count("REGRESSION") == 3
    assert "3 regressions above 10 %" in text
    assert whole.to_dict()["n_regressions"] == 3

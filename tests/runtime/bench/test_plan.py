"""zreward.runtime.bench.plan: what cannot be measured is refused before any work."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zreward.errors import UsageError
from zreward.runtime.bench.plan import BenchPlan, Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": ()}, "image sizes: at least one"),
        ({"image_sizes": (0,)}, "image sizes must be at least 1, not 0"),
        ({"image_sizes": (-5,)}, "not -5"),
        ({"image_sizes": (256, 256)}, "256 is given more than once"),
        ({"image_sizes": (10_001,)}, "use at most 10000"),
        ({"candidates": (0,)}, "candidates must be at least 1"),
        ({"candidates": (4096,)}, "candidates 4096 is more than 1024"),
        ({"threads": (0,)}, "threads must be at least 1"),
        ({"threads": (10**9,)}, "more than 1024"),
        ({"threads": (None, None)}, "given more than once"),
        ({"providers": ("quantum",)}, "unknown provider 'quantum'; this version has auto, cpu"),
        ({"repetitions": 0}, "0 repetitions are too few"),
        ({"repetitions": 9}, "use 10 or more"),
        ({"min_seconds": -1.0}, "min-seconds must be between"),
        ({"min_seconds": math.nan}, "min-seconds must be between"),
        ({"min_seconds": math.inf}, "min-seconds must be between"),
        ({"starts": 0}, "starts must be between"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchPlan(**changes)


def test_every_combination_is_measured_and_threads_share_no_process() -> None:
    plan = BenchPlan((1, 2), (1, 4), (None, 2), ("auto", "cpu"))
    sessions = list(plan.sessions())
    assert sessions == [("auto", None), ("auto", 2), ("cpu", None), ("cpu", 2)]
    found = [one for session in sessions for one in plan.only(*session).configurations(*session)]
    assert len(set(found)) == len(found) == 16
    assert found[1] == Configuration("auto", None, 1, 4)


def test_labels() -> None:
    assert Configuration("cpu", 1, 512, 1).label == "512×512, 1 candidate, 1 thread, cpu"
    assert Configuration("auto", None, 64, 4).label == "64×64, 4 candidates, default threads, auto"

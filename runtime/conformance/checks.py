"""One check: what was found, what is allowed, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zreward.errors import ZrewardError

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"

TITLES = {
    "opens": "it opens",
    "plugin_layers": "plugins among the engine's layers",
    "golden": "golden scores, a bin probability",
    "vision_features": "image features, relative L2",
    "states_after_prompt": "states after the prompt, relative L2",
    "states_after_image": "states after the image, relative L2",
    "probabilities": "answers, a bin probability",
    "mean": "answers, mean",
    "variance": "answers, variance",
    "scores": "scores end to end",
    "inputs": "golden inputs",
    "shapes": "sizes that fail, smallest to largest",
    "batches": "alone and in batches, a bin probability",
    "repeats": "the same in every cycle, relative L2",
    "refusal": "sizes beyond the limits are refused",
    "memory": "growth of memory after a cycle, MB",
    "times": "stages can be timed",
}
"""Every check by its name in a report, in the order of a report."""


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        name: a key of `TITLES`.
        verdict: "pass", "fail", or "skipped" where there is nothing to check; `detail` then says why.
        found: the figure that decided; None where there is none, or where it is not a finite number.
        allowed: the largest that passes.
        detail: what was seen, or what went wrong.
    """

    name: str
    verdict: str
    found: float | None = None
    allowed: float | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.name in TITLES and self.verdict in (PASS, FAIL, SKIPPED)

    @staticmethod
    def within(name: str, found: float, allowed: float, detail: str = "") -> Check:
        """Passes where `found` is at most `allowed`; a NaN is not."""
        if not math.isfinite(found):
            return Check(name, FAIL, None, allowed, detail or f"it is {found}, which is no number")
        return Check(name, PASS if found <= allowed else FAIL, found, allowed, detail)

    @staticmethod
    def that(name: str, holds: bool, detail: str) -> Check:
        """Passes where `holds`."""
        return Check(name, PASS if holds else FAIL, detail=detail)

    @staticmethod
    def left_out(name: str, why: str) -> Check:
        return Check(name, SKIPPED, detail=why)

    @property
    def title(self) -> str:
        return TITLES[self.name]


def described(error: BaseException) -> str:
    """An error in one line; one that zreward did not raise on purpose with its class."""
    text = str(error) if isinstance(error, ZrewardError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def guarded(name: str, examine: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks of `examine`; where it raises anything, a failed check of this name.

    A provider under examination may fail in any way, and the rest of the report is wanted all the same.
    """
    try:
        return list(examine())
    except Exception as error:
        return [Check(name, FAIL, detail=described(error))]

"""Which unit gets which format: the least summed KL within a size budget.

Measured alone, each unit costs some KL in each format. Summed, they predict the KL of a mixture well enough to
rank mixtures, and the choice becomes a multiple-choice knapsack. The frontier of all mixtures that are not beaten
in both size and KL is built unit by unit; every budget reads its answer from that one frontier, so a larger
budget never gets a worse answer, and the frontier itself is the size-against-drift curve of the report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zreward.errors import QuantizationError

EXACT_UP_TO = 1 << 16
"""Points of the frontier that are kept. Up to it the answer is exact. Beyond, of mixtures that differ in size by
less than one part in it only the best is kept."""

MAX_BUDGET = 16.0

_BUDGET = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*bpw")

Format = TypeVar("Format", bound=Hashable)
_Format = TypeVar("_Format", bound=Hashable, covariant=True)


class Measured(Protocol[Format]):
    """A unit with what each candidate format costs: stored bits, and KL in nats."""

    @property
    def n_bits(self) -> Mapping[Format, float]: ...

    @property
    def kl(self) -> Mapping[Format, float]: ...


@dataclass(frozen=True)
class Mixture(Generic[_Format]):
    """One format for each unit.

    Attributes:
        formats: in the order of the units.
        n_bits: stored bits of all units.
        kl: summed KL, nats.
    """

    formats: tuple[_Format, ...]
    n_bits: float
    kl: float


def parse_budget(text: str) -> float:
    """Stored bits per quantized weight from a text such as `5.0bpw`.

    Raises:
        QuantizationError: another form, or a number that is not over 0 and at most 16.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise QuantizationError(f"budget {text!r} is not a number of bits per weight such as 5.0bpw")
    budget = float(match["number"])
    if not 0 < budget <= MAX_BUDGET:
        raise QuantizationError(f"budget {text!r} is not over 0 and at most {MAX_BUDGET:g} bits per weight")
    return budget


def allocate(units: Sequence[Measured[Format]], budget: float, n_weights: int) -> Mixture[Format]:
    """The mixture of least summed KL whose size is at most `budget · n_weights` bits.

    Args:
        units: what each unit costs in each candidate format.
        budget: stored bits per weight, on average over all units.
        n_weights: weights of all units.

    Raises:
        QuantizationError: no candidates, a cost that is not finite, or a budget under the smallest mixture.
    """
    frontier = Frontier(units)
    mixture = frontier.within(budget * n_weights)
    if mixture is None:
        # Rounded up, so that the budget named is one that can be met.
        least = math.ceil(frontier.smallest / n_weights * 1000) / 1000
        raise QuantizationError(
            f"a budget of {budget:g} bits per weight cannot be met: the smallest formats, scales included, take "
            f"{least:g}bpw"
        )
    return mixture


class Frontier(Generic[Format]):
    """All mixtures that no other beats in both size and KL, from the smallest to the best."""

    def __init__(self, units: Sequence[Measured[Format]], limit: int = EXACT_UP_TO) -> None:
        _check(units)
        self._units = [_unbeaten(unit) for unit in units]
        self._steps: list[tuple[NDArray[np.int32], NDArray[np.uint8]]] = []
        self._n_bits, self._kl = np.zeros(1), np.zeros(1)
        for options in self._units:
            self._append(options, limit)

    @property
    def smallest(self) -> float:
        """Bits of the smallest mixture."""
        return float(self._n_bits[0])

    @property
    def points(self) -> list[tuple[float, float]]:
        """(bits, summed KL) of each mixture, from the smallest."""
        return list(zip(self._n_bits.tolist(), self._kl.tolist(), strict=True))

    def within(self, n_bits: float) -> Mixture[Format] | None:
        """The best mixture of at most `n_bits`; None where there is none."""
        # Sums of fractional bits differ in the last digit by the order they were added in.
        index = int(np.searchsorted(self._n_bits, n_bits * (1 + 1e-12), side="right")) - 1
        if index < 0:
            return None
        size, kl, formats = float(self._n_bits[index]), float(self._kl[index]), []
        for (parents, choices), options in zip(reversed(self._steps), reversed(self._units), strict=True):
            formats.append(options[choices[index]][0])
            index = int(parents[index])
        return Mixture(tuple(reversed(formats)), size, kl)

    def _append(self, options: Sequence[tuple[Format, float, float]], limit: int) -> None:
        """Extend every mixture by each option of one more unit, and drop what is beaten."""
        n_bits = np.concatenate([self._n_bits + bits for _, bits, _ in options])
        kl = np.concatenate([self._kl + cost for _, _, cost in options])
        order = np.lexsort((kl, n_bits))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], kl[order][:-1]]))
        kept = _thinned(order[kl[order] < best_before], n_bits, limit)
        choices, parents = np.divmod(kept, len(self._n_bits))
        self._steps.append((parents.astype(np.int32), choices.astype(np.uint8)))
        self._n_bits, self._kl = n_bits[kept], kl[kept]


def _thinned(kept: NDArray[np.int64], n_bits: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """At most `limit` of the points, in order of size: the first, and the last of each of equal spans of size."""
    if len(kept) <= limit:
        return kept
    sizes = n_bits[kept]
    spans = ((sizes - sizes[0]) / (sizes[-1] - sizes[0]) * (limit - 2)).astype(np.int64)
    last = np.append(spans[1:] != spans[:-1], True)
    last[0] = True
    thinned: NDArray[np.int64] = kept[last]
    return thinned


def _unbeaten(unit: Measured[Format]) -> list[tuple[Format, float, float]]:
    """(format, bits, KL) of a unit's candidates, without those that another beats in both."""
    ordered = sorted(unit.n_bits, key=lambda chosen: (unit.n_bits[chosen], unit.kl[chosen]))
    options: list[tuple[Format, float, float]] = []
    for chosen in ordered:
        if not options or unit.kl[chosen] < options[-1][2]:
            options.append((chosen, float(unit.n_bits[chosen]), float(unit.kl[chosen])))
    return options


def _check(units: Sequence[Measured[Format]]) -> None:
    if not units:
        raise QuantizationError("there is no unit to allocate bits to")
    for number, unit in enumerate(units):
        if not unit.n_bits or set(unit.n_bits) != set(unit.kl):
            raise QuantizationError(f"unit {number} has no candidates, or sizes and KL for different formats")
        for chosen in unit.n_bits:
            if not (math.isfinite(unit.n_bits[chosen]) and unit.n_bits[chosen] > 0):
                raise QuantizationError(f"unit {number}: the size of {chosen} is {unit.n_bits[chosen]}")
            if not math.isfinite(unit.kl[chosen]):
                raise QuantizationError(f"unit {number}: the KL of {chosen} is {unit.kl[chosen]}")

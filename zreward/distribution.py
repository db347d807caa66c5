"""Distributions over the score bins, and what can be read from them.

A `ScoreDistribution` is one model's answer about one dimension: a probability for each bin, the
closed-set softmax of the code logits. The score is its expectation (Z-Reward, equations 2 and 16), not a
parsed digit, which would round 3.8 and 4.2 to the same 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zreward.errors import ZrewardError

Floats = NDArray[np.float64]

_SUM_TOLERANCE = 1e-3


class DistributionError(ZrewardError, ValueError):
    """Probabilities are not a distribution, or two distributions have different bins."""


@dataclass(frozen=True, eq=False)
class ScoreDistribution:
    """Probabilities of the score bins.

    Args:
        bins: float64 [n], the score values, strictly increasing.
        probs: float64 [n], non-negative; a sum within 1e-3 of one is rescaled to exactly one.

    Raises:
        DistributionError: wrong shapes, a non-finite bin, a non-finite or negative probability, or a sum
            that is not one.
    """

    bins: Floats
    probs: Floats

    def __init__(self, bins: ArrayLike, probs: ArrayLike) -> None:
        b, p = _floats("bins", bins), _floats("probabilities", probs)
        if b.ndim != 1 or p.shape != b.shape or b.size == 0:
            raise DistributionError(
                f"bins of shape {b.shape} and probabilities of shape {p.shape} do not match"
            )
        if not np.all(np.isfinite(b)) or not np.all(np.diff(b) > 0):
            raise DistributionError(f"bins must be finite and strictly increasing: {b.tolist()}")
        total = float(p.sum())
        if not np.all(np.isfinite(p)) or p.min() < 0 or abs(total - 1.0) > _SUM_TOLERANCE:
            raise DistributionError(f"not a probability distribution: {p.tolist()} (sum {total:.6g})")
        p /= total
        b.flags.writeable = p.flags.writeable = False
        object.__setattr__(self, "bins", b)
        object.__setattr__(self, "probs", p)

    @staticmethod
    def from_logits(bins: ArrayLike, logits: ArrayLike, temperature: float = 1.0) -> ScoreDistribution:
        """Softmax of `logits` [n] / `temperature`, in float64; −inf rules a bin out.

        Raises:
            DistributionError: no logits, one that is NaN or +inf, none that is finite, or a temperature
                that is not finite and > 0.
        """
        z = _floats("logits", logits)
        if not 0 < temperature < np.inf:
            raise DistributionError(f"the temperature must be finite and > 0, not {temperature!r}")
        if z.size == 0 or not np.isfinite(z.max()):
            raise DistributionError(f"the logits have no finite maximum: {z.tolist()}")
        e = np.exp((z - z.max()) / temperature)
        return ScoreDistribution(bins, e / e.sum())

    @property
    def mean(self) -> float:
        """The score μ = Σ s·q(s), in score units."""
        return float(self.bins @ self.probs)

    @property
    def variance(self) -> float:
        """Σ (s − μ)²·q(s), in squared score units."""
        return float((self.bins - self.mean) ** 2 @ self.probs)

    @property
    def std(self) -> float:
        return float(np.sqrt(self.variance))

    @property
    def entropy(self) -> float:
        """Shannon entropy in nats, between 0 and log n."""
        p = self.probs[self.probs > 0]
        return max(0.0, float(-(p @ np.log(p))))

    @property
    def mode(self) -> float:
        """The most probable bin; of equals, the lowest."""
        return float(self.bins[int(np.argmax(self.probs))])

    def quantile(self, q: float) -> float:
        """The lowest bin s with P(score ≤ s) ≥ q, for q in [0, 1]."""
        if not 0.0 <= q <= 1.0:
            raise DistributionError(f"a quantile is between 0 and 1, not {q!r}")
        cumulative = np.cumsum(self.probs)
        index = int(np.searchsorted(cumulative, q - 1e-12))
        return float(self.bins[min(index, self.bins.size - 1)])

    def probability_at_least(self, score: float) -> float:
        """P(s ≥ score)."""
        return float(self.probs[self.bins >= score].sum())

    def win_probability(self, other: ScoreDistribution) -> float:
        """P(own score > other's) + ½ P(equal), both drawn independently.

        Always `a.win_probability(b) + b.win_probability(a) == 1` up to rounding.
        """
        below = np.cumsum(other._on(self)) - 0.5 * other.probs
        return float(self.probs @ below)

    def kl(self, other: ScoreDistribution) -> float:
        """KL(self ‖ other) in nats; infinite where `other` rules out a bin that self allows."""
        q = other._on(self)
        support = self.probs > 0
        with np.errstate(divide="ignore"):
            terms = self.probs[support] * (np.log(self.probs[support]) - np.log(q[support]))
        return max(0.0, float(terms.sum()))

    def wasserstein(self, other: ScoreDistribution) -> float:
        """The 1-Wasserstein distance ∫ |F − G|, in score units."""
        gap = np.abs(np.cumsum(self.probs - other._on(self)))[:-1]
        return float(gap @ np.diff(self.bins))

    def _on(self, other: ScoreDistribution) -> Floats:
        if not np.array_equal(self.bins, other.bins):
            raise DistributionError(
                "the two distributions have different bins; compare scores of one contract"
            )
        return self.probs


def _floats(what: str, values: ArrayLike) -> Floats:
    """A float64 copy of `values`."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DistributionError(f"{what} must be numbers, not {values!r}") from None

"""One image's answer: a distribution per rubric dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zreward.distribution import ScoreDistribution
from zreward.errors import UsageError


class DimensionError(UsageError, KeyError):
    """No such dimension; a KeyError too, which `in` and `get` of a mapping rely on."""

    __str__ = Exception.__str__  # a KeyError would print its message in quotes


@dataclass(frozen=True)
class Score(Mapping[str, ScoreDistribution]):
    """Distributions by dimension name, in contract order.

    Attributes:
        dimensions: the distributions.
        label_mass: per dimension, the share of the vocabulary's probability that the codes hold; a low
            share means that the model did not want to answer with a score. None where the bundle was
            exported without it.
    """

    dimensions: Mapping[str, ScoreDistribution]
    label_mass: Mapping[str, float] | None = None

    def __getitem__(self, name: str) -> ScoreDistribution:
        if name not in self.dimensions:
            raise DimensionError(f"no dimension {name!r}; this bundle scores {', '.join(self.dimensions)}")
        return self.dimensions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def overall(self) -> float:
        """The unweighted mean of the dimensions' means, in score units."""
        return sum(d.mean for d in self.dimensions.values()) / len(self.dimensions)

    def to_dict(self) -> dict[str, Any]:
        """`dimensions.<name>.{mean, std, probs}` and `overall`, as `zreward score --json` prints them."""
        result: dict[str, Any] = {
            "dimensions": {
                name: {"mean": d.mean, "std": d.std, "probs": d.probs.tolist()}
                for name, d in self.dimensions.items()
            },
            "overall": self.overall,
        }
        if self.label_mass is not None:
            result["label_mass"] = dict(self.label_mass)
        return result

"""What the lowering of one checkpoint needs to know, and what it found: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zreward.bundle import EmbeddingInfo, StateInfo

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total), in bytes while weights are written."""

TARGETS = ("cpu",)
WEIGHT_TYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class LoweringJob:
    """One lowering.

    Attributes:
        checkpoint: directory to read.
        output: existing directory that the graphs and the embedding are written into.
        target: the runtime to lower for.
        weights: stored type of the weight matrices.
        label_mass: also output the share of probability that the codes hold.
        code_ids: rows of the language head, in bin order.
        bins: their score values.
        n_positions: rotary positions that a sequence of the contract can reach.
    """

    checkpoint: str
    output: str
    target: str
    weights: str
    label_mass: bool
    code_ids: tuple[int, ...]
    bins: tuple[float, ...]
    n_positions: int


@dataclass(frozen=True)
class Lowered:
    """What was written: the decoder's states and the embedding, as the manifest lists them."""

    states: tuple[StateInfo, ...]
    embedding: EmbeddingInfo

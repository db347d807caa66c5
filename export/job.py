"""What the lowering of one checkpoint needs to know, and what it found: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zreward.bundle import EmbeddingInfo, StateInfo, Work

TARGETS = ("cpu", "cuda", "onnx", "tensorrt")
WEIGHT_TYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class QuantizationJob:
    """How the child quantizes before it lowers.

    Attributes:
        scheme: see `zreward.quant.scheme`.
        method: of `zreward.quant.quantize`.
        budget: stored bits per quantized weight that formats are mixed up to, or None.
        calibration: JSONL file, "scenes" for synthetic ones, or None for methods that need no data.
        device: where calibration runs.
        store: existing, empty directory for the quantized weights.
        groups: inputs that share a scale where the scheme does not say it, by format.
    """

    scheme: str
    method: str
    budget: float | None
    calibration: str | None
    device: str
    store: str
    groups: Mapping[str, int]


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
        quantization: None lowers the weights as they are.
    """

    checkpoint: str
    output: str
    target: str
    weights: str
    label_mass: bool
    code_ids: tuple[int, ...]
    bins: tuple[float, ...]
    n_positions: int
    quantization: QuantizationJob | None = None


@dataclass(frozen=True)
class Lowered:
    """What was written: the decoder's states and the embedding, as the manifest lists them.

    `weight_bytes` are those of both graphs. `quantization` is the manifest's entry, None where no weight is
    quantized. `work` is None where it could not be counted.
    """

    states: tuple[StateInfo, ...]
    embedding: EmbeddingInfo
    weight_bytes: int
    quantization: Mapping[str, Any] | None = None
    work: Work | None = None

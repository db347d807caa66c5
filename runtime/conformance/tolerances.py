"""How far a provider may be from the reference, by the arithmetic of the bundle, and where each figure comes from.

Rounding alone moves the reference student by the distances below: its graphs in 16 bits against those in float32, the
same float32 graphs in two ways of summing, and the same quantized ones with and without the compiled kernels. In
float32, what is allowed is less than TensorFloat-32 would move. A layout, a mask or a weight that is wrong moves states
by 0.1 or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zreward.bundle import NARROW_TARGETS, Bundle

RESERVE_SHARE = 0.1
"""Of the host's memory in use, what may be added to it, where that is more than the tolerance."""


@dataclass(frozen=True)
class Tolerance:
    """The largest figure that passes, and its source."""

    allowed: float
    source: str


@dataclass(frozen=True)
class _Arithmetic:
    """Of graphs in one type: tolerances, and what rounding was seen to do to the reference student.

    Attributes:
        relative_l2: of features and states.
        mean: of a score.
        seen: for people.
    """

    relative_l2: float
    mean: float
    seen: str


_ARITHMETIC = {
    "float32": _Arithmetic(1e-4, 2e-3, "7e-7 seen between two ways of summing"),
    "float16": _Arithmetic(1e-2, 2e-2, "3e-4 seen between float16 and float32"),
    "bfloat16": _Arithmetic(1e-1, 2e-2, "6e-3 seen between bfloat16 and float32"),
    "quantized": _Arithmetic(
        1e-1, 1e-1, "1.4e-2 seen between two ways of rounding inputs, and 4e-2 in a score"
    ),
}
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def arithmetic_of(bundle: Bundle) -> str:
    """The key of what the graphs of a bundle compute in: a float type, or "quantized"."""
    manifest = bundle.manifest
    if manifest.quantization is not None:
        return "quantized"
    return _TYPES[manifest.weights] if manifest.target in NARROW_TARGETS else "float32"


def tolerances_of(bundle: Bundle, *, on_gpu: bool) -> Mapping[str, Tolerance]:
    """What each check with a figure allows, by its name.

    Args:
        bundle: that is examined.
        on_gpu: whose memory is watched.
    """
    name = arithmetic_of(bundle)
    arithmetic, golden = _ARITHMETIC[name], bundle.manifest.golden.tolerance
    width = bundle.contract.bins[-1] - bundle.contract.bins[0]
    relative = Tolerance(arithmetic.relative_l2, f"for {name}: {arithmetic.seen}, on the reference student")
    manifest = Tolerance(golden, "golden.tolerance of the manifest")
    mean = Tolerance(arithmetic.mean, f"for scores of graphs in {name}; see docs/conformance.md")
    growth = (
        Tolerance(16.0, "eight pages of 2 MiB, in which drivers give memory; other processes count too")
        if on_gpu
        else Tolerance(32.0, "what the host's allocators keep in reserve: or a tenth of all, if that is more")
    )
    return {
        "golden": manifest,
        "vision_features": relative,
        "states_after_prompt": relative,
        "states_after_image": relative,
        "probabilities": manifest,
        "mean": mean,
        "variance": Tolerance(
            width * arithmetic.mean, f"that of the mean times the width of the scale, {width:g}"
        ),
        "scores": mean,
        "batches": manifest,
        "repeats": relative,
        "memory": growth,
    }

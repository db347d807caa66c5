"""Units: the matrices of a block that read one input, and the norm or product in front of them.

Matrices of a unit see the same activations, so they share statistics, get the same format from bit allocation
(a runtime may then fuse them into one product), and one scale per input channel can be folded into whatever
makes that input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from zreward.quant.tensor import WeightFormat


@dataclass(frozen=True)
class Unit:
    """Matrices with one input.

    Attributes:
        layers: names within the block, without ".weight"; the first is where the input is watched.
        others: layers that read the same input and are not quantized, or in another format.
        fold: what makes the input and can take a scale per channel; None where nothing can.
        fold_kind: "scale" (weight and, where there is one, bias), "rmsnorm" (stored as weight − 1) or "rows" (of
            a product).
    """

    layers: tuple[str, ...]
    others: tuple[str, ...] = ()
    fold: str | None = None
    fold_kind: str = ""


_VISION = (
    Unit(("attn.qkv",), fold="norm1", fold_kind="scale"),
    Unit(("attn.proj",)),
    Unit(("mlp.linear_fc1",), fold="norm2", fold_kind="scale"),
    Unit(("mlp.linear_fc2",)),
)
_MLP = (
    Unit(("mlp.gate_proj", "mlp.up_proj"), fold="post_attention_layernorm", fold_kind="rmsnorm"),
    Unit(("mlp.down_proj",), fold="mlp.up_proj", fold_kind="rows"),
)
_DECODER = (
    Unit(
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        others=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
        fold="input_layernorm",
        fold_kind="rmsnorm",
    ),
    Unit(("linear_attn.out_proj",), fold="linear_attn.norm", fold_kind="scale"),
    Unit(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        fold="input_layernorm",
        fold_kind="rmsnorm",
    ),
    Unit(("self_attn.o_proj",)),
    *_MLP,
)
_MERGER = (
    Unit(("linear_fc1",), fold="norm", fold_kind="scale"),
    Unit(("linear_fc2",)),
)
_UNITS = {"vision": _VISION, "merger": _MERGER, "decoder": _DECODER}


def units_of(kind: str, formats: Mapping[str, WeightFormat]) -> list[Unit]:
    """The units of a block in the order they run; matrices of one input in two formats are two units.

    Args:
        kind: of the block: vision, merger or decoder.
        formats: of the layers that are to be quantized, by their names within the block.
    """
    units = []
    for unit in _UNITS[kind]:
        present = [layer for layer in unit.layers if layer in formats]
        for chosen in dict.fromkeys(formats[layer] for layer in present):
            layers = tuple(layer for layer in present if formats[layer] == chosen)
            rest = tuple(layer for layer in unit.layers if layer not in layers)
            units.append(replace(unit, layers=layers, others=unit.others + rest))
    return units

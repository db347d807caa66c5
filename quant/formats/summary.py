"""What the manifest says about a checkpoint that came quantized; the keys are those of zreward's own store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zreward.quant.tensor import CodebookFormat, WeightFormat

Format = WeightFormat | CodebookFormat


def origin_summary(
    method: str,
    formats: Mapping[str, Format],
    shapes: Mapping[str, tuple[int, int]],
    floats: Iterable[str],
) -> dict[str, Any]:
    """Method, format and shape of each matrix, stored bits a weight, and the tensors that are floats.

    Args:
        method: "gptq" or "bitsandbytes".
        formats: of each quantized matrix by its name in a float checkpoint.
        shapes: their (out, in).
        floats: names of the other tensors.
    """
    sizes = {name: out * inputs for name, (out, inputs) in shapes.items()}
    bits = sum(formats[name].bits_per_weight(shapes[name][1]) * sizes[name] for name in formats)
    layers = {
        name.removesuffix(".weight"): {"format": described(form), "shape": list(shapes[name])}
        for name, form in formats.items()
    }
    return {
        "scheme": f"as the {method} checkpoint has it",
        "method": method,
        "bits_per_weight": bits / sum(sizes.values()),
        "layers": layers,
        "kept": dict.fromkeys(floats, "not quantized in the checkpoint"),
    }


def described(form: Format) -> str:
    """A short name, as in schemes where they have one: int4-g64-asym, int8-weight-rows, nf4-g64."""
    if isinstance(form, CodebookFormat):
        return f"{form.name}-g{form.block_size}"
    base = "int8-weight" if form.bits == 8 else f"int{form.bits}"
    groups = f"-g{form.group_size}" if form.group_size else "-rows"
    return f"{base}{groups}{'' if form.symmetric else '-asym'}{'-act-order' if form.act_order else ''}"

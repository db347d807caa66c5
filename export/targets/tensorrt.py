"""TensorRT: standard operators of opset 24, three operators that plugins may take over, and explicit quantization.

The graphs are strongly typed: what runs in 16 bits, or through 8, is written in them, and a builder changes none of it.
The operators that remain in the domain zreward are local functions with standard bodies, so that ONNX Runtime proves
the bundle, and TensorRT builds without plugins. docs/tensorrt.md describes them.

Products run in the type that weights are stored in; see `zreward.export.passes.compute_type` for what stays in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from zreward.export.graph import Graphs
from zreward.export.passes.causal_conv import fuse_causal_convolutions
from zreward.export.passes.compute_type import compute_products_in
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.delta_rule import fuse_delta_rules
from zreward.export.passes.patch_positions import take_patch_positions
from zreward.export.passes.plain_attention import unfuse_causal_attention, unfuse_vision_attention
from zreward.export.passes.plain_norms import unfuse_skip_norms
from zreward.export.passes.qdq_products import quantize_products_with_qdq
from zreward.export.targets.shared import simplify
from zreward.quant.source import QuantizedWeights


def lower_to_tensorrt(
    graphs: Graphs,
    *,
    code_ids: Sequence[int],
    bins: Sequence[float],
    n_positions: int,
    stored_type: ir.DataType,
    label_mass: bool,
    quantized: QuantizedWeights | None = None,
) -> None:
    """Lower both graphs in place; arguments as for `lower_to_cpu`.

    Raises:
        ExportError: weights with inputs of 8 bits have no scale for these.
    """
    simplify(graphs, code_ids=code_ids, bins=bins, n_positions=n_positions, label_mass=label_mass)
    take_patch_positions(graphs.vision)
    unfuse_vision_attention(graphs.vision, stored_type)
    fuse_delta_rules(graphs.decoder)
    fuse_causal_convolutions(graphs.decoder)
    unfuse_causal_attention(graphs.decoder, stored_type)
    for model in (graphs.vision, graphs.decoder):
        unfuse_skip_norms(model)
        if quantized is not None:
            quantize_products_with_qdq(model, quantized, stored_type)
        compute_products_in(model, stored_type)
        remove_dead_outputs(model)
